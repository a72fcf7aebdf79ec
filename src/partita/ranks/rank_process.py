"""This process as one rank of a run: of ours, told by `PARTITA_LINE`, of torchrun's, mpirun's or mlx.launch's, or alone.

A rank that our launcher started holds one end of a line (a socket) to it. There the rank tells that it lives, and why it
fails. When the line ends, the launcher is gone, killed perhaps, and the rank ends itself with all that it started.
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
"""Characters of a failure that are sent to the launcher."""

_is_ours = False


def attach() -> None:
    """Take up the line to the launcher, where this process is a rank that it started."""
    global _is_ours
    text = os.environ.pop(LINE, None)
    if text is None:
        return
    _is_ours = True
    os.set_inheritable(int(text), False)
    _wake_with_line()
    liveness.attach(int(text), number())


def _wake_with_line() -> None:
    """On Linux the kernel wakes a rank that is stopped when its launcher dies, so that it can see that its line has ended."""
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGCONT)


def is_ours() -> bool:
    """Whether our launcher started this rank, and shows what goes wrong with it."""
    return _is_ours


def report(failure: dict[str, Any]) -> None:
    """Tell the launcher, or the other ranks, of a failure."""
    liveness.tell_failure({**failure, "message": failure["message"][:MAX_MESSAGE], "time_s": time.monotonic()})


def leave(code: int) -> None:
    """End a rank that failed at once: closing its groups could wait for ranks that are gone. Does nothing without ranks."""
    if _is_ours or has_met_others():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
