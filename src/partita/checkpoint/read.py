"""Read pieces of tensors: exactly their bytes, directly into the caller's memory.

This uses positioned reads, not mmap: a page that cannot be read raises an error instead of killing the process, and the data
takes no memory but the caller's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from partita.checkpoint.header import TensorInfo, brief, open_regular, reason
from partita.checkpoint.index import Checkpoint
from partita.errors import CheckpointError

Range = tuple[int, int]
"""(start, stop) along one dim, in elements."""

Box = tuple[Range, ...]
"""One range per dim."""

# macOS rejects calls of 2 GiB, Linux truncates them.
_MAX_CALL_BYTES = 1 << 30
# The system reads ahead in longer runs by itself; sparser runs are read faster one by one.
_SHORT_RUN_BYTES = 16 << 10
_MAX_SPAN_RATIO = 16


def read_box(fd: int, info: TensorInfo, box: Box, out: memoryview) -> int:
    """Read the elements of `box`, in C order, into `out`, which has exactly their size. Returns the bytes read.

    `fd` is the open file of `info`. Raises CheckpointError if `box` or `out` does not fit, or if the file is truncated.
    """
    return read_ranges(fd, info, [(one,) for one in box], out)


def read_ranges(fd: int, info: TensorInfo, ranges_by_dim: Sequence[Sequence[Range]], out: memoryview) -> int:
    """`read_box` with several ranges per dim: along each dim, the piece is the concatenation of its ranges."""
    runs = byte_runs(info, ranges_by_dim)
    out = flat_bytes(info, out, runs.size_bytes, "out")
    if out.readonly:
        raise CheckpointError(f"{info.file}: tensor {brief(info.name)}: out must be writable memory, but is read-only")
    preadv = os.preadv
    done = 0
    try:
        _read_ahead(fd, runs)
        for start, run_bytes in runs:
            end = done + run_bytes
            got = preadv(fd, [out[done:end]], start)
            while got != run_bytes:
                if not got:
                    raise CheckpointError(
                        f"{info.file}: tensor {brief(info.name)}: the file must reach byte {info.end_bytes}, but ends "
                        f"at {start}: it was truncated or replaced since its header was read: download it again"
                    )
                start, run_bytes = start + got, run_bytes - got
                got = preadv(fd, [out[end - run_bytes : end]], start)
            done = end
    except OSError as error:
        raise CheckpointError(f"{info.file}: tensor {brief(info.name)}: cannot be read: {reason(error)}") from error
    return runs.size_bytes


class Reader:
    """Reads pieces of a checkpoint's tensors, from any number of threads. A context manager that closes its files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, name: str, ranges_by_dim: Sequence[Sequence[Range]], out: memoryview) -> None:
        """Read a piece of tensor `name` into `out`, in C order.

        `ranges_by_dim` has for each dim the ranges that the piece concatenates; its size along a
        dim is the sum of their lengths. A part of the heads of a fused QKV weight has three ranges on dim 0:
        `[[(0, 4), (8, 10), (12, 14)], [(0, 64)]]`.

        Raises CheckpointError if there is no such tensor, or the ranges or `out` do not fit it.
        """
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.checkpoint.folder}: tensor {brief(name)} is not in this checkpoint, which holds "
                f"{len(self.checkpoint.tensors)} tensors: {brief(list(self.checkpoint.tensors)[:4])} and so on"
            )
        self.read_as(info, ranges_by_dim, out)

    def read_as(self, info: TensorInfo, ranges_by_dim: Sequence[Sequence[Range]], out: memoryview) -> None:
        """`read` for a tensor that is described otherwise than in the checkpoint, such as blocks as bytes."""
        size_bytes = read_ranges(self.open(info), info, ranges_by_dim, out)
        with self._lock:
            self.bytes_read += size_bytes

    def close(self) -> None:
        """Close the files. Further reads open them again."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, info: TensorInfo) -> int:
        """The open file of a tensor, which stays open until `close`."""
        with self._lock:
            fd = self._fds.get(info.file)
            if fd is None:
                fd = self._fds[info.file] = open_regular(info.file)[0]
            return fd


@dataclass(frozen=True)
class Runs:
    """The byte runs of a piece of `size_bytes` in its file: from each start, each of `parts`, in the piece's C order.

    A start is `start_bytes` plus one offset of each of `outer`, the last varying fastest. A part is (offset, size).
    """

    size_bytes: int
    start_bytes: int
    outer: tuple[tuple[range, ...], ...]
    parts: tuple[Range, ...]

    def __iter__(self) -> Iterator[Range]:
        """Each run's (start_bytes, size_bytes)."""
        for start in _starts(self.start_bytes, self.outer):
            for offset, size_bytes in self.parts:
                yield start + offset, size_bytes

    def span(self) -> Range:
        """(start_bytes, size_bytes) from the first byte of all runs to the last."""
        first = sum(min(one.start for one in offsets) for offsets in self.outer)
        last = sum(max(one[-1] for one in offsets) for offsets in self.outer)
        first += min(offset for offset, _ in self.parts)
        last += max(sum(part) for part in self.parts)
        return self.start_bytes + first, last - first


