"""Gradients over the ranks: summed over replicas, and clipped by the norm of the unsplit model's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.plan import Plan
from partita.core.sharding.split import Split
from partita.mlx.collectives.comm import Communicator, take_range
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.layers.embedding import VocabParallelEmbedding
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.mlx.layers.lora import Style, split_axis
from partita.mlx.model.parts import unsplit_modules
from partita.mlx.model.trainable import Trainable
from partita.mlx.stages.copies import elsewhere

BUCKET_BYTES = 25 << 20
"""Approximate size of the buffers in which replicas exchange gradients."""


_STYLES: Mapping[type[Any], Style] = {
    ColumnParallelLinear: "column",
    RowParallelLinear: "row",
    VocabParallelEmbedding: "vocab",
}


def start_alike(trainable: Trainable, comm: Communicator) -> None:
    """Copy arrays that differ between replicas, such as adapters that mlx-lm sampled, from the first replica."""
    if comm.size == 1:
        return
    # Compare sums instead of the values, which may be large.
    sums = [[mx.sum(array).item(), mx.sum(mx.abs(array)).item()] for array in trainable.arrays]
    told = comm.all_gather_object(sums)
    arrays = list(trainable.arrays)
    for place, array in enumerate(arrays):
        if any(one[place] != told[0][place] for one in told[1:]):
            arrays[place] = comm.broadcast(array)
    trainable.set(arrays)
    mx.eval(arrays)


def sum_over_replicas(gradients: dict[str, mx.array], comm: Communicator) -> None:
    """Sum gradients over the data parallel ranks in place, bucketed, in float32 or wider."""
    if comm.size == 1:
        return
    for names in _buckets(gradients):
        dtype = gradients[names[0]].dtype
        flat = mx.concatenate([gradients[name].reshape(-1) for name in names])
        flat = comm.all_sum(flat if dtype.size >= 4 else flat.astype(mx.float32))
        start = 0
        for name in names:
            shape, size = gradients[name].shape, gradients[name].size
            gradients[name] = flat[start : start + size].reshape(shape).astype(dtype)
            start += size
        mx.eval([gradients[name] for name in names])


def _buckets(gradients: dict[str, mx.array]) -> Iterator[list[str]]:
    by_dtype: dict[str, list[str]] = {}
    for name, gradient in gradients.items():
        by_dtype.setdefault(str(gradient.dtype), []).append(name)
    for same in by_dtype.values():
        bucket: list[str] = []
        size = 0
        for name in same:
            bucket.append(name)
            size += gradients[name].nbytes
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def clip_gradients(
    gradients: dict[str, mx.array], model: nn.Module, plan: Plan, groups: ParallelGroups, clip_norm: float
) -> float:
    """Scale the gradients so that the norm of the unsplit model's gradient is at most `clip_norm`; returns the norm before
    clipping.

    Each element counts once: on the rank that owns it.
    """
    wide = mx.float64 if mx.default_device() == mx.cpu else mx.float32
    modules, others = unsplit_modules(model), elsewhere(model, plan, groups)
    total = mx.zeros((1,), wide)
    for name, gradient in gradients.items():
        if name not in others:
            for part in _owned(name, gradient, plan, modules, groups.tp.rank):
                total = total + mx.square(part.astype(wide)).sum()
    for comm in (groups.tp, groups.pp):
        total = comm.all_sum(total)
    squares: Any = total.item()
    norm = math.sqrt(squares)
    if clip_norm and norm > clip_norm:
        for name in gradients:
            gradients[name] = gradients[name] * (clip_norm / (norm + 1e-6))
    return norm


def _owned(name: str, gradient: mx.array, plan: Plan, modules: dict[str, nn.Module], rank: int) -> Iterator[mx.array]:
    """The parts of a tensor rank's gradient that it owns."""
    axis, split = _cut(name, plan, modules)
    if axis is None or split is None:
        if rank == 0:
            yield gradient
        return
    for start, stop in split.owned_ranges(rank):
        place = split.to_local(rank, start) or 0
        yield take_range(gradient, axis, place, place + stop - start)


def _cut(name: str, plan: Plan, modules: dict[str, nn.Module]) -> tuple[int | None, Split | None]:
    """The axis and the split of a parameter; an adapter's follow its layer."""
    if name in plan.cuts:
        return plan.tensor(name).dim, plan.tensor(name).split
    path, _, attribute = name.rpartition(".")
    layer = modules[path]
    for kind, style in _STYLES.items():
        if isinstance(layer, kind):
            return split_axis(style, attribute), layer.split
    return None, None
