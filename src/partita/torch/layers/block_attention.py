"""Attention of some rows to some keys, with its log-sum-exp, by which parts of an attention are merged.

`plain` is matrix products and a softmax. A fused kernel of torch is used where it computes the same as `plain` on a small
block, which is measured once for each kind of tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]
"""The output `[n, heads, rows, width]` and its log-sum-exp `[n, heads, rows]`."""

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value."""

TILE = 512
"""Rows of a block where its scores are in memory."""

_HIDDEN = -1e30
"""Added to the score of a hidden key: its share is 0 as soon as a row sees any other, and finite numbers stay finite."""

_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference of a fused kernel, relative to the largest magnitude."""


@dataclass(frozen=True)
class Kernel:
    """How blocks are computed.

    Attributes:
        forward: Called with query `[n, heads, rows, width]`, key, value `[n, kv heads, keys, width]`, whether row i sees keys
            0..i only, the visible pairs `[rows, keys]` or `[n or 1, 1, rows, keys]` or None, and the scale of scores.
        backward: Called with the output's gradient, query, key, value, the output and log-sum-exp of the attention to all
            keys, and the last three arguments of `forward`.
        tile: Most rows of a block (default: any).
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool, Tensor | None, float], Result]
    backward: Callable[..., Gradients]
    tile: int | None = None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which parts are merged."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kernel_of(query: Tensor, key: Tensor, value: Tensor) -> Kernel:
    """The fastest kernel that is correct for tensors like these."""
    groups = query.shape[1] // key.shape[1]
    return _kernel(query.device.type, query.dtype, query.shape[-1], value.shape[-1], groups)


def visible_pairs(rows: int, keys: int, shift: int, window: int, device: torch.device) -> Tensor:
    """`[rows, keys]`: whether row i sees key j, which it does if 0 <= `shift` + i - j < `window`."""
    distance = shift + torch.arange(rows, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


@functools.cache
def _kernel(device: str, dtype: torch.dtype, width: int, value_width: int, groups: int) -> Kernel:
    fused = {"cpu": CPU_FLASH, "cuda": CUDA_FLASH}.get(device)
    if (
        fused is not None
        and width == value_width
        and dtype in _TOLERANCES
        and _equals_plain(fused, device, dtype, width, groups)
    ):
        return fused
    return PLAIN


def _equals_plain(kernel: Kernel, device: str, dtype: torch.dtype, width: int, groups: int) -> bool:
    """Whether a kernel computes what `PLAIN` does, also where the log-sum-exp is of more keys than those of the block."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn((2, heads, 24, width), generator=generator, dtype=torch.float64).to(device, dtype)

    query, key, value, grad = random(2 * groups), random(2), random(2), random(2 * groups)
    scale = 1 / math.sqrt(width)
    mask = visible_pairs(24, 24, 3, 9, query.device)
    each = torch.stack([mask, mask.flip(1)])[:, None]
    for causal, visible in ((True, None), (False, None), (False, mask), (False, each)):
        output, lse = PLAIN.forward(query, key, value, causal, visible, scale)
        output, more = output.to(dtype), lse + 0.5
        try:
            theirs = (
                *kernel.forward(query, key, value, causal, visible, scale),
                *kernel.backward(grad, query, key, value, output, more, causal, visible, scale),
            )
        except (RuntimeError, NotImplementedError, AttributeError, TypeError):
            return False
        ours = output, lse, *PLAIN.backward(grad, query, key, value, output, more, causal, visible, scale)
        for one, other in zip(theirs, ours, strict=True):
            error = (one.double() - other.double()).abs().max() / other.double().abs().max()
            if one.shape != other.shape or not float(error) <= _TOLERANCES[dtype]:
                return False
    return True


# --- matrix products and a softmax ------------------------------------------------------------------------------------


def _scores(query: Tensor, key: Tensor, causal: bool, visible: Tensor | None, scale: float) -> Tensor:
    """`[n, kv heads, query heads of each, rows, keys]`."""
    scores: Tensor = (query * scale) @ key[:, :, None].mT
    if causal:
        visible = visible_pairs(query.shape[-2], key.shape[-2], 0, key.shape[-2], query.device)
    if visible is not None and visible.dim() == 4:
        visible = visible[:, :, None]
    hidden: Tensor = scores if visible is None else scores.masked_fill(~visible, _HIDDEN)
    return hidden


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    grouped: Tensor = query.to(wide(query.dtype)).unflatten(1, (key.shape[1], -1))
    return grouped


def _plain_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, visible: Tensor | None, scale: float
) -> Result:
    grouped, key, value = _grouped(query, key), key.to(wide(key.dtype)), value.to(wide(value.dtype))
    scores = _scores(grouped, key, causal, visible, scale)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ value[:, :, None]).flatten(1, 2), lse.flatten(1, 2)


def _plain_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    causal: bool, visible: Tensor | None, scale: float,
) -> Gradients:  # fmt: skip
    grouped, grad, output = (_grouped(one, key) for one in (query, grad, output))
    key, value = key.to(wide(key.dtype)), value.to(wide(value.dtype))
    lse = lse.unflatten(1, (key.shape[1], -1))
    share = (_scores(grouped, key, causal, visible, scale) - lse[..., None]).exp()
    value_grad = (share.mT @ grad).sum(2)
    scores_grad = share * (grad @ value[:, :, None].mT - (grad * output).sum(-1, keepdim=True)) * scale
    return (scores_grad @ key[:, :, None]).flatten(1, 2), (scores_grad.mT @ grouped).sum(2), value_grad


PLAIN = Kernel(_plain_forward, _plain_backward, TILE)


# --- fused kernels ----------------------------------------------------------------------------------------------------


def _added(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores."""
    if visible is None:
        return None
    hidden = max(_HIDDEN, torch.finfo(dtype).min / 2)
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, hidden)


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, visible: Tensor | None, scale: float
) -> Result:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse = attend(query, key, value, 0.0, causal, attn_mask=_added(visible, query.dtype), scale=scale)
    return output, lse


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    causal: bool, visible: Tensor | None, scale: float,
) -> Gradients:  # fmt: skip
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mask = _added(visible, query.dtype)
    # The kernel reads the log-sum-exp in the memory order that its forward returns.
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    found: Any = attend(grad, query, key, value, output, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return found[0], found[1], found[2]


CPU_FLASH = Kernel(_cpu_forward, _cpu_backward)


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _cuda_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, visible: Tensor | None, scale: float
) -> Result:
    if visible is not None:
        return _plain_forward(query, key, value, causal, visible, scale)
    key, value = (_repeated(one, query.shape[1]) for one in (key, value))
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def _cuda_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    causal: bool, visible: Tensor | None, scale: float,
) -> Gradients:  # fmt: skip
    if visible is not None:
        return _plain_backward(grad, query, key, value, output, lse, causal, visible, scale)
    shape = key.shape
    key, value = (_repeated(one, query.shape[1]) for one in (key, value))
    unused = torch.zeros((), dtype=torch.int64, device=query.device)
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, output, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal,
        unused, unused, scale=scale,
    )  # fmt: skip
    key_grad, value_grad = (one.unflatten(1, (shape[1], -1)).sum(2) for one in found[1:3])
    return found[0], key_grad, value_grad


CUDA_FLASH = Kernel(_cuda_forward, _cuda_backward)
