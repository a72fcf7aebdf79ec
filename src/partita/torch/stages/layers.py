"""The layers of one stage: the list of layers of a model, in which other stages' layers are replaced by stand-ins."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.plan import Stage
from partita.errors import ModelError
from partita.torch.layers.dropout import skip_draw
from partita.torch.model.cache import advance_cache, find_cache
from partita.torch.model.towers import without_media
from partita.torch.transformers_internals import cache_of, recorded

RECORDED = ("hidden_states", "attentions", "cross_attentions", "router_logits")
"""Outputs that transformers records in the layers on request, and that stages pass on."""


@dataclass(frozen=True)
class Message:
    """Message from a stage to the next.

    Attributes:
        tensors: The hidden state `[batch, sequence, hidden]`, then those of multi-token prediction, then recorded outputs.
        arity: Length of the tuple that a layer of the model returns, the hidden state first; 0 if it returns a bare tensor.
        labels: Kinds of the last tensors, each one of `RECORDED`: outputs of earlier layers that the caller requested.
    """

    tensors: tuple[Tensor, ...]
    arity: int = 0
    labels: tuple[str, ...] = ()

    def as_leaves(self) -> Message:
        """The same values as leaf tensors, which receive the gradients of a backward."""
        leaves = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in self.tensors)
        return Message(leaves, self.arity, self.labels)

    @property
    def recorded(self) -> list[tuple[str, Tensor | None]]:
        """The recorded outputs with their labels; None for an output that the caller does not select."""
        last = self.tensors[len(self.tensors) - len(self.labels) :]
        return [(label, None if t.dtype == torch.bool else t) for label, t in zip(self.labels, last, strict=True)]


class Left(BaseException):
    """Ends a forward with the output of the stage's last layer. Not an `Exception`, so `except Exception` misses it."""

    def __init__(self, hidden: Tensor, arity: int) -> None:
        super().__init__()
        values = [(label, value) for label in RECORDED for value in recorded().get(label, ())]
        tensors = (_NOT_SELECTED.to(hidden.device) if value is None else value for _, value in values)
        self.message = Message((hidden, *tensors), arity, tuple(label for label, _ in values))


_NOT_SELECTED = torch.zeros(1, dtype=torch.bool)
"""Placeholder for a recorded output that the caller does not select, so that later ones keep their index."""


@dataclass
class StageRun:
    """The stage that is running.

    Attributes:
        items: The module at each index of the list of layers.
        arity: Length of the tuple that the last layer of the stage returned; see `Message`.
        embeds: Whether the stage has the embedding.
        received: The message of the previous stage.
        cache: The key-value cache that the model passes to its layers.
        normed: Whether the received hidden state has passed the last norm already.
        restored: Whether the outputs that earlier layers recorded precede those of this stage.
        entered: Whether the received hidden state has entered the first layer.
        draws: Whether each layer is seeded by one random number (see `layer_randomness`).
    """

    items: list[Any] = field(default_factory=list)
    arity: int = 0
    embeds: bool = True
    received: Message | None = None
    cache: Any = None
    normed: bool = False
    restored: bool = False
    draws: bool = False
    entered: bool = False

    def restore(self) -> None:
        """Insert the outputs that earlier stages recorded before those of this stage's layers."""
        if self.restored or self.received is None:
            return
        self.restored = True
        for label, value in self.received.recorded:
            recorded()[label].append(value)


