"""A part of a quantized weight in memory, in one form for all formats. No framework is needed.

    value[i, j] = (decode(codes)[i, j] - zeros[r, c]) * scales[r, c] * factor + biases[r, c],  r = row_of[i], c = column_of[j]

`decode` is the integer itself, an entry of a table of 16 values, an eight-bit float, or a block of ggml, which holds its own
scales. Outputs are the rows and inputs the columns, however the format stores them. Any ranges of rows and columns can be
taken, also when they divide a group: both parts then hold its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from partita.checkpoint.read import Range
from partita.dependencies import find
from partita.quantized.bits import pack_bits, packed_bytes, unpack_bits

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["ints", "table", "bytes", "ggml"]


@dataclass(frozen=True)
class Encoding:
    """How an element is stored.

    Attributes:
        kind: `ints` of `bits` bits; `table`, 4-bit indices of `table`; `bytes` of `dtype`; `ggml`, blocks of the type `dtype`.
        bits: Bits of an element of `ints`.
        dtype: `F8_E4M3`, `F8_E5M2` or `I8` of `bytes`; the name of a type of ggml.
        table: The values of `table`.
        block: Elements and bytes of a block of `ggml`.
    """

    kind: Kind
    bits: int = 8
    dtype: str = ""
    table: tuple[float, ...] = ()
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Raw:
    """Values of any dtype of safetensors as a numpy array: F8 as uint8, BF16 as uint16, others as themselves."""

    data: np.ndarray
    dtype: str

    def rows(self, index: np.ndarray) -> Raw:
        """The rows `index`."""
        return Raw(self.data[index], self.dtype)

    def columns(self, index: np.ndarray) -> Raw:
        """The columns `index`."""
        import numpy as np

        return Raw(np.ascontiguousarray(self.data[:, index]), self.dtype)

    def numbers(self) -> np.ndarray:
        """The values as float32, exactly; float64 and 32-bit integers as float64."""
        return numbers(self.data, self.dtype)


@dataclass(frozen=True)
class QuantizedArray:
    """Rows and columns of a quantized weight; see the formula above.

    Attributes:
        encoding: How an element is stored.
        shape: Outputs and inputs that it holds.
        codes: uint8 `[outputs, bytes of a row]`.
        scales: `[R, C]`, or None.
        zeros: `[R, C]`, subtracted before the scale, or None.
        biases: `[R, C]`, added after the scale, or None.
        row_of: int32 `[outputs]`: the row of `scales` for each output; None if it has one row for all outputs.
        column_of: int32 `[inputs]`: the column of `scales` for each input; None if it has one column for all inputs.
        factor: A factor of all values.
        offset: Columns of the first block of ggml that are not part of it.
        picks: int32 `[inputs]`: the column of the blocks of ggml for each input; None: from `offset` on.
    """

    encoding: Encoding
    shape: tuple[int, int]
    codes: np.ndarray
    scales: Raw | None = None
    zeros: Raw | None = None
    biases: Raw | None = None
    row_of: np.ndarray | None = field(default=None, repr=False)
    column_of: np.ndarray | None = field(default=None, repr=False)
    factor: float = 1.0
    offset: int = 0
    picks: np.ndarray | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        parts = [part.data for part in (self.scales, self.zeros, self.biases) if part is not None]
        indexes = [index for index in (self.row_of, self.column_of, self.picks) if index is not None]
        return sum(part.nbytes for part in (self.codes, *parts, *indexes))

    def take(self, rows: Sequence[Range], columns: Sequence[Range]) -> QuantizedArray:
        """The given ranges of rows and of columns, in their order."""
        taken = self
        if list(rows) != [(0, self.shape[0])]:
            taken = taken._take_rows(indexes(rows))
        if list(columns) != [(0, self.shape[1])]:
            taken = taken._take_columns(columns)
        return taken

    def _take_rows(self, index: np.ndarray) -> QuantizedArray:
        taken = replace(self, shape=(len(index), self.shape[1]), codes=self.codes[index])
        if self.row_of is None:
            return taken
        kept, row_of = _unique(self.row_of[index])
        return replace(taken, row_of=row_of, **self._grids(lambda raw: raw.rows(kept)))

    def _take_columns(self, ranges: Sequence[Range]) -> QuantizedArray:
        import numpy as np

        index = indexes(ranges)
        if self.encoding.kind == "ggml":
            return self._take_blocks(ranges)
        if self.encoding.kind == "bytes":
            codes = np.ascontiguousarray(self.codes[:, index])
        else:
            codes = self._repacked(ranges, index)
        taken = replace(self, shape=(self.shape[0], len(index)), codes=codes)
        if self.column_of is None:
            return taken
        kept, column_of = _unique(self.column_of[index])
        return replace(taken, column_of=column_of, **self._grids(lambda raw: raw.columns(kept)))

    def _repacked(self, ranges: Sequence[Range], index: np.ndarray) -> np.ndarray:
        import numpy as np

        bits = self.encoding.bits
        if len(ranges) == 1 and ranges[0][0] * bits % 8 == 0:
            start = ranges[0][0] * bits // 8
            return np.ascontiguousarray(self.codes[:, start : start + packed_bytes(len(index), bits)])
        made = np.empty((self.shape[0], packed_bytes(len(index), bits)), np.uint8)
        step = max(1, (1 << 22) // max(1, self.shape[1]))
        for first in range(0, self.shape[0], step):
            unpacked = unpack_bits(self.codes[first : first + step], bits, self.shape[1])
            made[first : first + step] = pack_bits(unpacked[:, index], bits)
        return made

    def _take_blocks(self, ranges: Sequence[Range]) -> QuantizedArray:
        """Blocks cannot be divided: those that hold the ranges are kept, with the places of the columns in them."""
        import numpy as np

        elements, size = self.encoding.block
        wanted = indexes(ranges)
        places = wanted + self.offset if self.picks is None else self.picks[wanted]
        kept = np.unique(places // elements)
        blocks = self.codes.reshape(self.shape[0], -1, size)[:, kept].reshape(self.shape[0], len(kept) * size)
        picks = np.searchsorted(kept, places // elements) * elements + places % elements
        taken = replace(self, shape=(self.shape[0], len(wanted)), codes=blocks, picks=None, offset=0)
        if len(picks) and bool((np.diff(picks) == 1).all()):
            return replace(taken, offset=int(picks[0]))
        return replace(taken, picks=picks.astype(np.int32))

    def _grids(self, change: Callable[[Raw], Raw]) -> dict[str, Any]:
        """The changed scales, zeros and biases, as many as there are, by name."""
        named = {"scales": self.scales, "zeros": self.zeros, "biases": self.biases}
        return {name: change(raw) for name, raw in named.items() if raw is not None}

    def dense(self) -> np.ndarray:
        """The values as float32 `[outputs, inputs]` (float64 if the scales are): the definition, computed plainly.

        Raises:
            DependencyError: It has blocks of ggml, and the package gguf is missing.
        """
        encoding = self.encoding
        if encoding.kind == "ggml":
            return self._of_blocks()
        if encoding.kind == "bytes":
            values = numbers(self.codes, encoding.dtype)
        else:
            import numpy as np

            codes = unpack_bits(self.codes, encoding.bits, self.shape[1])
            table = np.asarray(encoding.table, np.float32)
            values = table[codes] if encoding.kind == "table" else codes.astype(np.float32)
        if self.zeros is not None:
            values = values - self._spread(self.zeros)
        if self.scales is not None:
            values = values * self._spread(self.scales)
        if self.factor != 1.0:
            values = values * values.dtype.type(self.factor)
        return values if self.biases is None else values + self._spread(self.biases)

    def _of_blocks(self) -> np.ndarray:
        import numpy as np

        purpose = "read blocks of ggml without torch"
        dequantize = find("gguf", "gguf.quants", "dequantize", purpose)
        kinds = find("gguf", "gguf", "GGMLQuantizationType", purpose)
        values = dequantize(self.codes, kinds[self.encoding.dtype]).astype(np.float32)
        found: np.ndarray
        if self.picks is None:
            found = values[:, self.offset : self.offset + self.shape[1]]
        else:
            found = values[:, self.picks]
        return found

    def _spread(self, raw: Raw) -> np.ndarray:
        values = raw.numbers()
        values = values if self.row_of is None else values[self.row_of]
        return values if self.column_of is None else values[:, self.column_of]


def indexes(ranges: Sequence[Range]) -> np.ndarray:
    """The numbers in `ranges`, in their order."""
    import numpy as np

    return np.concatenate([np.arange(start, stop) for start, stop in ranges] or [np.arange(0)])


def _unique(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct numbers in `index`, ascending, and the place of each among them."""
    import numpy as np

    kept, places = np.unique(index, return_inverse=True)
    return kept, places.astype(np.int32)


