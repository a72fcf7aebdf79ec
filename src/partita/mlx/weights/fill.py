"""Filling local arrays from the byte ranges of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.checkpoint.index import Checkpoint
from partita.checkpoint.read import Reader
from partita.core.plan import Plan
from partita.errors import ModelError
from partita.mlx.layers.inner import multiplies_by_columns
from partita.mlx.model.parts import Ranges, is_packed, local_ranges, parameter_homes, take
from partita.mlx.weights.names import Source, sanitize

Progress = Callable[[int, int], None]
"""Called with the bytes that this rank has loaded and their total."""

_ROWS, _PAD = 64, 16
"""Rows of a matrix to transpose in memory at once, and their distance: 5.6 GB/s, where the transposition of a full matrix
by one assignment reaches 0.6."""

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def as_dtype(dtype: mx.Dtype | str | None) -> mx.Dtype | None:
    """The MLX dtype of a name; None for the checkpoint's own.

    Raises:
        ModelError: Models cannot have this dtype.
    """
    names = {"float64": mx.float64, "float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    if dtype is None or dtype == "auto":
        return None
    found = names.get(dtype.removeprefix("mlx.core.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, mx.Dtype) or found not in names.values():
        raise ModelError(f"dtype must be one of {', '.join(names)}; got {dtype}.")
    if found == mx.float64 and mx.default_device() != mx.cpu:
        raise ModelError("MLX supports float64 on the CPU only. Use float32, or mx.set_default_device(mx.cpu) first.")
    return found


class Computed:
    """The arrays that `sanitize` computes from tensors on disk (dequantizes, adds one), created on request."""

    def __init__(self, again: Callable[[], nn.Module], sources: Mapping[str, Source], checkpoint: Checkpoint) -> None:
        self.arrays: dict[str, mx.array] = {}
        names = [name for name, source in sources.items() if source.boxes is None]
        if names:
            # The headers were checked when the checkpoint was opened: MLX itself accepts malformed ones.
            lazy: dict[str, mx.array] = {}
            for header in checkpoint.files:
                lazy.update(mx.load(str(header.file)))  # type: ignore[arg-type]
            made = sanitize(again(), lazy)
            self.arrays = {name: made[name] for name in names}

    def take(self, name: str, ranges: Ranges | None) -> mx.array:
        """Return `ranges` of an array and release it."""
        return take(self.arrays.pop(name), ranges)


class CheckpointFill:
    """Fills a split model's arrays, one at a time, from the byte ranges of a checkpoint."""

    def __init__(
        self,
        reader: Reader,
        sources: Mapping[str, Source],
        computed: Computed,
        plan: Plan,
        tp_rank: int,
        dtype: mx.Dtype | None,
        progress: Progress | None,
    ) -> None:
        self.reader, self.sources, self.computed = reader, sources, computed
        self.plan, self.tp_rank, self.dtype, self.progress = plan, tp_rank, dtype, progress

    def __call__(self, model: nn.Module) -> None:
        """Fill every array of `model`, a split model whose arrays are not evaluated."""
        homes = parameter_homes(model)
        done = 0
        total = sum(home[attribute].nbytes for home, attribute in homes.values())
        for name, (home, attribute) in homes.items():
            ranges = local_ranges(home, attribute, name, self.plan, self.tp_rank)
            source = self.sources[name]
            if source.boxes is None:
                array = self.computed.take(name, ranges)
            else:
                wanted = self.dtype or source.dtype
                columns = attribute == "weight" and multiplies_by_columns(home, wanted)
                array = self._read(source, ranges or tuple(((0, size),) for size in source.shape), columns)
            array = self._converted(array, packed=is_packed(home, attribute))
            assert array.shape == home[attribute].shape
            mx.eval(array)
            done += home[attribute].nbytes
            home[attribute] = array
            if self.progress is not None:
                self.progress(done, total)

    def _converted(self, array: mx.array, *, packed: bool) -> mx.array:
        if self.dtype is None or not mx.issubdtype(array.dtype, mx.floating):
            return array
        # Scales and biases determine the dtype of a quantized product; MLX does not support float64 there.
        return array.astype(mx.float32 if packed and self.dtype == mx.float64 else self.dtype)

    def _read(self, source: Source, ranges: Ranges, columns: bool) -> mx.array:
        """The local part of an array, read into its own memory, with contiguous rows or columns."""
        assert source.boxes is not None
        shape = tuple(sum(b - a for a, b in one) for one in ranges)
        with mx.stream(mx.cpu):
            array = mx.zeros(shape[::-1] if columns else shape, _UNSIGNED[source.dtype.size])
            mx.eval(array)
            there = np.asarray(memoryview(array))  # type: ignore[arg-type]
            there = there.T if columns else there
            for box in source.boxes:
                overlap = box.overlap(ranges)
                if overlap is not None:
                    take_ranges, put = overlap
                    self._read_box(box.name, take_ranges, box.axes, there[tuple(slice(a, b) for a, b in put)])
            array = array.view(source.dtype)
            return array.T if columns else array

    def _read_box(
        self, name: str, ranges: list[list[tuple[int, int]]], axes: tuple[int | None, ...], there: np.ndarray[Any, Any]
    ) -> None:
        """Read ranges of a tensor on disk into a view of a local array whose axes correspond to its `axes`."""
        kept = [axis for axis in axes if axis is not None]
        new = tuple(place for place, axis in enumerate(axes) if axis is None)
        target = np.squeeze(there, new) if new else there
        if kept == sorted(kept) and target.flags.c_contiguous:
            self.reader.read(name, ranges, memoryview(target).cast("B"))  # type: ignore[arg-type]
            return
        sizes = [sum(b - a for a, b in one) for one in ranges]
        if kept == [0, 1] == list(range(len(sizes))):
            self._read_rows(name, ranges, sizes[1], target)
            return
        buffer = np.empty(sizes, there.dtype)
        self.reader.read(name, ranges, memoryview(buffer).cast("B"))  # type: ignore[arg-type]
        dropped = tuple(axis for axis in range(len(sizes)) if axis not in kept)
        target[...] = np.transpose(np.squeeze(buffer, dropped), np.argsort(np.argsort(kept)))

    def _read_rows(
        self, name: str, ranges: list[list[tuple[int, int]]], width: int, target: np.ndarray[Any, Any]
    ) -> None:
        """Read ranges of a matrix on disk into a matrix with another memory layout, some rows at a time."""
        buffer = np.empty((_ROWS, width), target.dtype)
        # Rows at a distance of a power of two would evict each other from the cache.
        apart = np.empty((_ROWS, width + _PAD), target.dtype)[:, :width]
        put = 0
        for first, last in ranges[0]:
            for start in range(first, last, _ROWS):
                count = min(_ROWS, last - start)
                block = [[(start, start + count)], ranges[1]]
                self.reader.read(name, block, memoryview(buffer[:count]).cast("B"))  # type: ignore[arg-type]
                apart[:count] = buffer[:count]
                target[put : put + count] = apart[:count]
                put += count
