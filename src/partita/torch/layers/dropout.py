"""Random numbers of dropout: equal on all ranks for replicated tensors, different per rank inside a split region."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import (
    _disable_dynamo,  # unlike torch.compiler.disable, imports torch._dynamo at the first call only
)
from torch.autograd import Function

from partita.core.plan import Plan
from partita.torch.collectives.comm import Communicator
from partita.torch.layers.compiled import is_compiled
from partita.training.random import mixed_seed


class RegionRandomness:
    """Forks the default generator while a rank is inside a split region, and restores it after the region.

    Inside, ranks drop different elements of tensors of different sizes, so their generators diverge. Without restoring, the
    next dropout of a replicated tensor would differ between ranks, and so would the model. After the region every rank
    continues from the state at its start, one sample later. Source: Megatron-LM's CudaRNGStatesTracker.
    """

    def __init__(self, comm: Communicator) -> None:
        """Create the fork of a model with the tensor ranks `comm`."""
        self.comm = comm
        self._outside: Tensor | None = None
        self._device = torch.device("cpu")

    @_disable_dynamo
    def enter(self, x: Tensor) -> None:
        """Enter a region with input `x`; a second entry into the same region does nothing.

        A compiled graph ends here and at `leave`: compilers draw the random numbers of a graph from one seed at its start.
        """
        if self._outside is None:
            self._device = x.device
            self._outside = self._generator().get_state()
            seed = int(torch.randint(0, 1 << 62, (), device=self._device))
            self._generator().manual_seed((seed + 0x9E3779B97F4A7C15 * (self.comm.rank + 1)) % (1 << 63))

    @_disable_dynamo
    def leave(self, x: Tensor) -> Tensor:
        """Leave the region with output `x`, which is returned (see `_reached`)."""
        if self._outside is not None:
            self._generator().set_state(self._outside)
            torch.rand((), device=self._device)
            self._outside = None
        return _reached(x)

    def _generator(self) -> Any:
        return (
            torch.cuda.default_generators[self._device.index or 0]
            if self._device.type == "cuda"
            else torch.default_generator
        )


class _Reached(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        ctx.mark_dirty(x)  # no view, which the sum over the ranks could not be made in
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _reached(x: Tensor) -> Tensor:
    """`x` as a new tensor that checkpointing recomputes too: recomputation stops after the last saved tensor, which is this
    one.

    Called at the end of a region, because a recomputation that stops inside would leave the generator forked.
    """
    return _Reached.apply(x) if x.requires_grad else x


@contextmanager
def layer_randomness(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Give each layer of `model` its own generator inside the context, seeded by one sample and the layer's index.

    Stages whose generators start equal then drop different elements in different layers, and a layer drops the same ones on any
    stage: a stage samples once for a layer of another stage too (see `StageLayers`). A layer that is recomputed in
    backward gets the same seed, because checkpointing restores the generator.
    """
    layers = model.get_submodule(plan.spec.layers) if plan.spec.layers else nn.ModuleList()
    run = getattr(layers, "run", None)
    if run is not None:
        run.draws = model.training
    changed: list[tuple[nn.Module, str, Any]] = []
    for name, layer in layers.named_children():
        if name.isdigit() and "forward" not in layer.__dict__:
            # The seed is sampled outside the graph of a compiled layer.
            attribute = "_compiled_call_impl" if is_compiled(layer) else "forward"
            changed.append((layer, attribute, layer.__dict__.get(attribute)))
            call = layer._compiled_call_impl if is_compiled(layer) else partial(type(layer).forward, layer)
            setattr(layer, attribute, partial(_seeded, layer, int(name), call))
    try:
        yield
    finally:
        for layer, attribute, before in changed:
            delattr(layer, attribute)
            if before is not None:
                setattr(layer, attribute, before)
        if run is not None:
            run.draws = False


def _seeded(layer: Any, index: int, call: Any, *args: Any, **kwargs: Any) -> Any:
    if not layer.training:
        return call(*args, **kwargs)
    seed = skip_draw()
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(mixed_seed(seed, index))
        return call(*args, **kwargs)


def skip_draw() -> int:
    """Sample a layer's seed; a stage calls it for each layer that it does not have."""
    return int(torch.randint(1 << 62, ()))


def has_dropout(config: Any) -> bool:
    """Whether a model's config enables dropout in training."""
    data = config.to_dict() if hasattr(config, "to_dict") else {}
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in _flat(data))


def _flat(data: dict[Any, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in data.items():
        pairs += _flat(value) if isinstance(value, dict) else [(str(key), value)]
    return pairs
