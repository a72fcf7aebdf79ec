"""Signals of processes that tests start."""

from __future__ import annotations

import signal


def take_signals() -> None:
    """In a child before its program: take interrupts, which a shell lets its processes in the background ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
