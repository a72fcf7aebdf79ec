"""A quantized weight of a checkpoint: the tensors on disk that make it up, and how any part of it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from partita.checkpoint.header import TensorInfo
from partita.checkpoint.read import Range, Reader
from partita.quantized.array import Encoding, QuantizedArray, Raw, indexes, storage

if TYPE_CHECKING:
    import numpy as np

CHUNK_BYTES = 8 << 20
"""Bytes on disk that are read at once before they are brought into the common form."""


class QuantizedWeight(Protocol):
    """One weight of the unsplit model, stored in several tensors on disk.

    Attributes:
        name: Its name on disk, as if it were not quantized (`model.layers.0.mlp.up_proj.weight`).
        shape: Its shape in the model: (outputs, inputs), before it (experts,) where one tensor holds all experts.
        tensors: The names of the tensors on disk that it consists of.
        form: The form in words for messages: `fp8, blocks of 128 x 128`.
        transposed: Whether the model stores it as (..., inputs, outputs); `shape` is in the model's order.
    """

    @property
    def name(self) -> str:
        """The name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        ...

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names on disk."""
        ...

    @property
    def form(self) -> str:
        """The form."""
        ...

    @property
    def transposed(self) -> bool:
        """Whether it is transposed."""
        ...

    def read(self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int = 0) -> QuantizedArray:
        """Ranges of its outputs (rows) and of its inputs (columns), of one expert if it holds several.

        Only the bytes of these ranges are read, rounded up to whole groups.
        """
        ...


def read_raw(reader: Reader, info: TensorInfo, ranges: Sequence[Sequence[Range]]) -> np.ndarray:
    """Ranges of each dim of a tensor on disk, concatenated, in the dtype that `storage` names."""
    import numpy as np

    data = np.empty([sum(stop - start for start, stop in held) for held in ranges], storage(info.dtype))
    memory: Any = data
    reader.read(info.name, ranges, memoryview(memory).cast("B") if data.size else memoryview(bytearray()))
    return data


def cover(ranges: Sequence[Range], unit: int, size: int) -> list[Range]:
    """`ranges` in whole units of `unit` elements, as ranges of units; those that touch are joined."""
    covered: list[Range] = []
    for start, stop in sorted(ranges):
        first, last = start // unit, min(-(-stop // unit), -(-size // unit))
        if covered and first <= covered[-1][1]:
            covered[-1] = (covered[-1][0], max(covered[-1][1], last))
        else:
            covered.append((first, last))
    return covered


def unit_of(ranges: Sequence[Range], unit: int, covered: Sequence[Range]) -> np.ndarray:
    """For each element of `ranges`, the place of its unit among the units of `covered`, int32."""
    import numpy as np

    units = indexes(covered)
    return np.searchsorted(units, indexes(ranges) // unit).astype(np.int32)


def in_steps(ranges: Sequence[Range], size: int) -> list[list[Range]]:
    """`ranges` divided into chunks of at most `size` elements."""
    steps: list[list[Range]] = []
    room = 0
    for start, stop in ranges:
        while start < stop:
            if room == 0:
                steps.append([])
                room = size
            end = min(stop, start + room)
            steps[-1].append((start, end))
            room -= end - start
            start = end
    return steps


@dataclass(frozen=True)
class Grid:
    """Scales of a weight on disk: one for `rows` x `columns` elements; 0 is one for all of that dim.

    Attributes:
        info: The tensor on disk, [row units, column units], or fewer dims where one scale is for all of a dim.
        rows: Outputs of a scale.
        columns: Inputs of a scale.
    """

    info: TensorInfo
    rows: int
    columns: int

    def read(
        self, reader: Reader, shape: tuple[int, int], rows: Sequence[Range], columns: Sequence[Range]
    ) -> tuple[Raw, np.ndarray | None, np.ndarray | None]:
        """The scales of ranges of outputs and inputs as [R, C], the row of each output, and the column of each input."""
        by_dim = [
            (cover(held, unit, size), unit_of(held, unit, cover(held, unit, size))) if unit else ([(0, 1)], None)
            for held, unit, size in ((rows, self.rows, shape[0]), (columns, self.columns, shape[1]))
        ]
        lengths = [sum(stop - start for start, stop in units) for units, _ in by_dim]
        on_disk = [units for (units, _), unit in zip(by_dim, (self.rows, self.columns), strict=True) if unit]
        # A dim of one scale may be kept on disk ([outputs, 1]) or not ([outputs]).
        ranges = (
            on_disk if len(on_disk) == len(self.info.shape) else [units for units, _ in by_dim][: len(self.info.shape)]
        )
        data = read_raw(reader, self.info, ranges).reshape(lengths)
        return Raw(data, self.info.dtype), by_dim[0][1], by_dim[1][1]


@dataclass(frozen=True)
class ScaledBytes:
    """A weight of eight-bit floats or integers [outputs, inputs], with a grid of scales. See `QuantizedWeight`.

    Attributes:
        info: The codes on disk.
        scales: Their scales.
        zeros: Their zero points, on the same grid, or None.
        factor: A factor of all values.
        extra: Other tensors on disk that belong to it, such as the scale of its layer's inputs.
        scale_dtype: The dtype to read the bytes of the scales as (default: their own).
    """

    name: str
    form: str
    info: TensorInfo
    scales: Grid | None
    zeros: Grid | None = None
    factor: float = 1.0
    transposed: bool = False
    extra: tuple[str, ...] = ()
    scale_dtype: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs), with `transposed` the other way."""
        return self.info.shape[::-1] if self.transposed else self.info.shape

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors on disk."""
        grids = (grid.info.name for grid in (self.scales, self.zeros) if grid is not None)
        return (self.info.name, *grids, *self.extra)

    def read(self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int = 0) -> QuantizedArray:
        """See `QuantizedWeight.read`."""
        import numpy as np

        codes = read_raw(reader, self.info, [rows, columns])
        encoding = Encoding("bytes", dtype=self.info.dtype)
        array = QuantizedArray(encoding, (codes.shape[0], codes.shape[1]), codes.view(np.uint8), factor=self.factor)
        size = (self.info.shape[0], self.info.shape[1])
        for name, grid in (("scales", self.scales), ("zeros", self.zeros)):
            if grid is not None:
                raw, row_of, column_of = grid.read(reader, size, rows, columns)
                if name == "scales" and self.scale_dtype:
                    raw = Raw(raw.data, self.scale_dtype)
                changes: dict[str, Any] = {name: raw}
                array = replace(array, row_of=row_of, column_of=column_of, **changes)
        return array


Infos = Mapping[str, TensorInfo]
"""The tensors of a checkpoint by name."""
