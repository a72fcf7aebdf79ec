"""Peer: the last reported state of a rank, and the rule for when a silent rank is lost."""

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
"""The exit code of a run that has lost a rank: `EX_TEMPFAIL`, since a retry may succeed."""

LOST_AFTER = "PARTITA_LOST_AFTER"
DEFAULT_LOST_AFTER_S = 30.0
START_FACTOR = 4.0
"""The factor on the allowed silence while a rank starts, since imports may keep its threads from running."""

_MAX_LINE = 1 << 16


def lost_after_s() -> float:
    """The seconds of silence after which a rank is lost: `PARTITA_LOST_AFTER`, else 30; infinity for 0.

    Raises:
        DistributedError: The value is not a number of seconds.
    """
    text = os.environ.get(LOST_AFTER, "").strip()
    try:
        seconds = float(text) if text else DEFAULT_LOST_AFTER_S
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise DistributedError(
            f"{LOST_AFTER} must be a number of seconds, or 0 to wait forever, but is {text!r}. Its default is "
            f"{DEFAULT_LOST_AFTER_S:.0f}."
        )
    return seconds or math.inf


def beat_s(limit_s: float) -> float:
    """Seconds between heartbeats, if a rank is lost after `limit_s` seconds of silence."""
    return min(1.0, limit_s / 8)


@dataclass
class Peer:
    """The reported state of a rank.

    Attributes:
        rank: Global rank number.
        host: Name of the machine.
        pids: Identifier of the process namespace in which `pid` is valid.
        pid: Process number.
        stage: Pipeline rank.
        doing: Activity in the last message.
        heard_s: Time of the last message, as `Uptime` counts.
        is_done: Whether the rank has sent a farewell.
        failure: The failure that the rank has reported, if any.
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

    def take(self, message: dict[str, Any], now_s: float) -> None:
        """Update the state from a message of the rank."""
        self.heard_s = now_s
        for name in ("host", "pids", "pid", "stage", "doing", "is_done", "failure"):
            if name in message:
                setattr(self, name, message[name])

    def silent_s(self, now_s: float) -> float:
        """The seconds since the last message, divided by `START_FACTOR` while the rank starts."""
        return (now_s - self.heard_s) / (START_FACTOR if self.doing == STARTING else 1.0)

    def __str__(self) -> str:
        host = f"host {self.host}, " if self.host else ""
        return f"rank {self.rank} ({host}stage {self.stage})"

    def lost(self, why: str) -> str:
        """The message that the rank is lost."""
        return f"{self} was lost while {self.doing}: {why}"

    def kill_if_stopped(self, pids: str) -> None:
        """Kill the process of a rank that no longer responds, if it runs on this machine."""
        if self.pid and self.pids == pids and self.pid != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def silence(limit_s: float) -> str:
    """The reason to report for a rank that is lost by silence."""
    return f"no message from it for {limit_s:g} s, so it is stopped, disconnected or stuck"


class Lines:
    """Parses messages from a stream of bytes, one JSON object per line. Other lines are skipped."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield the messages that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_MAX_LINE:]
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if isinstance(message, dict):
                yield message


def line_of(message: dict[str, Any]) -> bytes:
    """Encode a message."""
    return json.dumps(message).encode() + b"\n"


class Uptime:
    """A clock that stops while this process is stopped: a stopped process receives nothing, but its peers were not silent."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock; its user must read it at least every `beat_s(limit_s)` seconds."""
        self._gap_s = max(2.0, limit_s / 2)
        self._clock = clock
        self._last_s = clock()
        self._now_s = 0.0

    def now_s(self) -> float:
        """The seconds for which this process has run."""
        now_s = self._clock()
        passed_s, self._last_s = now_s - self._last_s, now_s
        self._now_s += passed_s if passed_s < self._gap_s else 0.0
        return self._now_s
