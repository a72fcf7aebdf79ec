"""Collectives with gradients: they move arrays into and out of a region in which each rank computes its part.

Every mapping's backward is another mapping of this module, so gradients of any order are correct. An array is
*replicated* (the same on every rank, and its gradient too), *split* (each rank has its part), or *partial*
(its value is the sum over the ranks):

    mapping            forward                     backward
    copy_to            replicated -> replicated    sum of the ranks' gradients
    reduce_from        partial -> replicated       the gradient as it is
    scatter_to         replicated -> split         gather
    gather_from        split -> replicated         scatter
    all_gather         split -> replicated*        reduce-scatter
    reduce_scatter     partial -> split            all-gather
    copy_shared        copies -> copies            sum over the copies of an element

    * replicated in value; its gradients are partial, which is how sequence parallelism enters a region.

MLX's own `all_gather` would take this rank's part of a partial gradient and lose the rest; `mx.distributed.send` has no
gradient, and `recv` is treated as a constant: a pipeline sends gradients back explicitly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from partita.core.sharding.split import Split
from partita.errors import DistributedError
from partita.mlx.collectives.comm import Communicator, take_range

Sizes = Sequence[int] | None
Map = Callable[[mx.array], mx.array]


def copy_to(x: mx.array, comm: Communicator) -> mx.array:
    """Enter a split region: forward as it is, backward sums the gradient over the ranks. Shape `(*)` to `(*)`."""
    return x if comm.size == 1 else _mapping(x, lambda x: x, lambda grad: reduce_from(grad, comm))


def reduce_from(x: mx.array, comm: Communicator) -> mx.array:
    """Leave a split region: forward sums over the ranks, backward as it is. Shape `(*)` to `(*)`."""
    return x if comm.size == 1 else _mapping(x, comm.all_sum, lambda grad: copy_to(grad, comm))


def scatter_to(x: mx.array, comm: Communicator, axis: int = -1, sizes: Sizes = None) -> mx.array:
    """Take each rank's part: `[..., sum(sizes), ...]` to `[..., sizes[rank], ...]`. Backward gathers."""
    if comm.size == 1:
        return x
    counts = _whole_sizes(x, comm, axis, sizes)
    start = sum(counts[: comm.rank])
    return _mapping(
        x,
        lambda x: take_range(x, axis, start, start + counts[comm.rank]),
        lambda grad: gather_from(grad, comm, axis, counts),
    )


def gather_from(x: mx.array, comm: Communicator, axis: int = -1, sizes: Sizes = None) -> mx.array:
    """Concatenate the parts: `[..., sizes[rank], ...]` to `[..., sum(sizes), ...]`. Backward takes this rank's part."""
    if comm.size == 1:
        return x
    axis, counts = axis % x.ndim, _part_sizes(x, comm, axis, sizes)
    return _gathering(x, comm, axis, counts, lambda grad: scatter_to(grad, comm, axis, counts))


def all_gather(x: mx.array, comm: Communicator, axis: int = 0, sizes: Sizes = None) -> mx.array:
    """Enter a region from a sequence shard: `[..., sizes[rank], ...]` to `[..., sum(sizes), ...]`. Backward reduce-scatters."""
    if comm.size == 1:
        return x
    axis, counts = axis % x.ndim, _part_sizes(x, comm, axis, sizes)
    return _gathering(x, comm, axis, counts, lambda grad: reduce_scatter(grad, comm, axis, counts))


def reduce_scatter(x: mx.array, comm: Communicator, axis: int = 0, sizes: Sizes = None) -> mx.array:
    """Leave a region to a sequence shard: `[..., sum(sizes), ...]` to `[..., sizes[rank], ...]`. Backward all-gathers."""
    if comm.size == 1:
        return x
    counts = _whole_sizes(x, comm, axis, sizes)
    return _mapping(
        x, lambda x: comm.reduce_scatter(x, axis, counts), lambda grad: all_gather(grad, comm, axis, counts)
    )


def copy_shared(x: mx.array, comm: Communicator, split: Split, axis: int = 0) -> mx.array:
    """Use a part that other ranks hold copies of: backward sums the gradients of each element over the ranks that hold it.

    Weights of KV heads that several ranks hold use it. Shape `[..., split.local_size(rank), ...]` to the
    same. Every rank must call it, even one that shares nothing.
    """
    if comm.size == 1 or split.is_partition:
        return x
    return _mapping(x, lambda x: x, lambda grad: _sum_shared(grad, comm, split, axis))


def _sum_shared(grad: mx.array, comm: Communicator, split: Split, axis: int) -> mx.array:
    order = mx.array([i for start, stop in split.ranges(comm.rank) for i in range(start, stop)])

    def laid_out_and_summed(grad: mx.array) -> mx.array:
        rows = mx.moveaxis(grad, axis, 0)
        whole = mx.zeros((split.size, *rows.shape[1:]), rows.dtype).at[order].add(rows)
        return mx.moveaxis(comm.all_sum(whole)[order], 0, axis)

    return _mapping(grad, laid_out_and_summed, lambda grad: copy_shared(grad, comm, split, axis))


def _mapping(x: mx.array, forward: Map, backward: Map) -> mx.array:
    """`forward(x)`, whose gradient is `backward` of the incoming one."""
    function: Any = mx.custom_function(forward)
    function.vjp(lambda primal, cotangent, output: backward(cotangent))
    return function(x)


def _gathering(x: mx.array, comm: Communicator, axis: int, sizes: tuple[int, ...], backward: Map) -> mx.array:
    """The ranks' parts along `axis`, which counts from the front."""
    function: Any = mx.custom_function(lambda x: comm.all_gather(x, axis, sizes))
    function.vjp(lambda primal, cotangent, output: backward(cotangent))

    # MLX's own rule would concatenate the ranks' parts along the mapped axis.
    function.vmap(lambda x, mapped: (function(mx.moveaxis(x, mapped, -1)), x.ndim - 1))
    return function(x)


def _whole_sizes(x: mx.array, comm: Communicator, axis: int, sizes: Sizes) -> tuple[int, ...]:
    counts = tuple(sizes) if sizes is not None else comm.even_sizes(x.shape[axis])
    if len(counts) != comm.size or sum(counts) != x.shape[axis] or min(counts) < 0:
        raise DistributedError(
            f"sizes must be {comm.size} numbers that add up to {x.shape[axis]} (axis {axis}), but are {counts}."
        )
    return counts


def _part_sizes(x: mx.array, comm: Communicator, axis: int, sizes: Sizes) -> tuple[int, ...]:
    counts = tuple(sizes) if sizes is not None else (x.shape[axis],) * comm.size
    if len(counts) != comm.size or counts[comm.rank] != x.shape[axis]:
        raise DistributedError(
            f"sizes must be {comm.size} numbers, and rank {comm.rank}'s {x.shape[axis]} (axis {axis}), but are {counts}."
        )
    return counts
