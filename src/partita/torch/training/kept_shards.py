"""A model of which each replica holds only its shard of every parameter, also before and after a training with ZeRO 3.

load, fresh      one parameter at a time is read completely, and all but this replica's shard of it is released
train            the parameters have their shapes, and their memory only while a layer is gathered (`ShardedOptimizer`)
save             one parameter at a time is gathered
otherwise        each parameter is the flat shard, and calling the model is refused
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from partita.errors import ModelError
from partita.torch.training.shards import Slot, unsharded

Call = TypeVar("Call", bound=Callable[..., Any])


def shards_of(model: nn.Module) -> Mapping[int, Slot]:
    """The shards of the parameters that this replica does not hold completely, by the parameter's `id`."""
    found: Mapping[int, Slot] = getattr(model, "partita_shards", {})
    return found


def keep_shards(model: nn.Module, shards: Mapping[int, Slot]) -> nn.Module:
    """Make each parameter of `shards`, which has its shape and no memory, the flat shard. Returns the model."""
    if shards:
        model.partita_shards = dict(shards)  # type: ignore[assignment]
        model.register_forward_pre_hook(lambda *_: refuse_shards(model, "be called"))
        _close(shards)
    return model


def refuse_shards(model: nn.Module, use: str) -> None:
    """Raise if the parameters are flat shards, with which the model cannot `use`.

    Raises:
        ModelError: They are.
    """
    if any(slot.parameter.shape != slot.shaped_like() for slot in shards_of(model).values()):
        raise ModelError(
            f"the model was loaded with zero=3, so that each replica holds only its shard of every parameter; it cannot {use}, "
            "only be trained with zero=3 and saved. Save it and load that, or load it without zero=3."
        )


def complete(model: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the model with all its elements. Every replica calls it for the same tensors."""
    slot = shards_of(model).get(id(tensor))
    return tensor if slot is None else unsharded(slot, slot.shard)


def shaped(call: Call) -> Call:
    """Let a function of a `model` see parameters that are shards in their shapes, without memory."""

    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        shards = shards_of(args[0] if args else kwargs["model"])
        for slot in shards.values():
            slot.open()
        try:
            return call(*args, **kwargs)
        finally:
            _close(shards)

    return cast(Call, wrapper)


def _close(shards: Mapping[int, Slot]) -> None:
    for slot in shards.values():
        slot.shard.grad = None
        slot.close()
