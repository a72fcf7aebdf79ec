"""Heartbeat: a thread in each rank that sends its activity, receives reports of lost ranks, and then ends the rank."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from partita.errors import PartitaError, PeerFailed
from partita.ranks.addresses import addresses, connect, places
from partita.ranks.liveness.activity import ME, STARTING
from partita.ranks.liveness.coordinator import Coordinator
from partita.ranks.liveness.peer import LOST, Lines, Peer, Uptime, beat_s, line_of, lost_after_s, silence

VERDICT_S = 5.0
"""Seconds for which a rank whose connections break waits for the reason."""

WORDS_S = 3.0
"""Seconds that a rank has to tell its clients why it ends."""


class _Heartbeat(threading.Thread):
    """Sends and receives messages over one channel, to the launcher or to the coordinator.

    Attributes:
        rank: This rank.
        coordinator: The reported state of rank 0, None if the channel leads to the launcher.
        is_reporter: Set when the coordinator has chosen this rank to report the failure of the run.
        has_reported: Set when this rank has reported it.
    """

    def __init__(
        self, channel: socket.socket, rank: int, coordinator: Peer | None, limit_s: float, stall_s: float
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.channel, self.rank, self.coordinator = channel, rank, coordinator
        self.limit_s, self.stall_s = limit_s, stall_s
        self.first: dict[str, Any] = {**_me(), "rank": rank}
        self.sending = threading.Lock()
        self.done = threading.Event()
        self.is_reporter = threading.Event()
        self.has_reported = threading.Event()
        self.is_leaving = False
        self._sent_s = 0.0

    def run(self) -> None:
        """Send and receive messages until the rank sends its farewell."""
        with self.channel:
            self._watch()

    def _watch(self) -> None:
        clock, lines = Uptime(self.limit_s), Lines()
        tick_s = min(beat_s(self.limit_s), self.stall_s / 4)
        self.send({**self.first, **_now()})
        selector = selectors.DefaultSelector()  # not `select`, which is limited to descriptors up to 1023
        selector.register(self.channel, selectors.EVENT_READ)
        while not self.done.is_set():
            readable = bool(selector.select(tick_s))
            now_s = clock.now_s()
            if readable:
                data = b""
                with contextlib.suppress(OSError):
                    data = self.channel.recv(1 << 16)
                if self.is_leaving or self.done.is_set():
                    return
                for message in lines.take(data):
                    self._take(message, now_s)
                if not data:
                    self._end_of_channel()
                    return
            if not readable or now_s - self._sent_s >= tick_s / 2:
                self.send(_now())
                self._sent_s = now_s
            if self.coordinator is not None and now_s - self.coordinator.heard_s > self.limit_s:
                self._say(self.coordinator.lost(silence(self.limit_s)))
                time.sleep(3 * tick_s)  # until the others have detected it too, so that they do not report the kill
                self.coordinator.kill_if_stopped(self.first["pids"])
                os._exit(LOST)
            since_s = ME.since_s
            if since_s is not None and time.monotonic() - since_s > self.stall_s:
                self._stalled()

    def _take(self, message: dict[str, Any], now_s: float) -> None:
        if "lost" in message:
            self._say(message["lost"])
            _last_words(message["lost"])
            for rank, pids, pid in message.get("silent", ()):
                Peer(rank, pids=pids, pid=pid).kill_if_stopped(self.first["pids"])
            os._exit(LOST)
        elif "failed" in message:
            self._end_with(message["failed"])
        elif self.coordinator is not None:
            self.coordinator.take(message, now_s)
            if self.coordinator.is_done:
                self.done.set()

    def _end_of_channel(self) -> None:
        if self.coordinator is not None:
            self._end(self.coordinator.lost("its process has ended"), LOST)
        # The launcher has ended, so no other process would end those that this rank has started.
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def _end_with(self, failed: dict[str, Any]) -> None:
        """End after another rank's failure, which that rank prints itself on its own machine."""
        if failed["rank"] == self.rank:
            self.is_reporter.set()
            self.has_reported.wait(VERDICT_S)
            self.done.set()
            return
        is_shown = failed.get("machine") == self.first["machine"]
        text = f"{failed['who']} failed while {failed['doing']}: {failed.get('message', '')}"
        _last_words(text)
        self._end("" if is_shown else text, int(failed.get("code", 1)) or 1)

    def _stalled(self) -> None:
        text = f"it has waited {self.stall_s:.0f} s in {ME.call} while {ME.task}: another rank does not reach it, or is lost."
        if self.coordinator is None:
            self.send({"failure": {"code": LOST, "message": text, "echo": False, "time_s": time.monotonic()}})
            time.sleep(VERDICT_S)
        self._end(text, LOST)

    def _end(self, message: str, code: int) -> None:
        """End this process, whatever its threads are doing."""
        if message:
            self._say(message)
        os._exit(code)

    def _say(self, message: str) -> None:
        """Print to stderr without any lock that another thread may hold, and clear a progress bar."""
        begin = "\r\x1b[K\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{begin}error: rank {self.rank}: {message}\n".encode())

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. Errors are ignored here: the receiving side detects a closed channel."""
        with self.sending, contextlib.suppress(OSError):
            self.channel.sendall(line_of(message))


_listener: Callable[[str], None] | None = None


def on_loss(call: Callable[[str], None] | None) -> None:
    """Call `call` with the reason before another rank's loss ends this process; it must return within `WORDS_S`."""
    global _listener
    _listener = call


def _last_words(message: str) -> None:
    if _listener is not None:
        _listener(message)


_heartbeat: _Heartbeat | None = None
_coordinator: Coordinator | None = None


