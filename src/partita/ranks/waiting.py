"""Waiting for another rank: at once while nobody else needs the core, asleep when the wait is long or the machine is busy.

A rank that spins delays whatever its core could do instead, often the very rank it waits for. A rank that sleeps notices the
end of its wait late. `wait_until` bounds both: a yield that returns immediately shows that nobody needs the core.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

YIELD_S = 1e-3
"""Seconds of yielding before the first sleep."""

BUSY_S = 100e-6
"""A yield that takes longer has run another process on this core. The rank then sleeps."""

BUSY_FOR_S = 50e-3
"""Seconds for which waits sleep at once after such a yield: each yield could cost a whole time slice of a busy process, but a
process that wakes up runs soon."""

SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 20e-6, 1e-3

SLEEP_PART = 1 / 8
"""Each sleep lasts this part of the time waited, so that sleeping prolongs a wait by at most this part."""

_busy_until_s = 0.0


def open_mpi_waits(ranks: int) -> dict[str, str]:
    """Open MPI's settings for the waits inside its calls, with `ranks` ranks on this machine.

    A waiting rank yields its core. With more ranks than cores it sleeps (1 us, which Linux rounds up to about 55 us): a yield
    would cost it a time slice of any process that computes, 3 ms and more, where one that wakes up runs soon.
    """
    yields = {"OMPI_MCA_mpi_yield_when_idle": "1"}
    if ranks <= cores():
        return yields
    return yields | {
        "OMPI_MCA_threads_pthreads_yield_strategy": "nanosleep",
        "OMPI_MCA_threads_pthreads_nanosleep_time": "1000",
    }


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def wait_until(is_over: Callable[[], object]) -> None:
    """Return when `is_over()` is true, which another process brings about."""
    if is_over():
        return
    start_s = time.monotonic()
    if start_s > _busy_until_s and _yield_until(is_over, start_s):
        return
    while not is_over():
        sleep_s = SLEEP_PART * (time.monotonic() - start_s)
        time.sleep(min(max(sleep_s, SHORTEST_SLEEP_S), LONGEST_SLEEP_S))


def _yield_until(is_over: Callable[[], object], start_s: float) -> bool:
    """Yield while nobody else needs the core; whether the wait is over."""
    global _busy_until_s
    before_s = start_s
    while before_s - start_s < YIELD_S:
        os.sched_yield()
        if is_over():
            return True
        now_s = time.monotonic()
        if now_s - before_s > BUSY_S:
            _busy_until_s = now_s + BUSY_FOR_S
            return False
        before_s = now_s
    return False
