"""This rank's rows and columns of a quantized weight as tensors, and their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from partita.checkpoint.read import Range
from partita.quantized.array import Encoding, QuantizedArray, Raw
from partita.quantized.weight import CHUNK_BYTES
from partita.torch.quantized.ggml import decode

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""torch's dtypes by the names of safetensors, scales of eight bits included."""


@dataclass(frozen=True)
class Part:
    """`partita.quantized.array.QuantizedArray` as tensors: the formula there says what each is.

    Attributes:
        group: Inputs of a column of `scales` if all groups are whole, else 0 and `column_of` says it.
        is_halved: Whether the codes of 4 bits are in the order of the kernels: of each 32, the first 16 in the low halves of 16
            bytes and the others in the high halves.
    """

    encoding: Encoding
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    biases: Tensor | None = None
    row_of: Tensor | None = field(default=None, repr=False)
    column_of: Tensor | None = field(default=None, repr=False)
    table: Tensor | None = field(default=None, repr=False)
    factor: float = 1.0
    offset: int = 0
    picks: Tensor | None = field(default=None, repr=False)
    group: int = 0
    is_halved: bool = False

    @classmethod
    def of(cls, array: QuantizedArray, device: torch.device | str = "cpu", *, keep: bool = True) -> Part:
        """The tensors of an array on `device`; on the CPU without a copy unless `keep`, which leaves the array as it is."""
        grids = {
            name: _tensor(raw) for name in ("scales", "zeros", "biases") if (raw := getattr(array, name)) is not None
        }
        row_of = None if array.row_of is None else torch.from_numpy(array.row_of)
        column_of = None if array.column_of is None else torch.from_numpy(array.column_of)
        if row_of is not None and torch.equal(row_of, torch.arange(len(row_of), dtype=row_of.dtype)):
            row_of = None  # a row of scales for each output
        group = 0
        if column_of is not None and len(column_of):
            count = int(column_of[-1]) + 1
            group = len(column_of) // count if len(column_of) % count == 0 else 0
            if group and torch.equal(column_of, torch.arange(len(column_of), dtype=column_of.dtype) // group):
                column_of = None
            else:
                group = 0
        table = torch.tensor(array.encoding.table, dtype=torch.float32) if array.encoding.table else None
        codes = torch.from_numpy(array.codes)
        is_halved = (
            array.encoding.kind in ("ints", "table") and array.encoding.bits == 4 and array.shape[1] % HALVES == 0
        )
        if is_halved:
            codes = codes.clone() if keep else codes
            _in_place(codes, _halved)
        part = cls(
            array.encoding, array.shape, codes, **grids, row_of=row_of, column_of=column_of,
            table=table, factor=array.factor, offset=array.offset, group=group,
            picks=None if array.picks is None else torch.from_numpy(array.picks), is_halved=is_halved,
        )  # fmt: skip
        return part if torch.device(device).type == "cpu" else part.mapped(lambda tensor: tensor.to(device))

    def array(self) -> QuantizedArray:
        """The inverse of `of`."""
        grids = {n: _raw(t) for n in ("scales", "zeros", "biases") if (t := getattr(self, n)) is not None}
        row_of, column_of = self.row_of, self.column_of
        scales = next((t for t in (self.scales, self.zeros, self.biases) if t is not None), None)
        if row_of is None and scales is not None and scales.shape[0] == self.shape[0] and self.shape[0] > 1:
            row_of = torch.arange(self.shape[0], dtype=torch.int32)
        if self.group:
            column_of = torch.arange(self.shape[1], dtype=torch.int32) // self.group
        codes = self.codes.cpu()
        if self.is_halved:
            codes = codes.clone()
            _in_place(codes, _paired)
        return QuantizedArray(
            self.encoding, self.shape, codes.numpy(), **grids,
            row_of=None if row_of is None else row_of.cpu().numpy(),
            column_of=None if column_of is None else column_of.cpu().numpy(),
            factor=self.factor, offset=self.offset, picks=None if self.picks is None else self.picks.cpu().numpy(),
        )  # fmt: skip

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Part:
        """The part with `change` applied to each of its tensors."""
        changed: dict[str, Any] = {
            f.name: change(tensor) for f in fields(self) if isinstance(tensor := getattr(self, f.name), Tensor)
        }
        return replace(self, **changed)

    def take(self, rows: list[Range], columns: list[Range]) -> Part:
        """Ranges of its outputs and inputs, in their order."""
        return Part.of(self.array().take(rows, columns), self.codes.device, keep=False)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(t.numel() * t.itemsize for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor))

    def rows(self, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """The values of some outputs `[outputs, inputs]`, computed in float32 (float64 for scales in it)."""
        codes = self.codes[index]
        values = _DECODERS[self.encoding.kind](self, codes)
        if self.zeros is not None:
            values = self._with(torch.sub, values, self.zeros, index)
        if self.scales is not None:
            values = self._with(torch.mul, values, self.scales, index)
        if self.factor != 1.0:
            values = values * self.factor
        if self.biases is not None:
            values = self._with(torch.add, values, self.biases, index)
        return values.to(dtype)

    def _with(
        self, combine: Callable[[Tensor, Tensor], Tensor], values: Tensor, grid: Tensor, index: slice | Tensor
    ) -> Tensor:
        """`combine` each value with its entry of a grid of scales."""
        if self.row_of is not None:
            grid = grid[self.row_of[index].long()]
        elif grid.shape[0] > 1:
            grid = grid[index]
        grid = grid.to(torch.float64 if grid.dtype == torch.float64 else torch.float32)
        if self.group:
            grouped = values.view(values.shape[0], -1, self.group)
            return combine(grouped, grid[:, :, None]).view(values.shape)
        return combine(values, grid if self.column_of is None else grid[:, self.column_of.long()])


HALVES = 32
"""Codes of 4 bits of which the kernels keep the first half in the low bits of bytes and the second in the high bits."""


def _in_place(codes: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Change the order of codes, some rows at a time."""
    step = max(1, CHUNK_BYTES // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], step):
        codes[start : start + step] = change(codes[start : start + step])


def _halved(codes: Tensor) -> Tensor:
    """Bytes of two neighbouring codes, the first in the low half, in the order of the kernels."""
    unpacked = torch.stack((codes & 15, codes >> 4), -1).view(codes.shape[0], -1, 2, HALVES // 2)
    return (unpacked[:, :, 0] | unpacked[:, :, 1] << 4).view(codes.shape)


def _paired(codes: Tensor) -> Tensor:
    """The inverse of `_halved`."""
    unpacked = _unhalved(codes).view(codes.shape[0], -1, 2)
    return unpacked[..., 0] | unpacked[..., 1] << 4


def _unhalved(codes: Tensor) -> Tensor:
    """The codes, uint8 `[n, inputs]`, of bytes in the order of the kernels, `[n, inputs / 2]`."""
    bytes_of = codes.view(codes.shape[0], -1, HALVES // 2)
    return torch.stack((bytes_of & 15, bytes_of >> 4), 2).view(codes.shape[0], -1)


def _codes(part: Part, codes: Tensor) -> Tensor:
    return _unhalved(codes) if part.is_halved else _unpacked(codes, part.encoding.bits, part.shape[1])


def _ints(part: Part, codes: Tensor) -> Tensor:
    return _codes(part, codes).to(torch.float32)


def _table(part: Part, codes: Tensor) -> Tensor:
    assert part.table is not None
    return part.table[_codes(part, codes).int()]


def _bytes(part: Part, codes: Tensor) -> Tensor:
    return codes.view(TORCH_DTYPES[part.encoding.dtype]).to(torch.float32)


def _ggml(part: Part, codes: Tensor) -> Tensor:
    values = decode(codes, part.encoding.dtype)
    return values[:, part.offset : part.offset + part.shape[1]] if part.picks is None else values[:, part.picks.long()]


_DECODERS: dict[str, Callable[[Part, Tensor], Tensor]] = {
    "ints": _ints,
    "table": _table,
    "bytes": _bytes,
    "ggml": _ggml,
}


def _unpacked(codes: Tensor, bits: int, columns: int) -> Tensor:
    """`quantized.bits.unpack_bits` on any device: uint8 `[n, bytes]` to uint8 `[n, columns]`."""
    if bits == 8:
        return codes[:, :columns]
    if bits in (2, 4):
        mask = (1 << bits) - 1
        each = torch.stack([(codes >> shift) & mask for shift in range(0, 8, bits)], -1)
        return each.view(codes.shape[0], -1)[:, :columns]
    wide = torch.stack([(codes >> shift) & 1 for shift in range(8)], -1).view(codes.shape[0], -1)
    wide = wide[:, : columns * bits].reshape(codes.shape[0], columns, bits)
    result = wide[..., 0].clone()
    for place in range(1, bits):
        result |= wide[..., place] << place
    return result


def _tensor(raw: Raw) -> Tensor:
    return torch.from_numpy(raw.data).view(TORCH_DTYPES[raw.dtype])


_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_STORED = {"BF16": torch.uint16, "F8_E4M3": torch.uint8, "F8_E5M2": torch.uint8, "F8_E8M0": torch.uint8}


def _raw(tensor: Tensor) -> Raw:
    name = _NAMES[tensor.dtype]
    tensor = tensor.cpu().contiguous()
    return Raw((tensor.view(_STORED[name]) if name in _STORED else tensor).numpy(), name)
