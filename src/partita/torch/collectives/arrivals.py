"""Arrivals: counters in shared memory by which the ranks of one host await each other before a collective of Open MPI.

Open MPI spins while it waits. Its setting to sleep makes a small all-reduce take 60 us, not 4. Its nonblocking collectives
could be polled, but take twice the time for 1 MB and add in another order. So each rank counts its calls, waits until all have
made theirs, and only then calls the blocking collective, whose algorithm and bits stay the same.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from partita.ranks.waiting import wait_until

_STEP = 8
"""Counters of 8 bytes from one rank's to the next: each has its own cache line."""


class Arrivals:
    """The counters of one communicator, each of which is written by one rank alone.

    Without shared memory (ranks of several hosts, for example) `all` returns immediately.
    """

    def __init__(self, mpi: Any, communicator: Any) -> None:
        """Create the counters of `communicator`, a communicator of the module `mpi`. Every rank of it must call this."""
        self._calls = 0
        self._own = _STEP * communicator.rank
        self._others: tuple[int, ...] = ()
        memory = _shared(mpi, communicator, 8 * _STEP * communicator.size)
        if memory is not None:
            self._counters = memoryview(memory).cast("q")
            self._others = tuple(_STEP * rank for rank in range(communicator.size) if rank != communicator.rank)

    def all(self) -> None:
        """Return when every rank has called this as often as this rank."""
        if not self._others:
            return
        self._calls = calls = self._calls + 1
        counters = self._counters
        counters[self._own] = calls
        for other in self._others:
            if counters[other] < calls:
                wait_until(partial(self._has_made, other, calls))

    def _has_made(self, other: int, calls: int) -> bool:
        return self._counters[other] >= calls


def _shared(mpi: Any, communicator: Any, size_bytes: int) -> mmap.mmap | None:
    """Zeros that all ranks of `communicator` share; None on every rank if some rank cannot reach them."""
    local = communicator.Split_type(mpi.COMM_TYPE_SHARED)
    is_local = local.size == communicator.size
    local.Free()
    if not all(communicator.allgather(is_local)):
        return None
    path, memory = "", None
    if communicator.rank == 0:
        with suppress(OSError):
            descriptor, path = tempfile.mkstemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
            os.ftruncate(descriptor, size_bytes)
            os.close(descriptor)
    path = communicator.bcast(path)
    with suppress(OSError, ValueError), open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), size_bytes)
    can_all = all(communicator.allgather(memory is not None))
    if communicator.rank == 0:
        with suppress(OSError):
            Path(path).unlink(missing_ok=True)
    return memory if can_all else None
