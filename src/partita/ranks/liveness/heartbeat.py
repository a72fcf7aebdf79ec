"""Member: the thread of a rank that tells that it lives, hears who does not, and then ends the rank."""

from __future__ import annotations

import atexit
import contextlib
import json
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
from partita.ranks.liveness.activity import ME, STARTING
from partita.ranks.liveness.coordinator import Hub
from partita.ranks.liveness.peer import LOST, Lines, Peer, Uptime, beat_s, line_of, lost_after_s, silence

CONNECT_S = 5.0
"""How long a rank tries each address of the hub."""

VERDICT_S = 5.0
"""How long a rank whose connections break waits to hear why."""


class _Member(threading.Thread):
    """Tells and hears by one channel, to the launcher or to a hub.

    Attributes:
        rank: This one.
        hub: Rank 0 as it has told of itself, None where the channel goes to the launcher.
    """

    def __init__(self, channel: socket.socket, rank: int, hub: Peer | None, limit_s: float, stall_s: float) -> None:
        super().__init__(name="peers member", daemon=True)
        self.channel, self.rank, self.hub = channel, rank, hub
        self.limit_s, self.stall_s = limit_s, stall_s
        self.first: dict[str, Any] = {**_me(), "rank": rank}
        self.sending = threading.Lock()
        self.done = threading.Event()
        self.is_leaving = False
        self._told_s = 0.0

    def run(self) -> None:
        """Tell and hear until the rank says farewell."""
        with self.channel:
            self._watch()

    def _watch(self) -> None:
        clock, lines = Uptime(self.limit_s), Lines()
        tick_s = min(beat_s(self.limit_s), self.stall_s / 4)
        self.send({**self.first, **_now()})
        heard = selectors.DefaultSelector()  # not `select`, which takes no descriptors beyond 1023
        heard.register(self.channel, selectors.EVENT_READ)
        while not self.done.is_set():
            readable = bool(heard.select(tick_s))
            now_s = clock.now_s()
            if readable:
                data = b""
                with contextlib.suppress(OSError):
                    data = self.channel.recv(1 << 16)
                if self.is_leaving or self.done.is_set():
                    return
                for told in lines.take(data):
                    self._take(told, now_s)
                if not data:
                    self._end_of_channel()
                    return
            if not readable or now_s - self._told_s >= tick_s / 2:
                self.send(_now())
                self._told_s = now_s
            if self.hub is not None and now_s - self.hub.heard_s > self.limit_s:
                self._say(self.hub.lost(silence(self.limit_s)))
                time.sleep(3 * tick_s)  # until the others have noticed too, and do not take the killing for the loss
                self.hub.kill_if_stopped(self.first["pids"])
                os._exit(LOST)
            since_s = ME.since_s
            if since_s is not None and time.monotonic() - since_s > self.stall_s:
                self._stalled()

    def _take(self, told: dict[str, Any], now_s: float) -> None:
        if "lost" in told:
            self._say(told["lost"])
            for rank, pids, pid in told.get("silent", ()):
                Peer(rank, pids=pids, pid=pid).kill_if_stopped(self.first["pids"])
            os._exit(LOST)
        elif "failed" in told:
            self._end_with(told["failed"])
        elif self.hub is not None:
            self.hub.take(told, now_s)
            if self.hub.is_done:
                self.done.set()

    def _end_of_channel(self) -> None:
        if self.hub is not None:
            self._end(self.hub.lost("its process has ended"), LOST)
        # The launcher is gone, killed perhaps, and nobody else would end what this rank has started.
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def _end_with(self, failed: dict[str, Any]) -> None:
        """Another rank has failed, and says so itself where its terminal is."""
        if failed["rank"] == self.rank:
            self.done.set()
            return
        is_shown = failed.get("machine") == self.first["machine"]
        text = f"{failed['who']} failed while {failed['doing']}: {failed.get('message', '')}"
        self._end("" if is_shown else text, int(failed.get("code", 1)) or 1)

    def _stalled(self) -> None:
        text = f"it has waited {self.stall_s:.0f} s in {ME.call} while {ME.task}: another rank does not come to it, or is lost."
        if self.hub is None:
            self.send({"failure": {"code": LOST, "message": text, "echo": False, "time_s": time.monotonic()}})
            time.sleep(VERDICT_S)
        self._end(text, LOST)

    def _end(self, message: str, code: int) -> None:
        """End this process, in whatever its threads are."""
        if message:
            self._say(message)
        os._exit(code)

    def _say(self, message: str) -> None:
        """Tell the user, past a progress bar and past what other threads hold."""
        begin = "\r\x1b[K\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{begin}error: rank {self.rank}: {message}\n".encode())

    def send(self, told: dict[str, Any]) -> None:
        """Tell the other end, which may be gone: that is found out by hearing."""
        with self.sending, contextlib.suppress(OSError):
            self.channel.sendall(line_of(told))


_member: _Member | None = None
_hub: Hub | None = None


def attach(line: int, rank: int) -> None:
    """Tell the launcher of this rank, by its end of a socket.

    Raises:
        DistributedError: `PARTITA_LOST_AFTER` is no number.
    """
    global _member
    _member = _Member(socket.socket(fileno=line), rank, None, lost_after_s(), math.inf)
    _member.start()


