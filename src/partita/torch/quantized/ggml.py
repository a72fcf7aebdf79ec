"""The blocks of ggml as values, on any device: vectorized over blocks.

A block holds its scales, most of them float16, and its codes. In most types the elements in the low halves of bytes come before
those in the high halves. The values equal those of gguf-py's `quants.dequantize` to the last bit.
Source: ggml-quants.c, `dequantize_row_*`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from partita.checkpoint.gguf.file import BLOCKS

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of E2M1."""


def decode(codes: Tensor, kind: str) -> Tensor:
    """The values of rows of blocks: uint8 `[rows, bytes]` to float32 `[rows, elements]`."""
    _, size = BLOCKS[kind]
    values = _DECODERS[kind](codes.reshape(-1, size))
    return values.reshape(codes.shape[0], -1)


def _half(blocks: Tensor, start: int) -> Tensor:
    """A float16 of each block, `[blocks, 1]`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def _fields(data: Tensor, shifts: Sequence[int], width: int, mask: int) -> Tensor:
    """Parts of bytes: of each `width` bytes first all at the first shift, then all at the next: `[blocks, -1]`."""
    grouped = data.reshape(data.shape[0], -1, 1, width)
    shift = torch.tensor(shifts, dtype=torch.uint8, device=data.device).view(1, 1, -1, 1)
    return ((grouped >> shift) & mask).view(data.shape[0], -1)


def _nibbles(data: Tensor, width: int) -> Tensor:
    return _fields(data, (0, 4), width, 15)


def _bits(data: Tensor) -> Tensor:
    """The bits of four bytes, lowest first: `[blocks, 32]`."""
    shift = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[:, :, None] >> shift) & 1).view(data.shape[0], -1)


def _picked(indexes: Tensor, table: Sequence[int]) -> Tensor:
    values = torch.tensor(table, dtype=torch.float32, device=indexes.device)
    # On CPUs this takes a fifth of the time of values[indexes].
    return values.index_select(0, indexes.reshape(-1).int()).view(indexes.shape)


def _grouped(scales: Tensor, codes: Tensor) -> Tensor:
    """Codes times the scale of their group: `[blocks, groups, elements of a group]`."""
    return scales[:, :, None] * codes.view(*scales.shape, -1)


def _f32(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float16).to(torch.float32)


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.bfloat16).to(torch.float32)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:], 16) | (_bits(blocks[:, 2:6]) << 4)
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:], 16) | (_bits(blocks[:, 4:8]) << 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q2_k(blocks: Tensor) -> Tensor:
    """16 groups of 16: a byte of a group has its scale and its minimum."""
    scales, codes = blocks[:, :16], _fields(blocks[:, 16:80], (0, 2, 4, 6), 32, 3).float()
    minimum = _half(blocks, 82) * (scales >> 4).float()
    return _grouped(_half(blocks, 80) * (scales & 15).float(), codes) - minimum[:, :, None]


def _q3_k(blocks: Tensor) -> Tensor:
    """16 groups of 16: six-bit scales, whose low bits are in eight bytes and high bits in four."""
    packed = blocks[:, 96:108]
    scales = (_nibbles(packed[:, :8], 8) | (_fields(packed[:, 8:], (0, 2, 4, 6), 4, 3) << 4)).float() - 32
    high = _fields(blocks[:, :32], range(8), 32, 1)
    codes = _fields(blocks[:, 32:96], (0, 2, 4, 6), 32, 3).float() - 4 * (1 - high.float())
    return _grouped(_half(blocks, 108) * scales, codes)


def _scales_and_minimums(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight six-bit scales and minimums in twelve bytes, of Q4_K and Q5_K."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], 1)
    minimums = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], 1)
    return scales.float(), minimums.float()


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:], 32).float()
    return _grouped(_half(blocks, 0) * scales, codes) - (_half(blocks, 2) * minimums)[:, :, None]


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    codes = (_nibbles(blocks[:, 48:], 32) | (_fields(blocks[:, 16:48], range(8), 32, 1) << 4)).float()
    return _grouped(_half(blocks, 0) * scales, codes) - (_half(blocks, 2) * minimums)[:, :, None]


def _q6_k(blocks: Tensor) -> Tensor:
    low, high = _nibbles(blocks[:, :128], 64), _fields(blocks[:, 128:192], (0, 2, 4, 6), 32, 3)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return _grouped(scales, (low | (high << 4)).float() - 32)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _picked(_nibbles(blocks[:, 2:], 16), _IQ4)


def _iq4_xs(blocks: Tensor) -> Tensor:
    """Eight groups of 32: six-bit scales, whose high bits are in the two bytes after the first scale."""
    low = ((blocks[:, 4:8, None] >> torch.tensor([0, 4], dtype=torch.uint8, device=blocks.device)) & 15).flatten(1)
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = ((blocks[:, 2:4, None] >> shift) & 3).flatten(1)
    scales = (low | (high << 4)).float() - 32
    return _grouped(_half(blocks, 0) * scales, _picked(_nibbles(blocks[:, 8:], 16), _IQ4))


def _mxfp4(blocks: Tensor) -> Tensor:
    """The scale is a power of two: half of 2 ** (byte - 127), which the smallest two bytes make subnormal."""
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.view(torch.float32) * _picked(_nibbles(blocks[:, 1:], 16), _FP4)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}  # fmt: skip
