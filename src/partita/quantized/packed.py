"""Matrices on disk whose elements are packed in words, and weights of groups that consist of them.

All formats of groups are alike: codes of 2 to 8 bits, packed along the inputs or the outputs, stored as [outputs, inputs] or
turned, beside scales and zero points of each group. What differs is data here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partita.checkpoint.header import TensorInfo, brief
from partita.checkpoint.read import Range, Reader
from partita.errors import CheckpointError
from partita.quantized.array import Encoding, QuantizedArray, Raw, indexes, numbers
from partita.quantized.bits import pack_bits, packed_bytes, unpack_bits
from partita.quantized.weight import cover, in_steps, read_raw, unit_of

if TYPE_CHECKING:
    import numpy as np

_CHUNK_ELEMENTS = 1 << 21
"""Elements that are unpacked at once."""


@dataclass(frozen=True)
class Matrix:
    """Plain numbers [rows, columns] on disk.

    Attributes:
        info: The tensor on disk.
        turned: Whether it is stored as [columns, rows].
        dtype: The dtype to read its bytes as (default: its own).
        expert: Its number in a tensor [experts, ...], -1 if that is the expert to read, or None if there is no such dim.
    """

    info: TensorInfo
    turned: bool = False
    dtype: str = ""
    expert: int | None = None

    def read(self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int = 0) -> Raw:
        """Ranges of its rows and columns, [rows, columns]."""
        import numpy as np

        held = [columns, rows] if self.turned else [rows, columns]
        data = read_raw(reader, self.info, [*_lead(self.expert, expert), *held[: len(self.info.shape)]])
        lengths = [sum(stop - start for start, stop in ranges) for ranges in held]
        data = data.reshape(lengths)
        return Raw(np.ascontiguousarray(data.T) if self.turned else data, self.dtype or self.info.dtype)


def _lead(own: int | None, expert: int) -> list[list[Range]]:
    if own is None:
        return []
    number = expert if own < 0 else own
    return [[(number, number + 1)]]


@dataclass(frozen=True)
class Packed:
    """Integers of `bits` bits [rows, columns] in words, the lowest bits first.

    Attributes:
        info: The tensor on disk: 32-bit words, or bytes.
        shape: Rows and columns of the matrix.
        bits: Bits of an element.
        along_rows: Whether the elements of a word are in one column, not in one row.
        turned: Whether it is stored as [columns, rows].
        places: The place of each of eight elements in their word (default: in order).
        per_block: Elements of a block where the last dim on disk is a block's bytes (default: there is no such dim).
        expert: See `Matrix`.
        plus: Added to each word, modulo its size.
    """

    info: TensorInfo
    shape: tuple[int, int]
    bits: int
    along_rows: bool = False
    turned: bool = False
    places: tuple[int, ...] = ()
    per_block: int = 0
    expert: int | None = None
    plus: int = 0

    def codes(self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int = 0) -> np.ndarray:
        """Ranges of its rows and columns in the common form, uint8 [rows, packed bytes], converted chunk by chunk."""
        import numpy as np

        counts = [sum(stop - start for start, stop in held) for held in (rows, columns)]
        made = np.empty((counts[0], packed_bytes(counts[1], self.bits)), np.uint8)
        if self.turned:
            done = 0
            for piece in in_steps(columns, max(32, _CHUNK_ELEMENTS // max(1, counts[0]) // 32 * 32)):
                found = self._codes(reader, rows, piece, expert)
                made[:, done : done + found.shape[1]] = found
                done += found.shape[1]
        else:
            done = 0
            for piece in in_steps(rows, max(32, _CHUNK_ELEMENTS // max(1, counts[1]) // 32 * 32)):
                found = self._codes(reader, piece, columns, expert)
                made[done : done + found.shape[0]] = found
                done += found.shape[0]
        return made

    def _codes(self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int) -> np.ndarray:
        packed, covered = self._words(reader, rows, columns, expert)
        if not self.along_rows and not self.places and len(columns) == 1 and covered[0] == columns[0][0]:
            return packed[:, : packed_bytes(columns[0][1] - columns[0][0], self.bits)]
        return pack_bits(self._unpacked(packed, covered, rows, columns), self.bits)

    def unpacked(self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int = 0) -> np.ndarray:
        """Ranges of its rows and columns as uint8 [rows, columns]."""
        packed, covered = self._words(reader, rows, columns, expert)
        return self._unpacked(packed, covered, rows, columns)

    def _words(
        self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The words that hold these ranges as bytes [other dim, bytes], and the numbers of the elements that they hold."""
        import numpy as np

        word_bits = 32 if self.info.dtype in ("I32", "U32") else 8
        words = self.bits // math.gcd(self.bits, word_bits)
        unit = words * word_bits // self.bits
        if self.places or self.per_block:
            unit, words = max(unit, self.per_block), 1 if self.per_block else words
        packed_ranges, other = (rows, columns) if self.along_rows else (columns, rows)
        size = self.shape[0 if self.along_rows else 1]
        units = cover(packed_ranges, unit, size)
        lead = _lead(self.expert, expert)
        packed_first = self.along_rows != self.turned
        dim = len(lead) + (0 if packed_first else 1)
        stored = self.info.shape[dim]
        word_ranges = [(start * words, min(stop * words, stored)) for start, stop in units]
        held = [word_ranges, other] if packed_first else [other, word_ranges]
        block = [[(0, self.info.shape[-1])]] if self.per_block else []
        data = read_raw(reader, self.info, [*lead, *held, *block])
        data = data.reshape(data.shape[len(lead) :])
        if packed_first:
            data = np.ascontiguousarray(np.moveaxis(data, 0, 1))
        if self.plus:
            with np.errstate(over="ignore"):
                data = data.view(np.uint32) + np.uint32(self.plus)
        packed = data.reshape(data.shape[0], -1).view(np.uint8)
        return packed, indexes([(start * unit, min(stop * unit, size)) for start, stop in units])

    def _unpacked(
        self, packed: np.ndarray, covered: np.ndarray, rows: Sequence[Range], columns: Sequence[Range]
    ) -> np.ndarray:
        import numpy as np

        codes = unpack_bits(packed, self.bits, len(covered))
        if self.places:
            each = len(self.places)
            codes = codes.reshape(codes.shape[0], -1, each)[:, :, list(self.places)].reshape(codes.shape[0], -1)
        index = np.searchsorted(covered, indexes(rows if self.along_rows else columns))
        taken = codes[:, index]
        return np.ascontiguousarray(taken.T) if self.along_rows else taken


