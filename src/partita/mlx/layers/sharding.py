"""`shard_linear` and `shard_inplace`, like MLX's: convert a linear layer to a split one, or split any module's parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from partita.errors import PlanError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.groups import as_communicator
from partita.mlx.layers.inner import dense_width, is_quantized, quantization_unit, slice_array, slice_parameter
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear, paired_unit
from partita.mlx.layers.segments import Segments, segment_split
from partita.mlx.layers.sharded import (
    AllToShardedLinear,
    Group,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)

Sharding = Literal["all-to-sharded", "sharded-to-all"]
Predicate = Callable[[str, mx.array], int | tuple[int, Segments] | None]


def shard_linear(
    module: nn.Module,
    sharding: Sharding,
    *,
    segments: Segments = 1,
    sizes: Sequence[int] | None = None,
    group: Group = None,
) -> ColumnParallelLinear | RowParallelLinear:
    """A new layer with this rank's part of a linear layer, which communicates in forward or backward.

    Args:
        module: An `nn.Linear` or `nn.QuantizedLinear`; it is not modified.
        sharding: `all-to-sharded`: from the full input each rank computes some outputs. `sharded-to-all`: from some
            inputs per rank, every rank gets all outputs.
        segments: Fused segments of the split dimension; see `AllToShardedLinear.from_linear`.
        sizes: Size of each rank's part (default: equal parts).
        group: The ranks (default: all ranks of the run).

    Raises:
        ModelError: The layer's class cannot be split.
        PlanError: The segments or sizes do not fit, or `sharding` is neither.
    """
    column = _is_column(sharding)
    if is_quantized(module):
        quantized = QuantizedAllToShardedLinear if column else QuantizedShardedToAllLinear
        return quantized.from_quantized_linear(module, segments=segments, sizes=sizes, group=group)
    plain = AllToShardedLinear if column else ShardedToAllLinear
    return plain.from_linear(module, segments=segments, sizes=sizes, group=group)


def shard_inplace(
    module: nn.Module, sharding: Sharding | Predicate, *, segments: Segments = 1, group: Group = None
) -> None:
    """Reduce every parameter of a module to this rank's part. The module's class stays the same; it does not communicate.

    The first rank keeps the bias of a `sharded-to-all` module; the others get zeros that are not trained: the
    outputs are partial, and the caller's sum over the ranks must contain the bias once.

    Args:
        module: Any module with parameters; `weight [..., outputs, inputs]`, plain or quantized.
        sharding: As in `shard_linear`, or a function that maps a parameter's path to the axis to split, the
            axis and its segments, or None to keep it unsplit.
        segments: Fused segments of the split dimension, if `sharding` is a name.
        group: The ranks (default: all ranks of the run).

    Raises:
        PlanError: A parameter cannot be split this way.
    """
    comm = as_communicator(group)
    where = sharding if callable(sharding) else _named(sharding, segments)
    owners = dict(module.named_modules())
    parts = []
    for path, parameter in tree_flatten(module.parameters()):
        cut = where(path, parameter)
        if cut is None:
            continue
        axis, fused = cut if isinstance(cut, tuple) else (cut, 1)
        if not -parameter.ndim <= axis < parameter.ndim:
            raise PlanError(f"{path} has {parameter.ndim} axes, but sharding returns axis {axis} for it.")
        prefix, _, name = path.rpartition(".")
        parts.append((path, _part(owners.get(prefix), name, parameter, axis, fused, comm)))
    module.update(tree_unflatten(parts))
    if not callable(sharding) and not _is_column(sharding) and comm.rank > 0:
        _silence_biases(owners.values())


def _part(
    owner: nn.Module | None, name: str, parameter: mx.array, axis: int, segments: Segments, comm: Communicator
) -> mx.array:
    """This rank's part of a parameter; of a quantized weight and its scales the same outputs or inputs."""
    from_behind = axis % parameter.ndim - parameter.ndim
    unit: Callable[[Sequence[int]], int] = lambda lengths: 1  # noqa: E731
    if owner is not None and is_quantized(owner) and name in ("weight", "scales", "biases", "bias"):
        if name != "bias" and from_behind == -1:
            group = quantization_unit(owner)
            split = segment_split(dense_width(owner), comm.size, segments, None, lambda lengths: group)
            return slice_parameter(owner, name, "inputs", split.ranges(comm.rank))
        if from_behind == (-1 if name == "bias" else -2):
            unit = functools.partial(paired_unit, owner, parts=comm.size)
    split = segment_split(parameter.shape[axis], comm.size, segments, None, unit)
    return slice_array(parameter, axis, split.ranges(comm.rank))


def _silence_biases(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if "bias" in module and "weight" in module:
            module["bias"] = mx.zeros_like(module["bias"])
            module.freeze(recurse=False, keys="bias")


def _is_column(sharding: str) -> bool:
    if sharding not in ("all-to-sharded", "sharded-to-all"):
        raise PlanError(f"sharding must be 'all-to-sharded' or 'sharded-to-all'; got {sharding!r}.")
    return sharding == "all-to-sharded"


def _named(sharding: str, segments: Segments) -> Predicate:
    if _is_column(sharding):
        return lambda path, x: (-1 if path.endswith("bias") else max(x.ndim - 2, 0), segments)
    return lambda path, x: None if path.endswith("bias") else (-1, segments)
