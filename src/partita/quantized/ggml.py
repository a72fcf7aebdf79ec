"""Weights in the blocks of ggml, as GGUF files hold them, and plain weights that such files hold in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from partita.checkpoint.gguf.file import BLOCKS, PLAIN
from partita.checkpoint.gguf.names import GgufInfo
from partita.checkpoint.header import TensorInfo
from partita.checkpoint.read import Range, Reader
from partita.quantized.array import Encoding, QuantizedArray, indexes
from partita.quantized.weight import Infos, QuantizedWeight, cover

if TYPE_CHECKING:
    import numpy as np


def ggml_weights(infos: Infos, config: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The weights of a GGUF file that are no plain tensors in the model's order."""
    return [GgmlWeight(info) for info in infos.values() if isinstance(info, GgufInfo) and not info.is_as_stored]


@dataclass(frozen=True)
class GgmlWeight:
    """A weight in blocks of ggml. See `QuantizedWeight`.

    Attributes:
        info: The tensor on disk.
    """

    info: GgufInfo

    @property
    def name(self) -> str:
        """The name."""
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the model."""
        return self.info.shape

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensor on disk."""
        return (self.info.name,)

    @property
    def form(self) -> str:
        """The type of ggml."""
        return self.info.dtype

    @property
    def transposed(self) -> bool:
        """Whether the model stores it as (inputs, outputs)."""
        return self.info.transposed

    @property
    def is_plain(self) -> bool:
        """Whether its elements are floats, so that it is quantized in form only."""
        return self.info.dtype in PLAIN

    @property
    def _outputs(self) -> int:
        """Its outputs, of one expert."""
        return self.shape[-1 if self.transposed else -2]

    def _bytes(self, info: TensorInfo, expert: int) -> TensorInfo:
        """The bytes of one expert of a tensor on disk, [outputs, bytes of a row]."""
        experts = self.shape[0] if len(self.shape) == 3 else 1
        outputs = self._outputs if self.info.other is None else self._outputs // 2
        size = (info.end_bytes - info.start_bytes) // max(1, experts)
        start = info.start_bytes + expert * size
        return TensorInfo(info.file, self.name, "U8", (outputs, size // max(1, outputs)), start, start + size)

    @cached_property
    def _places(self) -> np.ndarray | None:
        """For each output of the model the row on disk, or None if they are in order."""
        import numpy as np

        return None if self.info.order is None else np.array(self.info.order.places())

    def read(self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int = 0) -> QuantizedArray:
        """See `QuantizedWeight.read`."""
        elements, size = BLOCKS[self.info.dtype]
        first = self._bytes(self.info, expert)
        blocks = cover(columns, elements, first.shape[1] // size * elements)
        stored = [(start * size, stop * size) for start, stop in blocks]
        if self.info.other is not None:
            numbers = indexes(rows)
            codes = _empty(len(numbers), stored)
            for place, info in enumerate((first, self._bytes(self.info.other, expert))):
                codes[numbers % 2 == place] = _rows(reader, info, numbers[numbers % 2 == place] // 2, stored)
        elif self._places is not None:
            codes = _rows(reader, first, self._places[indexes(rows)], stored)
        else:
            codes = _ranges(reader, first, rows, stored)
        encoding = Encoding("ggml", dtype=self.info.dtype, block=(elements, size))
        whole = QuantizedArray(encoding, (codes.shape[0], codes.shape[1] // size * elements), codes)
        return whole.take([(0, codes.shape[0])], _within(columns, blocks, elements))


def _empty(count: int, stored: Sequence[Range]) -> np.ndarray:
    import numpy as np

    return np.empty((count, sum(stop - start for start, stop in stored)), np.uint8)


def _ranges(reader: Reader, info: TensorInfo, rows: Sequence[Range], stored: Sequence[Range]) -> np.ndarray:
    """Ranges of rows and of their bytes."""
    codes = _empty(sum(stop - start for start, stop in rows), stored)
    memory: Any = codes
    reader.read_as(info, [rows, stored], memoryview(memory).cast("B") if codes.size else memoryview(b""))
    return codes


def _rows(reader: Reader, info: TensorInfo, numbers: np.ndarray, stored: Sequence[Range]) -> np.ndarray:
    """Rows in any order, and ranges of their bytes."""
    import numpy as np

    kept, order = np.unique(numbers, return_inverse=True)
    return _ranges(reader, info, _runs(kept), stored)[order]


def _runs(numbers: np.ndarray) -> list[Range]:
    """Ascending numbers as ranges."""
    import numpy as np

    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    starts, stops = [0, *breaks.tolist()], [*breaks.tolist(), len(numbers)]
    return [(int(numbers[a]), int(numbers[b - 1]) + 1) for a, b in zip(starts, stops, strict=True) if a < b]


def _within(columns: Sequence[Range], blocks: Sequence[Range], elements: int) -> list[Range]:
    """`columns` as ranges of the elements of `blocks`, which stand one after the other."""
    found: list[Range] = []
    for start, stop in columns:
        offset = 0
        for first, last in blocks:
            if first * elements <= start < last * elements:
                found.append((start - first * elements + offset, stop - first * elements + offset))
            offset += (last - first) * elements
    return found
