"""Hub: in rank 0 of a run that another launcher started, where all ranks tell that they live and hear who does not."""

from __future__ import annotations

import contextlib
import hmac
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from partita.ranks.liveness.activity import ME
from partita.ranks.liveness.peer import Lines, Peer, Uptime, beat_s, line_of, silence

CLOSE_S = 2.0
"""How long a hub that ends waits for its members to hear of it."""


@dataclass
class _Seat:
    """One who is connected; a rank once it has shown the token."""

    channel: socket.socket
    lines: Lines = field(default_factory=Lines)
    peer: Peer | None = None


class Hub(threading.Thread):
    """Hears all ranks, answers each, and tells all of the first that is lost or fails.

    Only who shows the token is heard, which the ranks have from each other by their collectives.
    """

    def __init__(self, address: str, token: str, me: dict[str, Any], limit_s: float) -> None:
        """Listen at `address`; port and thread are its own.

        Args:
            address: Of the network that the ranks share; the loopback's where they are of one machine.
            token: What a rank shows.
            me: What rank 0 tells of itself.
            limit_s: After how much silence a rank is lost.

        Raises:
            OSError: It cannot listen there.
        """
        super().__init__(name="peers hub", daemon=True)
        self.token, self.me, self.limit_s = token, me, limit_s
        self.door = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.door.setblocking(False)
        self.port = int(self.door.getsockname()[1])
        self.clock = Uptime(limit_s)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.door, selectors.EVENT_READ, None)
        self.seats: list[_Seat] = []
        self.closing = threading.Event()
        self.closed = threading.Event()

    def run(self) -> None:
        """Hear and answer until the run ends."""
        next_s = 0.0
        while not self.closing.is_set():
            self._hear(beat_s(self.limit_s))
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + beat_s(self.limit_s)
                self._send({**self.me, "stage": ME.stage, "doing": str(ME)})
            now_s = self.clock.now_s()
            verdict = self._verdict(now_s)
            if verdict is not None:
                self._end(verdict)
                return
        self._end({"is_done": True})

    def close(self) -> None:
        """Say farewell to all ranks, and return when they have heard it."""
        self.closing.set()
        self.closed.wait(2 * CLOSE_S)

    def _verdict(self, now_s: float) -> dict[str, Any] | None:
        """What ends the run, if anything does."""
        peers = [seat.peer for seat in self.seats if seat.peer is not None and not seat.peer.is_done]
        failed = [(peer, peer.failure) for peer in peers if peer.failure is not None]
        if failed:
            peer, failure = min(failed, key=lambda pair: bool(pair[1].get("echo")))
            return {"failed": {"rank": peer.rank, "who": str(peer), "doing": peer.doing, **failure}}
        gone = [peer for peer in peers if peer.heard_s < 0]
        if gone:
            return {"lost": "; ".join(peer.lost("its process has ended") for peer in gone)}
        if not any(peer.silent_s(now_s) > self.limit_s for peer in peers):
            return None
        silent = [peer for peer in peers if peer.silent_s(now_s) > self.limit_s / 2]
        return {
            "lost": "; ".join(peer.lost(silence(self.limit_s)) for peer in silent),
            "silent": [[peer.rank, peer.pids, peer.pid] for peer in silent],
        }

    def _hear(self, timeout_s: float) -> bool:
        """Take in what has come, waiting for it a while. Returns whether anything has."""
        found = self.selector.select(timeout_s)
        for key, _ in found:
            seat = key.data
            if seat is None:
                with contextlib.suppress(OSError):
                    self._accept()
                continue
            data = b""
            with contextlib.suppress(OSError):
                data = seat.channel.recv(1 << 16)
            if not data:
                self._leave(seat)
            for told in seat.lines.take(data):
                if seat.channel.fileno() >= 0:
                    self._take(seat, told)
        return bool(found)

    def _accept(self) -> None:
        channel, _ = self.door.accept()
        channel.setblocking(False)
        seat = _Seat(channel)
        self.seats.append(seat)
        self.selector.register(channel, selectors.EVENT_READ, seat)

    def _take(self, seat: _Seat, told: dict[str, Any]) -> None:
        now_s = self.clock.now_s()
        if seat.peer is None:
            if not hmac.compare_digest(str(told.get("token")), self.token):
                self._leave(seat)
                return
            seat.peer = Peer(int(told["rank"]))
        seat.peer.take(told, now_s)

    def _leave(self, seat: _Seat) -> None:
        """A connection has ended: with farewell, or its rank is lost."""
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(seat.channel)
        seat.channel.close()
        if seat.peer is None or seat.peer.is_done:
            self.seats.remove(seat)
        else:
            seat.peer.heard_s = -1.0

    def _send(self, told: dict[str, Any], seats: list[_Seat] | None = None) -> None:
        """Tell all who are there, or `seats` of them. Who cannot take it has not read for long, and will be found silent."""
        line = line_of(told)
        for seat in self.seats if seats is None else seats:
            if seat.peer is not None and not seat.peer.is_done:
                with contextlib.suppress(OSError):
                    seat.channel.send(line)

    def _end(self, last: dict[str, Any]) -> None:
        """Tell all the last word; rank 0 behind the others, as this process ends when it hears it.

        Silent ranks are not waited for. The members that hear of them end them, once they have reported it: a launcher that
        sees a process end may end all others, before they have reported anything.
        """
        silent = {rank for rank, *_ in last.get("silent", ())}
        self._send(last, [seat for seat in self.seats if seat.peer is not None and seat.peer.rank in silent])
        hearing = [seat for seat in self.seats if seat.peer is None or seat.peer.rank not in silent]
        own = [seat for seat in hearing if seat.peer is not None and seat.peer.rank == 0]
        others = [seat for seat in hearing if seat not in own]
        for seats in (others, own):
            self._send(last, seats)
            self._wait_for(seats)
        self.closed.set()
        for seat in self.seats:
            seat.channel.close()
        self.door.close()

    def _wait_for(self, seats: list[_Seat]) -> None:
        """Until they have heard: what is closed with bytes unread is reset, and takes with it what was sent."""
        for seat in seats:
            with contextlib.suppress(OSError):
                seat.channel.shutdown(socket.SHUT_WR)
        deadline_s = time.monotonic() + CLOSE_S
        while any(seat.channel.fileno() >= 0 for seat in seats) and time.monotonic() < deadline_s:
            self._hear(0.1)
