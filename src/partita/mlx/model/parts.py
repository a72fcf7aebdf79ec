"""Where each array of the unsplit model lives in a split one, and which part of what lies packed a cut means."""

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
"""For each dim of an array the ranges that are meant, in local order."""


INNER_NAMES: Mapping[type, str] = {
    **dict.fromkeys((ColumnParallelLinear, RowParallelLinear), "linear"),
    VocabParallelEmbedding: "embedding",
    **dict.fromkeys((EntersRegion, InsideRegion, SplitExperts), "inner"),
}
"""What split layers call the module that they wrap, and that the unsplit model has in their place."""


def parameter_homes(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Where each array of the unsplit model lives: by its unsplit name the module (or list, or dict) and the key.

    The scales and biases of a quantized layer are there under their own names.
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
    """The modules of a split model by the paths that they have in the unsplit one: a split layer, not what it wraps."""
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
    """Whether what a module holds under `key` is what it wraps, whose name the unsplit model has not."""
    return isinstance(node, nn.Module) and key == INNER_NAMES.get(type(node))


def is_packed(home: Any, attribute: str) -> bool:
    """Whether an array is one of those that stand for a quantized weight."""
    return attribute in ("weight", "scales", "biases") and isinstance(home, nn.Module) and is_quantized(home)


def stored_ranges(home: nn.Module, attribute: str, ranges: Ranges) -> Ranges:
    """The ranges of a quantized module's `weight`, `scales` or `biases` that hold those of its weight unpacked.

    Raises:
        PlanError: They part a quantization group.
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
        raise ModelError("this model was not split by Partita. Make it with partita.mlx.load() or partita.mlx.shard().")
    return plan, groups


def local_ranges(
    home: Any, attribute: str, name: str, plan: Plan, tp_rank: int, *, owned: bool = False
) -> Ranges | None:
    """Which ranges of an array, as it is stored unsplit, a tensor rank holds; None for all of it.

    Args:
        home: The module that holds it.
        attribute: Its name there.
        name: Its name in the unsplit model.
        plan: How the model is split.
        tp_rank: The rank.
        owned: Whether only what it owns is meant: over all tensor ranks every element once.
    """
    packed = is_packed(home, attribute)
    cut = plan.tensor(f"{name.rpartition('.')[0]}.weight" if packed else name)
    if cut.split is None:
        return None if tp_rank == 0 or not owned else ((),) * home[attribute].ndim
    ranges = cut.owned_ranges(tp_rank) if owned else cut.ranges(tp_rank)
    return stored_ranges(home, attribute, ranges) if packed else ranges


def take(array: mx.array, ranges: Ranges | None) -> mx.array:
    """`ranges` of an array."""
    for dim, (ranges_of_dim, size) in enumerate(zip(ranges or (), array.shape, strict=False)):
        if ranges_of_dim != ((0, size),):
            array = slice_array(array, dim, ranges_of_dim)
    return array


def main_output(output: Any) -> mx.array:
    """The logits among what a model returns."""
    found = output[0] if isinstance(output, (tuple, list)) else getattr(output, "logits", output)
    assert isinstance(found, mx.array)
    return found
