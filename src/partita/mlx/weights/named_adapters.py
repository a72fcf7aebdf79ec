"""The adapters in a split model: choose between those with names, merge and remove them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.errors import ModelError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.layers.inner import is_quantized, new_linear
from partita.mlx.layers.linear import RowParallelLinear
from partita.mlx.weights.adapter_places import adapters


@dataclass
class NamedAdapters:
    """The adapters with names of a model, and which of them is in it.

    Attributes:
        places: By name, for each adapted layer its parent, the key there, and the adapter.
        chosen: The name of the adapters that compute; None for the base model.
    """

    places: dict[str, list[tuple[Any, Any, nn.Module]]] = field(default_factory=dict)
    chosen: str | None = None

    def take_off(self, name: str, found: list[tuple[Any, Any, nn.Module]]) -> None:
        """Remove adapters from the model, and keep them under a name."""
        for holder, key, adapter in found:
            holder[key] = adapter["linear"]
        self.places[name] = found


def named_adapters(model: nn.Module) -> NamedAdapters:
    """The adapters with names of a split model; to be modified by `choose` and `load_adapters` only."""
    if not isinstance(getattr(model, "partita_adapters", None), NamedAdapters):
        model.partita_adapters = NamedAdapters()
    found: NamedAdapters = model.partita_adapters
    return found


def choose(model: nn.Module, name: str | None) -> None:
    """Put the adapters of a name in the model, or none."""
    named = named_adapters(model)
    for holder, key, adapter in named.places.get(named.chosen or "", ()):
        holder[key] = adapter["linear"]
    for holder, key, adapter in named.places[name] if name is not None else ():
        adapter.train(holder[key].training)
        holder[key] = adapter
    named.chosen = name


def check_name(model: nn.Module, name: str | None) -> None:
    """Raise `ModelError` unless the model has adapters of a name."""
    names = named_adapters(model).places
    if name not in names:
        raise ModelError(f"name must be one of the model's adapters, {', '.join(sorted(names))}; got {name!r}.")


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Choose which of the adapters that were loaded with a name computes, or none: then the base model does. No communication.

    Only the chosen one can then be trained, saved without a name, and merged.

    Args:
        model: A split model with adapters from `load_adapters(..., name=...)`.
        name: The adapter, or None.

    Raises:
        ModelError: There is no such adapter, or the adapters have no names.

    Examples:
        >>> paths = pm.load_adapters(model, "./french", name="fr")
        >>> paths = pm.load_adapters(model, "./german", name="de")
        >>> pm.set_adapter(model, "fr")
        >>> pm.set_adapter(model, None)  # the base model
    """
    if not named_adapters(model).places:
        raise ModelError("the model has no adapters with names. Load them with load_adapters(model, folder, name=...).")
    if name is not None:
        check_name(model, name)
    choose(model, name)


def merge_lora(model: nn.Module) -> None:
    """Merge every LoRA adapter into its base weight and remove it; of adapters with names, the chosen one. Every rank calls it.

    A quantized weight is quantized again.

    Examples:
        >>> model = pm.load("./model", tp=2)
        >>> paths = pm.add_lora(model, rank=4, seed=0)
        >>> pm.merge_lora(model)  # after training; the model can be saved again
    """
    for holder, key, adapter in adapters(model):
        inner = adapter["linear"]
        is_split_row = isinstance(holder, RowParallelLinear) and holder.comm.size > 1
        fused = _fused_row(adapter, holder.comm) if "m" in adapter and is_split_row else adapter.fuse()
        mx.eval(fused.parameters())
        for name in ("weight", "scales", "biases"):
            if name in inner and inner[name] is not None:
                inner[name] = fused[name]
        holder[key] = inner
    model.partita_adapters = NamedAdapters()


def _fused_row(adapter: Any, comm: Communicator) -> nn.Module:
    """The layer that DoRA on a row layer's part is merged into: mlx-lm's `fuse` with the norms of unsplit rows."""
    inner, weight = adapter["linear"], adapter._dequantized_weight()
    weight = weight + ((adapter.scale * adapter["lora_b"].T) @ adapter["lora_a"].T).astype(weight.dtype)
    norm = mx.sqrt(comm.all_sum(mx.square(weight).sum(axis=1)))
    merged = new_linear((adapter["m"] / norm)[:, None] * weight, None)
    if not is_quantized(inner):
        return merged
    return nn.QuantizedLinear.from_linear(merged, inner.group_size, inner.bits, mode=inner.mode)


def unload_lora(model: nn.Module) -> None:
    """Remove every adapter, with a name or without, without merging it. No communication."""
    for holder, key, adapter in adapters(model):
        holder[key] = adapter["linear"]
    model.partita_adapters = NamedAdapters()
