"""What the kernel counts for this process."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def start_peak() -> float:
    """Give back memory that is free, let the peak of resident memory start anew, and return what is resident, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def resident_bytes(field: str) -> float:
    """`VmRSS`, what is resident now, or `VmHWM`, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def counted(field: str) -> float:
    """Bytes of read calls (`rchar`) or write calls (`wchar`); pages of mapped files are not among them."""
    return int(Path("/proc/self/io").read_text().split(f"{field}:")[1].split()[0])
