"""The floor: a Llama decoder layer split by hand, with a bare sum in the four places that need one.

    place                     forward    backward
    after a norm (`_Enter`)   as it is   sum of the gradient
    after o_proj, down_proj   sum        as it is

Nothing is checked, kept general or copied, so no split of this layer over these ranks can do with less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

Sum = Callable[[Tensor], object]
"""Sums a contiguous tensor over all ranks in place."""


def open_mpi_sum() -> Sum:
    """mpi4py's Allreduce, and nothing around it but what names the memory."""
    from mpi4py import MPI

    all_reduce, in_place, memory, total, kind = (
        MPI.COMM_WORLD.Allreduce, MPI.IN_PLACE, MPI.memory.fromaddress, MPI.SUM, MPI.FLOAT,
    )  # fmt: skip

    def sum_(x: Tensor) -> None:
        count = x.numel()
        all_reduce(in_place, (memory(x.data_ptr(), 4 * count), count, kind), total)

    return sum_


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sum_: Sum) -> Tensor:
        ctx.sum_ = sum_
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.sum_(grad)
        return grad, None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sum_: Sum) -> Tensor:
        ctx.mark_dirty(x)
        sum_(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _RowLinear(nn.Linear):
    sum_: Sum

    def forward(self, x: Tensor) -> Tensor:
        return _Leave.apply(F.linear(x, self.weight), self.sum_)


def split_by_hand(layer: nn.Module, sum_: Sum) -> None:
    """Split `layer`, a `LlamaDecoderLayer` without biases, in place over all ranks, which must divide it evenly."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for module in (layer.self_attn, layer.mlp):
        for name, linear in list(module.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            row = name in ("o_proj", "down_proj")
            local = linear.weight.detach().chunk(size, 1 if row else 0)[rank].clone()
            split = (_RowLinear if row else nn.Linear)(local.shape[1], local.shape[0], bias=False)
            split.weight = nn.Parameter(local)
            split.sum_ = sum_
            setattr(module, name, split)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.__class__ = _entering(type(norm), sum_)


def _entering(norm: type[nn.Module], sum_: Sum) -> type[nn.Module]:
    class EnteringNorm(norm):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor) -> Tensor:
            return _Enter.apply(super().forward(x), sum_)

    return EnteringNorm
