"""Window: a mapped part of a file, a few megabytes, through which many short runs are written as one copy.

A call that writes 2 KiB costs several times their copy, and ranks that write into one file block each other in every call.
Pages of a mapped file are shared by the processes of a machine, so ranks that write to one page do not overwrite each
other. Between machines they would: an NFS client sends whole pages. So this is limited to local file systems, and to files
whose space is reserved, since a mapped page without space on disk kills the process. Otherwise runs are written call by call.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from partita.checkpoint.read import Runs

WINDOW_BYTES = 8 << 20
"""Bytes of a file that are mapped at once."""

# Two ranks that write halves of rows into one file of 92 MiB on ext4, by calls and through windows: halves of 512 bytes
# 300 and 65 ms, 2 KiB 185 and 60, 5.5 KiB 100 and 70, 11 KiB 85 and 75.
_SHORT_RUN_BYTES = 8 << 10
_MIN_BYTES = 32 * _SHORT_RUN_BYTES
_FILE_SYSTEMS = ("ext4", "xfs", "tmpfs")
_BLOCK_BYTES = 512  # unit of st_blocks on every file system


def has_windows(fd: int) -> bool:
    """Whether an open file may be written through windows: on a local file system, with all its space reserved."""
    status = os.fstat(fd)
    return status.st_blocks * _BLOCK_BYTES >= status.st_size and _file_system(status.st_dev) in _FILE_SYSTEMS


@functools.cache
def _file_system(device: int) -> str | None:
    """The file system type of a mounted device from Linux (proc_pid_mountinfo(5)); None if it is unknown."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return None
    return next((fields[fields.index("-") + 1] for fields in mounts if fields[2] == number), None)


def is_short(runs: Runs) -> bool:
    """Whether a window is faster: there are many runs, none of them long."""
    return runs.size_bytes >= _MIN_BYTES and max(size for _, size in runs.parts) < _SHORT_RUN_BYTES


def write_runs(fd: int, runs: Runs, data: memoryview) -> None:
    """Write `data` to the runs of a piece, in their order. `fd` is open for reading and writing.

    Raises:
        OSError: The write fails.
    """
    first = min(offset for offset, _ in runs.parts)
    last = max(sum(part) for part in runs.parts)
    done = 0
    for start, count, stride in _blocks(runs):
        base = start + first - (start + first) % mmap.ALLOCATIONGRANULARITY
        end = start + (count - 1) * stride + last
        with mmap.mmap(fd, end - base, offset=base) as mapped, memoryview(mapped) as window:
            for row in range(start - base, start - base + count * stride, stride):
                for offset, size in runs.parts:
                    window[row + offset : row + offset + size] = data[done : done + size]
                    done += size


def _blocks(runs: Runs) -> Iterator[tuple[int, int, int]]:
    """Evenly spaced rows, at most a window of them: (start of the first, number of rows, bytes from one to the next)."""
    if not runs.outer:
        yield runs.start_bytes, 1, 1
        return
    *outer, inner = runs.outer
    for offsets in product(*([at for one in dim for at in one] for dim in outer)):
        for one in inner:
            start, stride = runs.start_bytes + sum(offsets) + one.start, one.step
            most = max(1, WINDOW_BYTES // stride)
            for done in range(0, len(one), most):
                yield start + done * stride, min(most, len(one) - done), stride