def attach(line: int, rank: int) -> None:
    """Start the heartbeat of this rank to the launcher, over its end of a socket.

    Raises:
        DistributedError: `PARTITA_LOST_AFTER` is not a number.
    """
    global _heartbeat
    _heartbeat = _Heartbeat(socket.socket(fileno=line), rank, None, lost_after_s(), math.inf)
    _heartbeat.start()


def has_joined() -> bool:
    """Whether this rank sends heartbeats to other ranks or to the launcher."""
    return _heartbeat is not None


def join(
    rank: int,
    ranks: int,
    gather: Callable[[Any], list[Any]],
    *,
    limit_s: float | None = None,
    stall_s: float = math.inf,
) -> None:
    """Make all ranks of a run monitor each other until the process ends; every rank must call this.

    The launcher monitors a rank that is attached to it; such a rank only sets `stall_s`.

    Args:
        rank: This rank.
        ranks: Number of ranks.
        gather: All-gather of JSON values, in rank order.
        limit_s: Seconds of silence after which a rank is lost, 0 for never; rank 0's value applies. Default: `lost_after_s()`.
        stall_s: Seconds after which a rank gives up in one call that waits for others.

    Raises:
        DistributedError: `PARTITA_LOST_AFTER` is not a number.
    """
    global _heartbeat, _coordinator
    ME.task = "working" if ME.task == STARTING else ME.task
    if _heartbeat is not None:
        _heartbeat.stall_s = stall_s
        return
    if ranks == 1:
        return
    own_limit_s = lost_after_s() if limit_s is None else limit_s
    machines = gather([_machine("net"), own_limit_s if math.isfinite(own_limit_s) else 0.0])
    limit_s = float(machines[0][1])
    if not limit_s:
        return
    offer = None
    if rank == 0:
        is_local = len({machine for machine, _ in machines}) == 1
        token = secrets.token_hex(16)
        _coordinator = _listen(is_local, token, limit_s)
        offer = [addresses(is_local), _coordinator.port, token, socket.gethostname()]
    hosts, port, token, host = gather(offer)[0]
    channel = connect(hosts, port)
    if channel is None:
        _say(f"rank {rank} cannot connect to rank 0 ({', '.join(hosts)}), so it will not detect lost ranks.")
        return
    _heartbeat = _Heartbeat(channel, rank, Peer(0, host=host), limit_s, stall_s)
    _heartbeat.first["token"] = token
    if _coordinator is not None:
        _coordinator.start()
    _heartbeat.start()
    atexit.register(farewell)
    # A process of multiprocessing (and of torch's spawn) ends without running atexit.
    Finalize(None, farewell, exitpriority=0)


def send_failure(failure: dict[str, Any]) -> None:
    """Send the others the reason why this rank ends, which it then prints itself. Does nothing without a heartbeat.

    If ranks fail together, the coordinator chooses one, and this call ends the processes of the others.
    """
    if _heartbeat is None:
        return
    _heartbeat.send({"failure": {**failure, "machine": _heartbeat.first["machine"]}})
    if _heartbeat.coordinator is not None:
        _heartbeat.is_reporter.wait(VERDICT_S)


def failure_was_printed() -> None:
    """Let the other ranks end, after this rank has printed the failure that it sent."""
    if _heartbeat is not None:
        _heartbeat.has_reported.set()
    if _coordinator is not None:
        _coordinator.closed.wait(VERDICT_S)


def wait_for_verdict() -> None:
    """After a broken connection, wait for the reason: if another rank was lost or failed, this ends the process."""
    if _heartbeat is not None and _heartbeat.coordinator is not None:
        time.sleep(VERDICT_S)


def farewell() -> None:
    """End the monitoring of this rank, which has finished its work."""
    global _heartbeat, _coordinator
    heartbeat, coordinator = _heartbeat, _coordinator
    if heartbeat is None or heartbeat.coordinator is None:
        return
    error = getattr(sys, "last_value", None) or sys.exc_info()[1]
    if error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        if is_echo(error):
            wait_for_verdict()
        send_failure({"code": 1, "message": f"{type(error).__name__}: {error}", "echo": is_echo(error)})
        failure_was_printed()
        return
    _heartbeat = _coordinator = None
    if coordinator is not None:
        coordinator.closing.set()
    heartbeat.is_leaving = True
    heartbeat.send({"is_done": True})
    heartbeat.done.set()
    if coordinator is not None:
        coordinator.close()


# The errors of gloo, Open MPI, NCCL and MLX's ring for a connection whose remote end has gone.
_ECHO = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|socket closed|recvvalue failed|failed to recv|connection refused|"
    r"peer .*(closed|gone|lost)",
    re.IGNORECASE,
)


def is_echo(error: BaseException) -> bool:
    """Whether an error only reports that another rank has failed or is gone: ours by its type, a backend's by its text."""
    if isinstance(error, PartitaError):
        return isinstance(error, PeerFailed)
    return _ECHO.search(str(error)) is not None


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine("net"),
        "pids": _machine("net", "pid"),
        "pid": os.getpid(),
    }


def _now() -> dict[str, Any]:
    return {"stage": ME.stage, "doing": str(ME)}


def _machine(*spaces: str) -> str:
    """An identifier of this machine. Two containers on it differ if they differ in one of these namespaces."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "/".join([boot, *(str(Path(f"/proc/self/ns/{space}").stat().st_ino) for space in spaces)])
    except OSError:
        return socket.gethostname()


def _listen(is_local: bool, token: str, limit_s: float) -> Coordinator:
    """Create the coordinator, on the loopback unless ranks run on other machines."""
    for address in places(is_local)[:-1]:
        with contextlib.suppress(OSError):
            return Coordinator(address, token, _me(), limit_s)
    return Coordinator(places(is_local)[-1], token, _me(), limit_s)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"warning: {text}\n".encode())
