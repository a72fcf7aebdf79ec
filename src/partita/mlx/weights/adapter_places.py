"""Where the arrays of a split model's adapters are stored, in memory and on disk in peft's format.

mlx-lm stores `lora_a [in, rank]` and `lora_b [rank, out]`, peft `lora_A [rank, in]` and `lora_B [out, rank]`; both store DoRA's
magnitudes as `[out]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from partita.core.sharding.cuts import TensorPlan
from partita.errors import ModelError
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.mlx.layers.lora import split_axis
from partita.mlx.model.parts import Ranges, parameter_homes, plan_of, unsplit_modules
from partita.mlx.model.tree import Home
from partita.mlx.weights.names import Box
from partita.mlx.weights.origin import Origin
from partita.training.adapter_files import Side, name_on_disk


def adapters(model: nn.Module) -> list[tuple[Any, Any, nn.Module]]:
    """mlx-lm's adapters on this rank: the parent, the key, and the adapter."""
    found: list[tuple[Any, Any, nn.Module]] = []

    def walk(node: Any) -> None:
        for key, child in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(child, nn.Module) and "lora_a" in child:
                found.append((node, key, child))
            elif isinstance(child, dict | list):
                walk(child)

    walk(model)
    return found


@dataclass(frozen=True)
class AdapterPlaces:
    """The adapters' arrays on this rank, by unsplit name.

    Attributes:
        homes: The module and key of each.
        boxes: The box of each on disk, where it is transposed.
        shapes: The unsplit shape of each.
        held: The ranges that this rank holds.
        owned: The ranges that this rank writes.
    """

    homes: Mapping[str, Home]
    boxes: Mapping[str, tuple[Box, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    held: Mapping[str, Ranges]
    owned: Mapping[str, Ranges]


def adapter_places(model: nn.Module) -> AdapterPlaces:
    """Find the adapters of a split model, in memory and on disk.

    Raises:
        ModelError: Some are neither LoRA nor DoRA of a linear layer, or adapt a layer that is not a single tensor on disk.
    """
    _, groups = plan_of(model)
    kept = {id(adapter) for _, _, adapter in adapters(model)}
    homes = {name: home for name, home in parameter_homes(model).items() if id(home[0]) in kept}
    modules, on_disk = unsplit_modules(model), paths_on_disk(model)
    boxes, shapes, held, owned = {}, {}, {}, {}
    for name, (home, key) in homes.items():
        path = name.rpartition(".")[0]
        if key not in _SIDES or not isinstance(home.get("linear"), nn.Linear | nn.QuantizedLinear):
            raise ModelError(
                f"{name} is not part of a LoRA or DoRA adapter of a linear layer. Only those can be saved."
            )
        cut = _cut(name, tuple(home[key].shape), modules[path], groups)
        boxes[name] = (box_on_disk(name_on_disk(path_on_disk(on_disk, path), _SIDES[key]), cut.shape),)
        shapes[name], held[name], owned[name] = cut.shape, cut.ranges(groups.tp.rank), cut.owned_ranges(groups.tp.rank)
    return AdapterPlaces(homes, boxes, shapes, held, owned)


_SIDES: Mapping[str, Side] = {"lora_a": "A", "lora_b": "B", "m": "m"}


def box_on_disk(name: str, shape: tuple[int, ...]) -> Box:
    """The box of an adapter's array of an unsplit shape, which is stored transposed."""
    start = (0,) * len(shape)
    return Box(name, start, shape, tuple(reversed(range(len(shape)))), start)


def _cut(name: str, shape: tuple[int, ...], layer: nn.Module, groups: ParallelGroups) -> TensorPlan:
    """The `TensorPlan` of an adapter's array, which follows its layer."""
    if groups.tp.size == 1 or not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
        return TensorPlan(name, shape)
    axis = split_axis("column" if isinstance(layer, ColumnParallelLinear) else "row", name.rpartition(".")[2])
    if axis is None:
        return TensorPlan(name, shape)
    return TensorPlan(name, (*shape[:axis], layer.split.size, *shape[axis + 1 :]), axis, layer.split)


def paths_on_disk(model: nn.Module) -> dict[str, str]:
    """Names in the model's checkpoint of modules whose weight is a single tensor there."""
    origin: Origin = model.partita_origin
    found = {}
    for name, boxes in origin.boxes().items():
        there = boxes[0].name if len(boxes) == 1 else ""
        is_whole = bool(there) and math.prod(origin.shape(boxes[0])) == math.prod(boxes[0].shape)
        if is_whole and name.endswith(".weight") and there.endswith(".weight"):
            found[name.removesuffix(".weight")] = there.removesuffix(".weight")
    return found


def path_on_disk(paths: Mapping[str, str], path: str) -> str:
    """The name on disk of a module, among `paths_on_disk`.

    Raises:
        ModelError: Its weight is not a single tensor there.
    """
    if path not in paths:
        raise ModelError(f"{path} is not a single tensor on disk, so its adapter would have no name there.")
    return paths[path]
