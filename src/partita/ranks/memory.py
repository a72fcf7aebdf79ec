"""The memory of this process and of its machine."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

RESERVED_PART = 1 / 10
"""The part of a machine's or device's memory that is left free: for what is computed, and for other programs."""


def peak_resident_bytes() -> int:
    """The largest resident memory of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def share_of(free_bytes: int, total_bytes: int, ranks: int) -> int:
    """The bytes that each of `ranks` ranks may take of a machine's or device's free memory, less `RESERVED_PART` of all."""
    return max(0, int(free_bytes - RESERVED_PART * total_bytes) // ranks)


def machine_bytes() -> tuple[int, int]:
    """The free memory of this machine, and all of it; inside a container with a limit, those of the container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _free_bytes(total)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = int(Path(limit).read_text())
            if most < total:
                total, free = most, min(free, most - int(Path(used).read_text()))
    return free, total


def _free_bytes(total: int) -> int:
    """The memory that programs can get without swapping; all of it where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.platform == "darwin":
            text = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
            pages = sum(int(count) for count in re.findall(r"Pages (?:free|inactive|speculative): +(\d+)", text))
            return pages * os.sysconf("SC_PAGE_SIZE")
        found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024  # type: ignore[index]
    return total
