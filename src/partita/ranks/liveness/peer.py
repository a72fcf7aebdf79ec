"""Peer: what is known of a rank by what it has told, and when that is so long ago that it is lost."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from partita.errors import DistributedError
from partita.ranks.liveness.activity import STARTING

LOST = 75
"""The exit code of a run that has lost a rank: `EX_TEMPFAIL`, as to try again may help."""

LOST_AFTER = "PARTITA_LOST_AFTER"
DEFAULT_LOST_AFTER_S = 30.0
START_FACTOR = 4.0
"""How many times as long a rank may be silent while it starts: imports may keep its threads from running."""

_MAX_LINE = 1 << 16


def lost_after_s() -> float:
    """After how many seconds of silence a rank is lost: `PARTITA_LOST_AFTER`, else 30; infinity for 0.

    Raises:
        DistributedError: It is no number of seconds.
    """
    text = os.environ.get(LOST_AFTER, "").strip()
    try:
        seconds = float(text) if text else DEFAULT_LOST_AFTER_S
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise DistributedError(
            f"{LOST_AFTER} must be a number of seconds, or 0 to wait for ever, but is {text!r}. Its default is "
            f"{DEFAULT_LOST_AFTER_S:.0f}."
        )
    return seconds or math.inf


def beat_s(limit_s: float) -> float:
    """How often a rank tells that it lives, where it is lost after `limit_s` seconds."""
    return min(1.0, limit_s / 8)


@dataclass
class Peer:
    """A rank, as it has told of itself.

    Attributes:
        rank: Which.
        host: The name of its machine.
        pids: What the machine is called on which its process is `pid`.
        pid: Its process.
        stage: Its place in the pipeline.
        doing: What it was doing when it was heard last.
        heard_s: When that was, as `Uptime` counts.
        is_done: Whether it has said farewell.
        failure: What went wrong with it, if it has said so.
    """

    rank: int
    host: str = ""
    pids: str = ""
    pid: int = 0
    stage: int = 0
    doing: str = STARTING
    heard_s: float = 0.0
    is_done: bool = False
    failure: dict[str, Any] | None = None

    def take(self, told: dict[str, Any], now_s: float) -> None:
        """Take in what it tells."""
        self.heard_s = now_s
        for name in ("host", "pids", "pid", "stage", "doing", "is_done", "failure"):
            if name in told:
                setattr(self, name, told[name])

    def silent_s(self, now_s: float) -> float:
        """For how long nothing was heard of it; while it starts a part of that."""
        return (now_s - self.heard_s) / (START_FACTOR if self.doing == STARTING else 1.0)

    def __str__(self) -> str:
        host = f"host {self.host}, " if self.host else ""
        return f"rank {self.rank} ({host}stage {self.stage})"

    def lost(self, why: str) -> str:
        """The message that it is lost."""
        return f"{self} was lost while {self.doing}: {why}"

    def kill_if_stopped(self, pids: str) -> None:
        """End a process that hears nothing any more, if it is on this machine."""
        if self.pid and self.pids == pids and self.pid != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def silence(limit_s: float) -> str:
    """Why a rank is lost of which nothing was heard."""
    return f"nothing was heard of it for {limit_s:g} s, so it is stopped, cut off or stuck"


class Lines:
    """Messages out of a stream of bytes: a JSON object a line. What is none is passed over."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The messages that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_MAX_LINE:]
        for line in lines:
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if isinstance(told, dict):
                yield told


def line_of(told: dict[str, Any]) -> bytes:
    """A message as it is sent."""
    return json.dumps(told).encode() + b"\n"


class Uptime:
    """A clock that stands still while this process does: who was stopped has not listened, and nobody else was silent."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """The clock of who looks at least each `beat_s(limit_s)`."""
        self._gap_s = max(2.0, limit_s / 2)
        self._clock = clock
        self._last_s = clock()
        self._now_s = 0.0

    def now_s(self) -> float:
        """Seconds in which this process has run; called at each look."""
        now_s = self._clock()
        passed_s, self._last_s = now_s - self._last_s, now_s
        self._now_s += passed_s if passed_s < self._gap_s else 0.0
        return self._now_s
