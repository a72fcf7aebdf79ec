"""A stopped rank was ended before any rank had reported it; mlx.launch saw that and then ended all others."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from typing import Any

from partita.ranks.liveness import Lines, line_of
from partita.ranks.liveness.coordinator import Coordinator

LIMIT_S = 0.5


def test_a_silent_rank_is_reported_before_it_is_ended() -> None:
    coordinator = Coordinator("127.0.0.1", "token", {"pids": "here"}, LIMIT_S)
    coordinator.start()
    me = {"token": "token", "doing": "working", "pids": "here"}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stopped:
        try:
            with (
                socket.create_connection(("127.0.0.1", coordinator.port)) as first,
                socket.create_connection(("127.0.0.1", coordinator.port)) as silent,
            ):
                silent.sendall(line_of({**me, "rank": 1, "pid": stopped.pid}))
                verdict = _verdict_heard_by(first, {**me, "rank": 0, "pid": 0})
                assert verdict["lost"].startswith(
                    "rank 1 (stage 0) was lost while working: no message from it for 0.5 s"
                )
                assert verdict["silent"] == [[1, "here", stopped.pid]]
                assert stopped.poll() is None
        finally:
            stopped.kill()
    coordinator.join(10.0)
    assert not coordinator.is_alive()


def _verdict_heard_by(channel: socket.socket, me: dict[str, Any]) -> dict[str, Any]:
    """The last message of the coordinator to a rank that tells all the while that it lives."""
    lines = Lines()
    channel.settimeout(0.05)
    until_s = time.monotonic() + 20 * LIMIT_S
    while time.monotonic() < until_s:
        channel.sendall(line_of(me))
        try:
            told = list(lines.take(channel.recv(1 << 16)))
        except TimeoutError:
            continue
        for one in told:
            if "lost" in one:
                return one
    raise AssertionError("the coordinator has not ended the run")
