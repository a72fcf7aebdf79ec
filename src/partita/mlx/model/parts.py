"""Where each array of the unsplit model is stored in a split one, and which part of a packed array a split selects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.plan import Plan
from partita.core.sharding.split import Range
from partita.errors import ModelError
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.layers.embedding import VocabParallelEmbedding
from partita.mlx.layers.inner import PACKED_BITS, check_groups, is_quantized, quantization_unit, slice_array
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.mlx.layers.region_parts import EntersRegion, InsideRegion, SplitExperts
from partita.mlx.model.tree import children

Ranges = tuple[tuple[Range, ...], ...]
"""Ranges of each dim of an array, in local order."""


INNER_NAMES: Mapping[type, str] = {
    **dict.fromkeys((ColumnParallelLinear, RowParallelLinear), "linear"),
    VocabParallelEmbedding: "embedding",
    **dict.fromkeys((EntersRegion, InsideRegion, SplitExperts), "inner"),
}
"""Attribute names under which split layers store the wrapped module of the unsplit model."""


def parameter_homes(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Where each array of the unsplit model is stored: maps its unsplit name to the module (or list, or dict) and the key.

    The scales and biases of a quantized layer have their own entries.
    """
    homes: dict[str, tuple[Any, Any]] = {}

    def walk(node: Any, path: str) -> None:
        for key, child in children(node):
            if isinstance(child, mx.array):
                homes[f"{path}{key}"] = (node, key)
            else:
                walk(child, path if _is_inner(node, key) else f"{path}{key}.")

    walk(model, "")
    return homes


def unsplit_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a split model by unsplit path; a split layer stands for the module that it wraps."""
    found: dict[str, nn.Module] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, nn.Module):
            found.setdefault(path, node)
        for key, child in children(node):
            if isinstance(child, (dict, list)):
                walk(child, path if _is_inner(node, key) else f"{path}.{key}" if path else str(key))

    walk(model, "")
    return found


def _is_inner(node: Any, key: Any) -> bool:
    """Whether `key` of a module holds the wrapped module, so that the unsplit model lacks its name."""
    return isinstance(node, nn.Module) and key == INNER_NAMES.get(type(node))


def is_packed(home: Any, attribute: str) -> bool:
    """Whether an array is part of a quantized weight."""
    return attribute in ("weight", "scales", "biases") and isinstance(home, nn.Module) and is_quantized(home)


def stored_ranges(home: nn.Module, attribute: str, ranges: Ranges) -> Ranges:
    """The ranges of a quantized module's `weight`, `scales` or `biases` for ranges of its unpacked weight.

    Raises:
        PlanError: The ranges divide a quantization group.
    """
    unit = quantization_unit(home)
    check_groups(ranges[-1], unit)
    by, over = (int(home.bits), PACKED_BITS) if attribute == "weight" else (1, unit)
    return (*ranges[:-1], tuple((start * by // over, stop * by // over) for start, stop in ranges[-1]))


def plan_of(model: nn.Module) -> tuple[Plan, ParallelGroups]:
    """The plan and groups of a model that `load` or `shard` returned.

    Raises:
        ModelError: The model was not split by them.
    """
    plan, groups = getattr(model, "partita_plan", None), getattr(model, "partita_groups", None)
    if not isinstance(plan, Plan) or not isinstance(groups, ParallelGroups):
        raise ModelError("this model was not split by Partita. Use partita.mlx.load() or partita.mlx.shard().")
    return plan, groups


def local_ranges(
    home: Any, attribute: str, name: str, plan: Plan, tp_rank: int, *, owned: bool = False
) -> Ranges | None:
    """The ranges of an unsplit array that a tensor rank holds; None for all of it.

    Args:
        home: The module that holds the array.
        attribute: Its attribute name.
        name: Its name in the unsplit model.
        plan: How the model is split.
        tp_rank: The tensor rank.
        owned: Whether to return only owned ranges, which cover every element once over all tensor ranks.
    """
    packed = is_packed(home, attribute)
    cut = plan.tensor(f"{name.rpartition('.')[0]}.weight" if packed else name)
    if cut.split is None:
        return None if tp_rank == 0 or not owned else ((),) * home[attribute].ndim
    ranges = cut.owned_ranges(tp_rank) if owned else cut.ranges(tp_rank)
    return stored_ranges(home, attribute, ranges) if packed else ranges


def take(array: mx.array, ranges: Ranges | None) -> mx.array:
    """Select `ranges` of an array."""
    for dim, (ranges_of_dim, size) in enumerate(zip(ranges or (), array.shape, strict=False)):
        if ranges_of_dim != ((0, size),):
            array = slice_array(array, dim, ranges_of_dim)
    return array


def main_output(output: Any) -> mx.array:
    """The logits in a model's output."""
    found = output[0] if isinstance(output, (tuple, list)) else getattr(output, "logits", output)
    assert isinstance(found, mx.array)
    return found