def byte_runs(info: TensorInfo, ranges_by_dim: Sequence[Sequence[Range]]) -> Runs:
    """The byte runs of a piece of a tensor. Raises CheckpointError if the ranges do not fit it.

    Complete dims at the end merge with the dim before them, so that runs are as long as possible.
    """
    ranges = _check_ranges(info, ranges_by_dim)
    size_bits = bits = info.itemsize_bits
    for one in ranges:
        size_bits *= sum(stop - start for start, stop in one)
    if not size_bits:
        return Runs(0, info.start_bytes, (), ())
    cut = len(ranges)  # the dims from here on are complete
    while cut and ranges[cut - 1] == [(0, info.shape[cut - 1])]:
        cut -= 1
        bits *= info.shape[cut]
    if not cut:
        return Runs(info.nbytes, info.start_bytes, (), _parts([(0, info.nbytes)]))
    segments_bits = [(start * bits, (stop - start) * bits) for start, stop in ranges[cut - 1]]
    whole = all(offset % 8 == 0 and size % 8 == 0 for offset, size in segments_bits)
    outer: list[tuple[range, ...]] = []
    for dim in reversed(range(cut - 1)):
        bits *= info.shape[dim + 1]
        whole = whole and bits % 8 == 0
        stride = bits // 8
        outer.append(tuple(range(start * stride, stop * stride, stride or 1) for start, stop in ranges[dim]))
    if not whole:
        raise CheckpointError(
            f"{info.file}: tensor {brief(info.name)}: {info.dtype} has {info.itemsize_bits} bits an element, so it "
            f"must be split between bytes, but {brief(ranges_by_dim)} of {brief(info.shape)} is not: "
            "split fewer of its dims"
        )
    parts = _parts([(offset // 8, size // 8) for offset, size in segments_bits])
    return Runs(size_bits // 8, info.start_bytes, tuple(reversed(outer)), parts)


def flat_bytes(info: TensorInfo, memory: memoryview, size_bytes: int, what: str) -> memoryview:
    """`memory` as a flat view of bytes, or CheckpointError if it has another size, or gaps."""
    if memory.nbytes != size_bytes or not memory.c_contiguous:
        raise CheckpointError(
            f"{info.file}: tensor {brief(info.name)}: {what} must be {size_bytes} bytes in C order, but has "
            f"{memory.nbytes}{'' if memory.c_contiguous else ' in another order'}"
        )
    return memory.cast("B") if size_bytes else memory


def _check_ranges(info: TensorInfo, ranges_by_dim: Sequence[Sequence[Range]]) -> list[list[Range]]:
    """The ranges of each dim, without empty ones, and with those that touch joined."""
    where = f"{info.file}: tensor {brief(info.name)} of shape {brief(info.shape)}"
    if len(ranges_by_dim) != len(info.shape):
        raise CheckpointError(
            f"{where}: there must be ranges for {len(info.shape)} dims, but there are {len(ranges_by_dim)}"
        )
    checked: list[list[Range]] = []
    for dim, (size, ranges) in enumerate(zip(info.shape, ranges_by_dim, strict=True)):
        joined: list[Range] = []
        for start, stop in ranges:
            if not 0 <= start <= stop <= size:
                raise CheckpointError(
                    f"{where}: a range of dim {dim} must be within 0 to {size}, but is {brief((start, stop))}"
                )
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            elif start < stop:
                joined.append((start, stop))
        checked.append(joined)
    return checked


def _starts(start_bytes: int, outer: Sequence[Sequence[range]]) -> Iterator[int]:
    """`start_bytes` plus one offset of each of `outer`, the last varying fastest."""
    if not outer:
        yield start_bytes
        return
    for offsets in outer[0]:
        if len(outer) == 1:
            yield from range(start_bytes + offsets.start, start_bytes + offsets.stop, offsets.step)
        else:
            for offset in offsets:
                yield from _starts(start_bytes + offset, outer[1:])


def _parts(segments: Sequence[Range]) -> tuple[Range, ...]:
    """`segments`, each an (offset, size), in parts that one call can read or write."""
    return tuple(
        (offset + done, min(_MAX_CALL_BYTES, size_bytes - done))
        for offset, size_bytes in segments
        for done in range(0, size_bytes, _MAX_CALL_BYTES)
    )


def _read_ahead(fd: int, runs: Runs) -> None:
    """Let the system prefetch the complete span of short runs, since it does not read ahead over gaps.

    Measured on a [4096, 4096] float32 tensor not in memory, an eighth of each row: 59 ms, and 273 ms without.
    """
    if not runs.outer or max(size for _, size in runs.parts) > _SHORT_RUN_BYTES:
        return
    start_bytes, size_bytes = runs.span()
    if sys.platform == "linux" and size_bytes <= _MAX_SPAN_RATIO * runs.size_bytes:
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, start_bytes, size_bytes, os.POSIX_FADV_WILLNEED)