class StageLayers(nn.ModuleList):
    """A model's list of layers on one pipeline rank: its own layers at their unsplit indices, stand-ins for all others."""

    __repr__ = nn.Module.__repr__

    def __init__(self, layers: nn.ModuleList, length: int, own: Collection[int], stages: Mapping[int, Stage]) -> None:
        """Keep the layers `own` of `layers`. The first `length` are the model's; prediction layers follow.

        `stages` are this rank's stages, by their index in the pipeline.
        """
        nn.Module.__init__(self)
        # No submodules: the model only reads attributes of an absent layer, which is on the meta device.
        absent: dict[int, nn.Module] = {}
        for index, layer in enumerate(layers):
            if index in own:
                self.add_module(str(index), layer)
            elif index < length:
                absent[index] = layer.to("meta")
        self.absent: dict[int, nn.Module]
        self.__dict__["absent"] = absent
        self.run = StageRun()
        self.length = length
        self.stages = dict(stages)
        self.items: dict[Stage, list[Any]] = {}
        self.run.items = self._outside()

    def _outside(self) -> list[Any]:
        return [self._modules[str(i)] if str(i) in self._modules else self.absent[i] for i in range(self.length)]

    def items_of(self, stage: Stage) -> list[Any]:
        """The module at each index of the list while `stage` runs."""
        if stage not in self.items:
            self.items[stage] = self._items_of(stage)
        return self.items[stage]

    def _items_of(self, stage: Stage) -> list[Any]:
        if stage.layers and stage.layers[0] >= self.length:
            # A prediction layer runs at the index of the last layer.
            layer = self._modules[str(stage.layers[0])]
            return [*(_Skip(self.run, layer) for layer in self._outside()[:-1]), _Gate(self.run, layer, True, True)]
        items: list[Any] = []
        for index, layer in enumerate(self._outside()):
            own = index in stage.layers
            enters = own and index == stage.layers[0] and not stage.embedding
            leaves = own and index == stage.layers[-1] and not stage.loss
            if own:
                ends = leaves and index == self.length - 1
                items.append(_Gate(self.run, layer, enters, ends, leaves) if enters or leaves else layer)
            elif not stage.loss and (index - 1 == stage.layers[-1] if stage.layers else stage.embedding):
                items.append(_End(self.run, layer))
            else:
                items.append(_Skip(self.run, layer))
        return items

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Make the embedding compute inside the context."""
        before, self.run.embeds = self.run.embeds, True
        try:
            yield
        finally:
            self.run.embeds = before

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.run.items)

    def __getitem__(self, index: Any) -> Any:
        return self.run.items[index]


class _Stand:
    """Stands in for `layer` in the list of layers, and has the layer's attributes."""

    def __init__(self, run: StageRun, layer: Any) -> None:
        self.run, self.layer = run, layer

    def __getattr__(self, name: str) -> Any:
        if name in ("run", "layer"):
            raise AttributeError(name)
        return getattr(self.layer, name)

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden state that a layer is called with. Records the cache and restores the outputs of earlier layers."""
        self.run.restore()
        if self.run.cache is None:
            self.run.cache = find_cache(args, kwargs)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise ModelError(
                "its layers do not take the hidden state as first argument, so the model cannot be split into stages. Use pp=1."
            )
        return hidden


class _Skip(_Stand):
    """A layer of another stage: returns the received message, or its input, in the form of the layer's output."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.see(args, kwargs)
        if self.run.draws:
            skip_draw()
        received = self.run.received
        if received is None:
            return hidden
        rest = (None,) * (received.arity - 1)
        return (received.tensors[0], *rest) if received.arity else received.tensors[0]


class _End(_Stand):
    """The first layer of the next stage: its input, after all that the model does between layers, leaves the stage."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise Left(self.see(args, kwargs), self.run.arity)


class _Gate(_Stand):
    """The first or last layer of a stage: takes the received message in, or sends the layer's output out."""

    def __init__(self, run: StageRun, layer: Any, enters: bool, ends: bool, leaves: bool = True) -> None:
        super().__init__(run, layer)
        self.enters, self.ends, self.leaves = enters, ends, leaves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.see(args, kwargs)
        if self.enters:
            assert self.run.received is not None
            hidden, self.run.entered = self.run.received.tensors[0], True
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": hidden}
        output = self.layer(*args, **kwargs)
        if self.leaves:
            hidden, self.run.arity = _opened(output)
        if self.ends:
            raise Left(hidden, self.run.arity)
        return output


def _opened(output: Any) -> tuple[Tensor, int]:
    if isinstance(output, Tensor):
        return output, 0
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], len(output)
    raise ModelError(f"its layers return {type(output).__name__}, so the model cannot be split into stages. Use pp=1.")


def run_part(
    model: nn.Module,
    layers: StageLayers,
    stage: Stage,
    received: Message | None,
    inputs: Mapping[str, Any],
    *,
    normed: bool = False,
) -> tuple[Any, Any]:
    """Run the model's forward with the layers of `stage`; like `run_stage`, without prediction layers.

    `normed` is whether the received hidden state has passed the last norm already.
    """
    run = layers.run
    run.items, run.embeds, run.received, run.cache = layers.items_of(stage), stage.embedding, received, None
    run.arity = 0
    given = inputs if stage.embedding else without_media(inputs)
    run.normed, run.restored, run.entered = normed, False, False
    output: Any
    try:
        output = type(model).forward(model, **given)
    except Left as left:
        output = left.message
    finally:
        cache, run.cache, run.received, run.embeds, run.normed = run.cache, None, None, True, False
        run.items = layers._outside()
    if cache is None and not isinstance(output, Message):
        # If one stage has all layers, no stand-in sees the cache.
        cache = find_cache(output, {}) if isinstance(output, tuple) else cache_of(output)
    if stage.layers and not ((run.entered or stage.embedding) and (stage.loss or isinstance(output, Message))):
        raise ModelError(
            f"{type(model).__name__} skipped the first or the last layer of a stage. Use a model that runs every layer, or "
            "pp=1."
        )
    if cache is not None:
        advance_cache(cache, stage.layers, inputs)
    return output, cache
