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

    @cached_property
    def _bytes(self) -> TensorInfo:
        """Its bytes, [outputs, bytes of a row]."""
        outputs = self.info.shape[1] if self.transposed else self.info.shape[0]
        start, end = self.info.start_bytes, self.info.end_bytes
        return TensorInfo(self.info.file, self.name, "U8", (outputs, (end - start) // max(1, outputs)), start, end)

    @cached_property
    def _places(self) -> np.ndarray | None:
        """For each output of the model the row on disk, or None if they are in order."""
        import numpy as np

        order = self.info.order
        if order is None:
            return None
        return np.arange(self._bytes.shape[0]).reshape(order.dims).transpose(order.axes).reshape(-1)

    def read(self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int = 0) -> QuantizedArray:
        """See `QuantizedWeight.read`."""
        import numpy as np

        elements, size = BLOCKS[self.info.dtype]
        blocks = cover(columns, elements, self._bytes.shape[1] // size * elements)
        held, order = list(rows), None
        if self._places is not None:
            kept, order = np.unique(self._places[indexes(rows)], return_inverse=True)
            held = _runs(kept)
        stored = [(first * size, last * size) for first, last in blocks]
        codes = np.empty([sum(stop - start for start, stop in ranges) for ranges in (held, stored)], np.uint8)
        memory: Any = codes
        reader.read_as(self._bytes, [held, stored], memoryview(memory).cast("B") if codes.size else memoryview(b""))
        if order is not None:
            codes = codes[order]
        encoding = Encoding("ggml", dtype=self.info.dtype, block=(elements, size))
        whole = QuantizedArray(encoding, (codes.shape[0], codes.shape[1] // size * elements), codes)
        return whole.take([(0, codes.shape[0])], _within(columns, blocks, elements))


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