_STORAGE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "BOOL": "uint8",
    "F8_E4M3": "uint8", "F8_E5M2": "uint8", "F8_E8M0": "uint8",
}  # fmt: skip


def storage(dtype: str) -> np.dtype:
    """The numpy dtype that holds a dtype of safetensors."""
    import numpy as np

    return np.dtype(_STORAGE[dtype])


def numbers(data: np.ndarray, dtype: str) -> np.ndarray:
    """The values of a `Raw`'s data as float32, exactly; float64 and 32-bit integers as float64."""
    import numpy as np

    if dtype == "BF16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    if dtype.startswith("F8_"):
        return _float8(dtype)[data.view(np.uint8)]
    if dtype == "I8":
        return data.view(np.int8).astype(np.float32)
    return data.astype(np.float64 if dtype in ("F64", "I32", "U32", "I64") else np.float32)


def _float8(dtype: str) -> np.ndarray:
    """The 256 values of an eight-bit float (OCP's OFP8 and MX: no infinity in E4M3, exponents alone in E8M0)."""
    import numpy as np

    code = np.arange(256)
    if dtype == "F8_E8M0":
        values = np.ldexp(1.0, code - 127)
        values[255] = np.nan
        return values.astype(np.float32)
    mantissa_bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    exponent = (code & 127) >> mantissa_bits
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = np.where(exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1 + mantissa, exponent - bias))
    if dtype == "F8_E4M3":
        values[(code & 127) == 127] = np.nan
    else:
        values[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(code & 128, -values, values).astype(np.float32)
