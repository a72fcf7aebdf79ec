"""Random numbers of dropout: the same on all ranks where they hold the same, their own inside a split region and a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from partita.core.plan import Plan
from partita.torch.collectives.comm import Communicator
from partita.training.random import mixed_seed


class RegionRandomness:
    """Forks the default generator while a rank is inside a split region, and joins it again behind the region.

    Inside, ranks drop different elements of different sizes, so that their generators part. Were they not joined, the next
    dropout of what all ranks hold would differ between them, and with it the model. After the region every rank goes on
    from where the region began, one draw later. Source: Megatron-LM's CudaRNGStatesTracker.
    """

    def __init__(self, comm: Communicator) -> None:
        """Of a model whose tensor ranks are `comm`."""
        self.comm = comm
        self._outside: Tensor | None = None
        self._device = torch.device("cpu")

    def enter(self, x: Tensor) -> None:
        """A region begins, whose input is `x`; a second entry into the same region does nothing."""
        if self._outside is None:
            self._device = x.device
            self._outside = self._generator().get_state()
            seed = int(torch.randint(0, 1 << 62, (), device=self._device))
            self._generator().manual_seed((seed + 0x9E3779B97F4A7C15 * (self.comm.rank + 1)) % (1 << 63))

    def leave(self) -> None:
        """The region ends."""
        if self._outside is not None:
            self._generator().set_state(self._outside)
            torch.rand((), device=self._device)
            self._outside = None

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


def reached(x: Tensor) -> Tensor:
    """`x`, a new tensor, which checkpointing computes again too: it stops behind the last tensor that is kept, which is here.

    Called where a region ends, as a recomputation that stopped inside would leave the generator forked.
    """
    return _Reached.apply(x) if x.requires_grad else x


@contextmanager
def layer_randomness(model: nn.Module, plan: Plan) -> Iterator[None]:
    """While it lasts, each layer of `model` draws from a generator of its own, seeded by one draw and the layer's number.

    Stages whose generators begin alike drop different elements in different layers, and a layer the same ones on whatever
    stage it is: a stage draws once for a layer of another stage too (see `StageLayers`). A layer that is computed again in
    backward is seeded alike, as checkpointing restores the generator that it found.
    """
    layers = model.get_submodule(plan.spec.layers) if plan.spec.layers else nn.ModuleList()
    run = getattr(layers, "run", None)
    if run is not None:
        run.draws = model.training
    changed = []
    for name, layer in layers.named_children():
        if name.isdigit() and "forward" not in layer.__dict__:
            layer.forward = partial(_seeded, layer, int(name))
            changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward
        if run is not None:
            run.draws = False


def _seeded(layer: Any, index: int, *args: Any, **kwargs: Any) -> Any:
    if not layer.training:
        return type(layer).forward(layer, *args, **kwargs)
    seed = skip_draw()
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(mixed_seed(seed, index))
        return type(layer).forward(layer, *args, **kwargs)


def skip_draw() -> int:
    """What a layer draws to be seeded with; a stage calls it in place of each layer that it does not have."""
    return int(torch.randint(1 << 62, ()))


def has_dropout(config: Any) -> bool:
    """Whether a model's config drops anything in training."""
    data = config.to_dict() if hasattr(config, "to_dict") else {}
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in _flat(data))


def _flat(data: dict[Any, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in data.items():
        pairs += _flat(value) if isinstance(value, dict) else [(str(key), value)]
    return pairs