def has_joined() -> bool:
    """Whether other ranks, or the launcher, hear of this one."""
    return _member is not None


def join(
    rank: int,
    ranks: int,
    gather: Callable[[Any], list[Any]],
    *,
    limit_s: float | None = None,
    stall_s: float = math.inf,
) -> None:
    """Let this rank and the others watch each other until the process ends; all ranks of a run call it.

    A rank that is attached to its launcher is watched by that, and only takes `stall_s`.

    Args:
        rank: This one.
        ranks: How many there are.
        gather: Gives each rank what all have passed to it, in order, as JSON can say it.
        limit_s: After how much silence a rank is lost, 0 for never; rank 0's counts. By default `lost_after_s()`.
        stall_s: After how long in one call that waits for others a rank gives up.

    Raises:
        DistributedError: `PARTITA_LOST_AFTER` is no number.
    """
    global _member, _hub
    ME.task = "working" if ME.task == STARTING else ME.task
    if _member is not None:
        _member.stall_s = stall_s
        return
    if ranks == 1:
        return
    mine = lost_after_s() if limit_s is None else limit_s
    machines = gather([_machine("net"), mine if math.isfinite(mine) else 0.0])
    limit_s = float(machines[0][1])
    if not limit_s:
        return
    offer = None
    if rank == 0:
        is_local = len({machine for machine, _ in machines}) == 1
        token = secrets.token_hex(16)
        _hub = _listen(is_local, token, limit_s)
        offer = [_addresses(is_local), _hub.port, token, socket.gethostname()]
    addresses, port, token, host = gather(offer)[0]
    channel = _connect(addresses, port)
    if channel is None:
        _say(
            f"rank {rank} cannot reach rank 0 ({', '.join(addresses)}) to hear of lost ranks, and will not hear of them."
        )
        return
    _member = _Member(channel, rank, Peer(0, host=host), limit_s, stall_s)
    _member.first["token"] = token
    if _hub is not None:
        _hub.start()
    _member.start()
    atexit.register(farewell)
    # A process of multiprocessing (and of torch's spawn) ends without atexit.
    Finalize(None, farewell, exitpriority=0)


def tell_failure(failure: dict[str, Any]) -> None:
    """Tell the others why this rank ends. Does nothing where nobody hears it."""
    if _member is None:
        return
    _member.send({"failure": {**failure, "machine": _member.first["machine"]}})
    if _hub is not None:
        _hub.closed.wait(VERDICT_S)


def wait_for_verdict() -> None:
    """Where this rank's connections break, hear why: if another was lost or failed, this ends the process."""
    if _member is not None and _member.hub is not None:
        time.sleep(VERDICT_S)


def farewell() -> None:
    """This rank has done its work, and the others need not look after it any more."""
    global _member, _hub
    member, hub = _member, _hub
    if member is None or member.hub is None:
        return
    error = getattr(sys, "last_value", None) or sys.exc_info()[1]
    if error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        if is_echo(error):
            wait_for_verdict()
        tell_failure({"code": 1, "message": f"{type(error).__name__}: {error}", "echo": is_echo(error)})
        return
    _member = _hub = None
    if hub is not None:
        hub.closing.set()
    member.is_leaving = True
    member.send({"is_done": True})
    member.done.set()
    if hub is not None:
        hub.close()


# What gloo, Open MPI, NCCL and MLX's ring say of a connection whose other end has gone.
_ECHO = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|socket closed|recvvalue failed|failed to recv|connection refused|"
    r"peer .*(closed|gone|lost)",
    re.IGNORECASE,
)


def is_echo(error: BaseException) -> bool:
    """Whether an error only tells that another rank has failed or is gone: ours by its type, a backend's by its words."""
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
    """What tells this machine from others: two of its containers count as two, if they differ in one of these namespaces."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "/".join([boot, *(str(Path(f"/proc/self/ns/{space}").stat().st_ino) for space in spaces)])
    except OSError:
        return socket.gethostname()


def _listen(is_local: bool, token: str, limit_s: float) -> Hub:
    """The hub, on the loopback unless ranks of other machines are to come."""
    own = ["127.0.0.1"] if is_local else [*_addresses(False), "0.0.0.0"]
    for address in own[:-1]:
        with contextlib.suppress(OSError):
            return Hub(address, token, _me(), limit_s)
    return Hub(own[-1], token, _me(), limit_s)


def _addresses(is_local: bool) -> list[str]:
    """Where others may find this machine, as the launcher knows it before as the machine does."""
    if is_local:
        return ["127.0.0.1"]
    named = [os.environ.get(name, "") for name in ("MASTER_ADDR", "NCCL_HOST_IP")]
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        named.append(json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())[0][0].rpartition(":")[0])
    named.append(os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0])
    found = []
    for name in (*named, socket.gethostname()):
        if name:
            with contextlib.suppress(OSError):
                found += [str(one[4][0]) for one in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    return list(dict.fromkeys(address for address in found if not address.startswith("127.")))


def _connect(addresses: list[str], port: int) -> socket.socket | None:
    for address in addresses:
        with contextlib.suppress(OSError):
            channel = socket.create_connection((address, port), CONNECT_S)
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel.settimeout(None)
            return channel
    return None


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"warning: {text}\n".encode())
