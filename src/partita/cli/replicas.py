"""The replicas of a run, which one process serves with: the loop of that process, and those that connect to it."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from partita.ranks.addresses import addresses, connect, listen
from partita.ranks.agreement import first_text
from partita.ranks.groups import AxisGroups, Communicator
from partita.serving import ServingLoop
from partita.serving.channel import Channel, RemoteReplica, serve_remote
from partita.serving.front import Front, Replica

if TYPE_CHECKING:
    from partita.serving.embedding import EmbeddingLoop

TOKEN_BYTES = 32
"""The length of the token that a replica on another machine sends first."""

OnAll = Callable[[Sequence[Replica], dict[str, Any]], None]
"""Receives all replicas, and the facts of one, when they are ready."""

Groups = AxisGroups[Communicator]


def gather(
    loop: ServingLoop | EmbeddingLoop, facts: dict[str, Any], groups: Groups, front: Front, on_all: OnAll
) -> Meeting | None:
    """In the first rank of the run: call `on_all` with its replicas once all are ready; see `serve_beside` for the others.

    Returns:
        What waits for the other replicas, and must be closed; None if there are none, when `on_all` has been called.
    """
    others = groups.mesh.dp - 1
    if not others:
        on_all([loop.inbox], facts)
        return None
    listener, token = listen(is_local=_is_one_machine()), secrets.token_hex(TOKEN_BYTES // 2)
    first_text(groups.axes, json.dumps([addresses(_is_one_machine()), listener.getsockname()[1], token]))
    return Meeting(listener, others, lambda replicas, _: on_all([loop.inbox, *replicas], facts), front, token)


def serve_beside(
    loop: ServingLoop | EmbeddingLoop, facts: dict[str, Any], groups: Groups, path: str | None = None
) -> None:
    """Serve on a rank without the front end, which is at `path` or in the first rank.

    Raises:
        Exception: What a step raised.
    """
    channel: Channel | None = None
    if path is None and groups.mesh.dp > 1:
        hosts, port, token = json.loads(first_text(groups.axes, None) or "")
        if groups.is_first_of_replica:
            connection = connect(hosts, port)
            if connection is None:
                raise ConnectionError(f"the first rank of the run cannot be reached at {' or '.join(hosts)}.")
            connection.sendall(token.encode())
            channel = Channel(connection)
    elif path is not None and groups.is_first_of_replica:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        channel = Channel(connection)
    with _outliving_sigterm() if path is None else contextlib.nullcontext():
        if channel is not None:
            serve_remote(loop, channel, facts)
        else:
            loop.run()


@contextlib.contextmanager
def _outliving_sigterm() -> Iterator[None]:
    """Ignore one SIGTERM: other launchers send theirs to all ranks at once, but the first rank decides when to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_one_machine() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")


class Meeting:
    """Waits for the replicas of a run, which connect when their models are loaded."""

    def __init__(self, listener: socket.socket, count: int, on_all: OnAll, front: Front, token: str = "") -> None:
        """Accept connections at `listener` until `count` replicas are ready.

        Args:
            listener: A listening socket, which the meeting closes.
            count: The number of replicas.
            on_all: Called in a thread with all replicas, and the facts of one.
            front: Learns which requests begin.
            token: What each connection must send first.
        """
        self._listener, self._count, self._on_all, self._front, self._token = listener, count, on_all, front, token
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._ready: list[RemoteReplica] = []
        threading.Thread(target=self._accept, name="meeting", daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._admit, args=(connection,), name="arrival", daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        if self._token and not self._is_known(connection):
            connection.close()
            return
        channel = Channel(connection)
        with self._lock:
            self._channels.append(channel)
        with contextlib.suppress(ConnectionError):
            replica = RemoteReplica(channel)
            with self._lock:
                self._ready.append(replica)
                if len(self._ready) != self._count:
                    return
                ready, self._ready = self._ready, []  # the replicas come again with another model
            for one in ready:
                one.start(self._front.begun)
            self._on_all(ready, replica.facts)

    def _is_known(self, connection: socket.socket) -> bool:
        connection.settimeout(10)
        given = b""
        with contextlib.suppress(OSError):
            while len(given) < TOKEN_BYTES and (part := connection.recv(TOKEN_BYTES - len(given))):
                given += part
        connection.settimeout(None)
        return hmac.compare_digest(given, self._token.encode())

    def close(self) -> None:
        """End the connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            channels = list(self._channels)
        for channel in channels:
            channel.close()
