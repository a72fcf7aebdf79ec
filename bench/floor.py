"""The floor: a Llama decoder layer split by hand, with a bare all_reduce in the four places that need one.

    place                     forward             backward
    after a norm (`_Enter`)   as it is            all_reduce of the gradient
    after o_proj, down_proj   all_reduce          as it is

Nothing is checked, kept general or copied, so no split of this layer over these ranks can do with less.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        dist.all_reduce(grad)
        return grad


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _RowLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Leave.apply(F.linear(x, self.weight))


def split_by_hand(layer: nn.Module) -> None:
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
            setattr(module, name, split)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.__class__ = _entering(type(norm))


def _entering(norm: type[nn.Module]) -> type[nn.Module]:
    class EnteringNorm(norm):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor) -> Tensor:
            return _Enter.apply(super().forward(x))

    return EnteringNorm
