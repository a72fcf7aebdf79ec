"""This process as one rank of a run, started by our launcher (`PARTITA_LINE`), torchrun, mpirun or mlx.launch, or alone.

A rank that our launcher started is connected to it by a socket, the line. Over it the rank sends heartbeats, and the reason
if it fails. When the line closes, the launcher has ended, and the rank ends itself and the processes that it started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import Any

from partita.ranks import liveness
from partita.ranks.environment import has_met_others, number

LINE = "PARTITA_LINE"
MAX_MESSAGE = 16_000
"""Longer failure messages are truncated to this many characters."""

_is_ours = False


def attach() -> None:
    """Connect to the launcher, if this process is a rank that our launcher started."""
    global _is_ours
    text = os.environ.pop(LINE, None)
    if text is None:
        return
    _is_ours = True
    os.set_inheritable(int(text), False)
    _wake_with_line()
    liveness.attach(int(text), number())


def _wake_with_line() -> None:
    """On Linux, let the kernel wake a stopped rank when its launcher dies, so that it detects the closed line."""
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGCONT)


def is_ours() -> bool:
    """Whether our launcher started this rank, and therefore prints its failures."""
    return _is_ours


def report(failure: dict[str, Any]) -> None:
    """Send a failure to the launcher or to the other ranks."""
    liveness.send_failure({**failure, "message": failure["message"][:MAX_MESSAGE], "time_s": time.monotonic()})


def leave(code: int) -> None:
    """End a failed rank immediately: closing its groups could wait for lost ranks. Does nothing in a run without ranks."""
    if _is_ours or has_met_others():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