@dataclass(frozen=True)
class GroupedWeight:
    """A weight of codes with a scale for each group of an output's inputs. See `QuantizedWeight`.

    Attributes:
        size: Outputs and inputs.
        codes: The codes on disk.
        encoding: What a code is.
        scales: A scale for each output (or one for all) and group.
        tensors: The names of the tensors on disk.
        group: Inputs of a group; 0 if all inputs of an output are one group.
        zeros: The zero points: integers on disk, numbers on disk, or one number for all.
        zeros_plus: Added to integer zero points on disk, modulo their largest number.
        biases: Added after the scale.
        index: The group of each input on disk, which replaces `group`.
        factor: A factor of all values.
        experts: Experts that it holds, each of `size`; 0 if it is one matrix.
        transposed: Whether the model stores it as [..., inputs, outputs].
    """

    name: str
    form: str
    size: tuple[int, int]
    codes: Packed
    encoding: Encoding
    scales: Matrix
    tensors: tuple[str, ...]
    group: int = 0
    zeros: Packed | Matrix | int | None = None
    zeros_plus: int = 0
    biases: Matrix | None = None
    index: TensorInfo | None = None
    factor: float = 1.0
    experts: int = 0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs), with `transposed` the other way, and before them (experts,) if it holds several."""
        matrix = self.size[::-1] if self.transposed else self.size
        return (self.experts, *matrix) if self.experts else matrix

    def read(self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int = 0) -> QuantizedArray:
        """See `QuantizedWeight.read`."""
        import numpy as np

        codes = self.codes.codes(reader, rows, columns, expert)
        groups, column_of = self._groups(reader, columns)
        outputs = len(codes)
        by_row, row_of = rows, np.arange(outputs, dtype=np.int32)
        if math.prod(self.scales.info.shape) == 1:
            by_row, row_of = [(0, 1)], None  # type: ignore[assignment]
        scales = self.scales.read(reader, by_row, groups, expert)
        return QuantizedArray(
            self.encoding, (outputs, sum(b - a for a, b in columns)), codes, scales, row_of=row_of, column_of=column_of,
            zeros=self._zeros(reader, by_row, groups, expert, scales.data.shape),
            biases=self.biases.read(reader, by_row, groups, expert) if self.biases is not None else None,
            factor=self.factor,
        )  # fmt: skip

    def _groups(self, reader: Reader, columns: Sequence[Range]) -> tuple[list[Range], np.ndarray | None]:
        """The groups of these inputs, and the place of each input's group among them; None if there is one for all."""
        import numpy as np

        if self.index is not None:
            of_input = read_raw(reader, self.index, [columns]).astype(np.int64)
            kept, places = np.unique(of_input, return_inverse=True)
            count = self.scales.info.shape[-2 if self.scales.turned else -1]
            if kept.size and not 0 <= kept[0] <= kept[-1] < count:
                raise CheckpointError(
                    f"{self.index.file}: the groups of inputs in {brief(self.index.name)} must be within 0 to {count - 1}, as "
                    f"{brief(self.scales.info.name)} has {count}, but are {kept[0]} to {kept[-1]}. Download it again."
                )
            return runs(kept), places.astype(np.int32)
        if self.group:
            groups = cover(columns, self.group, self.size[1])
            return groups, unit_of(columns, self.group, groups)
        return [(0, 1)], None

    def _zeros(
        self, reader: Reader, rows: Sequence[Range], groups: list[Range], expert: int, shape: tuple[int, ...]
    ) -> Raw | None:
        import numpy as np

        if self.zeros is None:
            return None
        if isinstance(self.zeros, int):
            return Raw(np.full(shape, self.zeros, np.uint8), "U8")
        if isinstance(self.zeros, Matrix):
            return self.zeros.read(reader, rows, groups, expert)
        found = self.zeros.unpacked(reader, rows, groups, expert)
        return Raw((found + np.uint8(self.zeros_plus)) & np.uint8((1 << self.zeros.bits) - 1), "U8")


def read_small(info: TensorInfo) -> np.ndarray:
    """All values of a small tensor on disk as numbers, which a weight needs before it is read."""
    from partita.checkpoint.index import Checkpoint

    with Reader(Checkpoint(info.file.parent, (), {info.name: info})) as reader:
        return numbers(read_raw(reader, info, [[(0, size)] for size in info.shape]), info.dtype)


def runs(numbers_: np.ndarray) -> list[Range]:
    """Ascending numbers as ranges."""
    ranges: list[Range] = []
    for number in numbers_.tolist():
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges
