"""A quantized checkpoint read as if its weights were plain, for an engine that has no products with its codes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from partita.checkpoint.header import DTYPE_BITS, TensorInfo
from partita.checkpoint.index import Checkpoint
from partita.checkpoint.read import Range, Reader
from partita.quantized.find import parts_of
from partita.quantized.weight import CHUNK_BYTES, QuantizedWeight

if TYPE_CHECKING:
    import numpy as np


def as_plain(checkpoint: Checkpoint, quantized: Mapping[str, QuantizedWeight], dtype: str) -> Checkpoint:
    """A checkpoint with each quantized weight as one tensor of `dtype` (a name of safetensors), to read with `PlainReader`."""
    parts = parts_of(quantized)
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in parts}
    for name, weight in quantized.items():
        size_bytes = math.prod(weight.shape) * DTYPE_BITS[dtype] // 8
        file = checkpoint.tensors[weight.tensors[0]].file
        tensors[name] = TensorInfo(file, name, dtype, weight.shape, 0, size_bytes)
    return replace(checkpoint, tensors=MappingProxyType(tensors))


class PlainReader(Reader):
    """Reads pieces of an `as_plain` checkpoint: those of quantized weights are computed from the codes that they need."""

    def __init__(self, checkpoint: Checkpoint, stored: Checkpoint, quantized: Mapping[str, QuantizedWeight]) -> None:
        super().__init__(checkpoint)
        self.quantized, self._stored = quantized, Reader(stored)

    def read(self, name: str, ranges_by_dim: Sequence[Sequence[Range]], out: memoryview) -> None:
        """See `Reader.read`."""
        weight = self.quantized.get(name)
        if weight is None:
            super().read(name, ranges_by_dim, out)
            return
        import numpy as np

        dtype = self.checkpoint.tensors[name].dtype
        into = np.frombuffer(out, np.dtype(f"u{DTYPE_BITS[dtype] // 8}"))
        done = 0
        *which, first, second = ranges_by_dim
        for expert in [e for start, stop in which[0] for e in range(start, stop)] if which else [0]:
            for values in self._pieces(weight, first, second, expert):
                piece = _stored_as(values, dtype)
                into[done : done + piece.size] = piece.ravel()
                done += piece.size

    def _pieces(
        self, weight: QuantizedWeight, first: Sequence[Range], second: Sequence[Range], expert: int
    ) -> Iterator[np.ndarray]:
        """Values of an expert in the order of the model's dims, some rows at a time."""
        if weight.transposed:
            yield weight.read(self._stored, second, first, expert).dense().T
            return
        step = max(1, CHUNK_BYTES // max(1, sum(stop - start for start, stop in second)))
        for start, stop in first:
            for low in range(start, stop, step):
                yield weight.read(self._stored, [(low, min(low + step, stop))], second, expert).dense()

    def close(self) -> None:
        """Close the files."""
        super().close()
        self._stored.close()


def _stored_as(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of values in a dtype of safetensors, rounded to nearest."""
    import numpy as np

    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    names = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return values.astype(names[dtype]).view(np.dtype(f"u{DTYPE_BITS[dtype] // 8}"))
