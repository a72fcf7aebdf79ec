"""Coordinator: a thread in rank 0 of a run that another launcher started; it receives heartbeats and detects lost ranks."""

from __future__ import annotations

import contextlib
import hmac
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from partita.ranks.addresses import family_of
from partita.ranks.liveness.activity import ME
from partita.ranks.liveness.peer import Lines, Peer, Uptime, beat_s, line_of, silence

CLOSE_S = 2.0
"""Seconds that a coordinator waits at its end until all ranks have received the last message."""


@dataclass
class _Connection:
    """A connection; it belongs to a rank once it has sent the token."""

    channel: socket.socket
    lines: Lines = field(default_factory=Lines)
    peer: Peer | None = None


class Coordinator(threading.Thread):
    """Receives messages from all ranks, answers each, and reports to all the first that is lost or fails.

    Only connections that send the token are accepted; the ranks exchange it by their collectives.
    """

    def __init__(self, address: str, token: str, me: dict[str, Any], limit_s: float) -> None:
        """Listen at `address`, on a free port.

        Args:
            address: An address in the network that the ranks share; the loopback if they are on one machine.
            token: The token that a rank must send.
            me: The facts that rank 0 sends about itself.
            limit_s: Seconds of silence after which a rank is lost.

        Raises:
            OSError: It cannot listen at this address.
        """
        super().__init__(name="coordinator", daemon=True)
        self.token, self.me, self.limit_s = token, me, limit_s
        self.listener = socket.create_server((address, 0), family=family_of(address))
        self.listener.setblocking(False)
        self.port = int(self.listener.getsockname()[1])
        self.clock = Uptime(limit_s)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.connections: list[_Connection] = []
        self.closing = threading.Event()
        self.closed = threading.Event()

    def run(self) -> None:
        """Receive and answer messages until the run ends."""
        next_s = 0.0
        while not self.closing.is_set():
            self._receive(beat_s(self.limit_s))
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
        """Send farewell to all ranks, and return when they have received it."""
        self.closing.set()
        self.closed.wait(2 * CLOSE_S)

    def _verdict(self, now_s: float) -> dict[str, Any] | None:
        """The message that ends the run, or None if the run continues."""
        peers = [c.peer for c in self.connections if c.peer is not None and not c.peer.is_done]
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

    def _receive(self, timeout_s: float) -> bool:
        """Process incoming messages, waiting at most `timeout_s` for them. Returns whether any arrived."""
        found = self.selector.select(timeout_s)
        for key, _ in found:
            connection = key.data
            if connection is None:
                with contextlib.suppress(OSError):
                    self._accept()
                continue
            data = b""
            with contextlib.suppress(OSError):
                data = connection.channel.recv(1 << 16)
            if not data:
                self._leave(connection)
            for message in connection.lines.take(data):
                if connection.channel.fileno() >= 0:
                    self._take(connection, message)
        return bool(found)

    def _accept(self) -> None:
        channel, _ = self.listener.accept()
        channel.setblocking(False)
        connection = _Connection(channel)
        self.connections.append(connection)
        self.selector.register(channel, selectors.EVENT_READ, connection)

    def _take(self, connection: _Connection, message: dict[str, Any]) -> None:
        now_s = self.clock.now_s()
        if connection.peer is None:
            if not hmac.compare_digest(str(message.get("token")), self.token):
                self._leave(connection)
                return
            connection.peer = Peer(int(message["rank"]))
        connection.peer.take(message, now_s)

    def _leave(self, connection: _Connection) -> None:
        """Handle the end of a connection: without a farewell, its rank is lost."""
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(connection.channel)
        connection.channel.close()
        if connection.peer is None or connection.peer.is_done:
            self.connections.remove(connection)
        else:
            connection.peer.heard_s = -1.0

    def _send(self, message: dict[str, Any], connections: list[_Connection] | None = None) -> None:
        """Send to all ranks, or to `connections`. A rank with a full buffer has stopped reading, so it is found silent."""
        line = line_of(message)
        for connection in self.connections if connections is None else connections:
            if connection.peer is not None and not connection.peer.is_done:
                with contextlib.suppress(OSError):
                    connection.channel.send(line)

    def _end(self, last: dict[str, Any]) -> None:
        """Send the last message to all ranks, to rank 0 after the others, since this process ends when rank 0 receives it.

        The coordinator does not wait for silent ranks. The ranks that receive the message kill them, after they have reported
        it: a launcher that sees a process end may end all others before they have reported anything. For the same reason the
        rank that reports its own failure receives the message first, and closes its connection when it has printed it.
        """
        silent = {rank for rank, *_ in last.get("silent", ())}
        self._send(last, [c for c in self.connections if c.peer is not None and c.peer.rank in silent])
        receiving = [c for c in self.connections if c.peer is None or c.peer.rank not in silent]
        own = [c for c in receiving if c.peer is not None and c.peer.rank == 0]
        others = [c for c in receiving if c not in own]
        reporter = [c for c in receiving if c.peer is not None and c.peer.rank == last.get("failed", {}).get("rank")]
        for connections in (reporter, [c for c in others if c not in reporter], [c for c in own if c not in reporter]):
            self._send(last, connections)
            self._wait_for(connections)
        self.closed.set()
        for connection in self.connections:
            connection.channel.close()
        self.listener.close()

    def _wait_for(self, connections: list[_Connection]) -> None:
        """Wait until they have received it: a socket that is closed with unread bytes is reset, and the sent bytes are lost."""
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.channel.shutdown(socket.SHUT_WR)
        deadline_s = time.monotonic() + CLOSE_S
        while any(c.channel.fileno() >= 0 for c in connections) and time.monotonic() < deadline_s:
            self._receive(0.1)
