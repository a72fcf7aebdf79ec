"""Collectives with gradients: they move tensors into and out of a region in which each rank computes its part.

Every mapping's backward is another mapping of this module, so gradients of any order are correct. A tensor is
*replicated* (the same on every rank, and its gradient too), *split* (each rank has its part), or *partial*
(its value is the sum over the ranks):

    mapping            forward                     backward
    copy_to            replicated -> replicated    sum of the ranks' gradients
    reduce_from        partial -> replicated       the gradient as it is
    scatter_to         replicated -> split         gather
    gather_from        split -> replicated         scatter
    all_gather         split -> replicated*        reduce-scatter
    reduce_scatter     partial -> split            all-gather
    exchange           split -> split              exchange in the other direction

    * replicated in value; its gradients are partial, which is how sequence parallelism enters a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from partita.errors import DistributedError
from partita.torch.collectives.comm import Communicator

Sizes = Sequence[int] | None


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            # The usual case, no second-order gradient: no autograd node and no context.
            return ctx.comm.all_reduce_(grad.clone(memory_format=torch.contiguous_format)), None
        return _Reduce.apply(grad, ctx.comm, dist.ReduceOp.SUM), None


class _CopyOnce(Function):
    """Averages gradients or takes their maximum. This is not the gradient of a sum, so the second-order gradient raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, op: Any) -> Tensor:
        ctx.comm, ctx.op = comm, op
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.comm.all_reduce_(grad.clone(memory_format=torch.contiguous_format), ctx.op), None, None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, op: Any) -> Tensor:
        ctx.comm, ctx.op = comm, op
        result = comm.all_reduce_(x.clone(memory_format=torch.contiguous_format), op)
        if op in (dist.ReduceOp.MAX, dist.ReduceOp.MIN):
            ctx.save_for_backward(x == result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.op == dist.ReduceOp.SUM:
            return _Copy.apply(grad, ctx.comm), None, None
        if ctx.op == dist.ReduceOp.AVG:
            return _Copy.apply(grad, ctx.comm) / ctx.comm.size, None, None
        # As torch.amax does, ranks that tie for the extremum share its gradient.
        (mine,) = ctx.saved_tensors
        ties = ctx.comm.all_reduce_(mine.to(grad.dtype))
        return _Copy.apply(grad, ctx.comm) * mine / ties, None, None


class _ReduceInPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        ctx.mark_dirty(x)
        return comm.all_reduce_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad if not torch.is_grad_enabled() else _Copy.apply(grad, ctx.comm)), None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.args = comm, dim, sizes
        return x.narrow(dim, sum(sizes[: comm.rank]), sizes[comm.rank]).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.apply(grad, *ctx.args), None, None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.args = comm, dim, sizes
        return comm.all_gather(x, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Scatter.apply(grad, *ctx.args), None, None, None


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.args = comm, dim, sizes
        return comm.all_gather(x, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ReduceScatter.apply(grad, *ctx.args), None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.args = comm, dim, sizes
        return comm.reduce_scatter(x, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllGather.apply(grad, *ctx.args), None, None, None


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, comm: Communicator, sizes: Sizes, received: Sizes, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert sizes is not None
        assert received is not None
        ctx.args = comm, sizes, received
        return tuple(comm.all_to_all(tensor, sizes, received) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        comm, sizes, received = ctx.args
        return None, None, None, *_Exchange.apply(comm, received, sizes, *grads)


def copy_to(x: Tensor, comm: Communicator, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Enter a split region: forward as it is, backward reduces the gradient over the ranks. Shape `(*)` to `(*)`.

    Second-order gradients are correct for SUM and raise for the other reductions.
    """
    if comm.size == 1:
        return x
    entered: Tensor = _Copy.apply(x, comm) if check_op(op) == dist.ReduceOp.SUM else _CopyOnce.apply(x, comm, op)
    return entered


def reduce_from(x: Tensor, comm: Communicator, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Leave a split region: forward reduces over the ranks, backward as it is. Shape `(*)` to `(*)`; `x` is not changed."""
    return x if comm.size == 1 else _Reduce.apply(x, comm, check_op(op))


def reduce_from_(x: Tensor, comm: Communicator) -> Tensor:
    """`reduce_from` in the memory of `x`, which nothing else may use: the new output of a linear layer."""
    if comm.size == 1:
        return x
    if torch.compiler.is_compiling() or not x.is_contiguous():
        # A compiler decides itself which memory it reuses.
        return reduce_from(x, comm)
    return _ReduceInPlace.apply(x, comm)  # type: ignore[no-any-return]


def scatter_to(x: Tensor, comm: Communicator, dim: int = -1, sizes: Sizes = None) -> Tensor:
    """Take each rank's part: `[..., sum(sizes), ...]` to `[..., sizes[rank], ...]`. Backward gathers."""
    return x if comm.size == 1 else _Scatter.apply(x, comm, dim, whole_sizes(x, comm, dim, sizes))


def gather_from(x: Tensor, comm: Communicator, dim: int = -1, sizes: Sizes = None) -> Tensor:
    """Concatenate the parts: `[..., sizes[rank], ...]` to `[..., sum(sizes), ...]`. Backward takes this rank's part."""
    return x if comm.size == 1 else _Gather.apply(x, comm, dim, part_sizes(x, comm, dim, sizes))


def all_gather(x: Tensor, comm: Communicator, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """Enter a region from a sequence shard: `[..., sizes[rank], ...]` to `[..., sum(sizes), ...]`. Backward reduce-scatters."""
    return x if comm.size == 1 else _AllGather.apply(x, comm, dim, part_sizes(x, comm, dim, sizes))


def reduce_scatter(x: Tensor, comm: Communicator, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """Leave a region to a sequence shard: `[..., sum(sizes), ...]` to `[..., sizes[rank], ...]`. Backward all-gathers."""
    return x if comm.size == 1 else _ReduceScatter.apply(x, comm, dim, whole_sizes(x, comm, dim, sizes))


def exchange(
    tensors: Sequence[Tensor], comm: Communicator, sizes: Sequence[int], received: Sequence[int]
) -> tuple[Tensor, ...]:
    """Send rows of each tensor to every rank: each `[sum(sizes), ...]` to `[sum(received), ...]`, both in rank order.

    Several tensors in one call, so that all ranks exchange their gradients in the same order. Backward sends them back.
    """
    return tuple(tensors) if comm.size == 1 else _Exchange.apply(comm, tuple(sizes), tuple(received), *tensors)


def check_op(op: Any) -> Any:
    """Return `op`. Raises `DistributedError` if its gradient is not defined."""
    if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
        raise DistributedError(f"op must be SUM, AVG, MAX or MIN, whose gradients are defined; got {op}.")
    return op


def whole_sizes(x: Tensor, comm: Communicator, dim: int, sizes: Sizes) -> tuple[int, ...]:
    """Size of each rank's part of dimension `dim` of the unsplit `x`. Raises `DistributedError` if `sizes` do not fit."""
    sizes = tuple(sizes) if sizes is not None else comm.even_sizes(x.shape[dim])
    if len(sizes) != comm.size or sum(sizes) != x.shape[dim] or min(sizes) < 0:
        raise DistributedError(
            f"sizes must be {comm.size} numbers that add up to {x.shape[dim]} (dim {dim}), but are {sizes}."
        )
    return sizes


def part_sizes(x: Tensor, comm: Communicator, dim: int, sizes: Sizes) -> tuple[int, ...]:
    """Size of each rank's part of dimension `dim`; `x` is this rank's. Raises `DistributedError` if `sizes` do not fit."""
    sizes = tuple(sizes) if sizes is not None else (x.shape[dim],) * comm.size
    if len(sizes) != comm.size or sizes[comm.rank] != x.shape[dim]:
        raise DistributedError(
            f"sizes must be {comm.size} numbers, and rank {comm.rank}'s {x.shape[dim]} (dim {dim}), but are {sizes}."
        )
    return sizes
