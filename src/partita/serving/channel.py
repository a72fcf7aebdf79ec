"""A replica's loop at the other end of a socket: requests go one way, events the other. Nothing is pickled.

front end    submit, cancel, replace, shutdown     ->  deciding rank of a replica
             <-  ready, reply, begun, events of a step with the loop's numbers
"""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from itertools import count
from typing import TYPE_CHECKING, Any, cast

from partita.errors import PartitaError, PlanError
from partita.serving.loop import ServingLoop, Stats
from partita.serving.message import plain_request, read_request
from partita.serving.requests import Event, Finished, OnEvent, ServeRequest, Token

if TYPE_CHECKING:  # it needs numpy, which the command line does without
    from partita.serving.embedding import EmbeddingLoop, OnVectors
    from partita.serving.pooling import Vectors

_LENGTH = struct.Struct("!Q")


class Channel:
    """JSON values over a socket. Any thread sends; one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        """Send and receive over `connection`, which the channel closes."""
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, value: Any) -> None:
        """Send a value. Nothing happens if the other end has gone, which `receive` notices."""
        data = json.dumps(value, separators=(",", ":")).encode()
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Any:
        """The next value; None when the other end has gone."""
        head = self._bytes(_LENGTH.size)
        data = self._bytes(_LENGTH.unpack(head)[0]) if head is not None else None
        return None if data is None else json.loads(data)

    def _bytes(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            part = b""
            with contextlib.suppress(OSError):
                part = self._connection.recv(min(count - len(data), 1 << 20))
            if not part:
                return None
            data += part
        return bytes(data)

    def close(self) -> None:
        """End both directions, which ends a `receive` in another thread too."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def serve_remote(loop: ServingLoop | EmbeddingLoop, channel: Channel, facts: dict[str, Any]) -> None:
    """Run `loop` for the front end at the other end of `channel`, until that ends it; on the replica's deciding rank.

    Args:
        loop: The loop.
        channel: The channel, which is closed.
        facts: What the front end is told of the model, as JSON's values.

    Raises:
        Exception: What a step raised. The front end then only sees that the channel is closed.
    """
    events: list[list[Any]] = []

    def flush() -> None:
        channel.send(["events", [*events], asdict(loop.inbox.stats())])
        events.clear()

    def on_event(event: Event) -> None:
        events.append([isinstance(event, Finished), *astuple(event)])

    def serve() -> None:
        while (message := channel.receive()) is not None:
            kind, *values = message
            if kind == "submit":
                channel.send(["reply", values[0], _refusal(loop, read_request(*values), on_event)])
            elif kind == "embed":
                _embed(loop, channel, *values)
            elif kind == "cancel":
                loop.inbox.cancel(values[0])
            elif kind == "replace":
                cast(ServingLoop, loop).inbox.replace(values[0])
            else:
                loop.inbox.shutdown(drain=values[0])
        loop.inbox.shutdown(drain=False)

    if isinstance(loop, ServingLoop):
        loop.on_begun = lambda numbers: channel.send(["begun", list(numbers)])
    loop.on_step = flush
    channel.send(["ready", {**facts, "layout": [loop.inbox.block_tokens, loop.inbox.num_blocks]}])
    threading.Thread(target=serve, name="channel", daemon=True).start()
    try:
        loop.run()
        flush()
    finally:
        channel.close()


def _embed(loop: ServingLoop | EmbeddingLoop, channel: Channel, number: int, texts: list[list[int]]) -> None:
    """Submit texts, and send their vectors; the front end learns of an error when the channel is closed."""

    def on_vectors(result: Vectors | Exception) -> None:
        if not isinstance(result, Exception):
            data = base64.b64encode(result.tobytes()).decode("ascii")
            channel.send(["vectors", number, result.dtype.str, result.shape, data])

    with contextlib.suppress(PartitaError):
        cast("EmbeddingLoop", loop).inbox.embed([tuple(text) for text in texts], on_vectors)


def _refusal(loop: ServingLoop | EmbeddingLoop, request: ServeRequest, on_event: OnEvent) -> str:
    """Submit a request. Why it is refused; empty if it is not."""
    try:
        loop.inbox.submit(request, on_event)
    except PartitaError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class RemoteReplica:
    """A replica whose loop runs in another process, for the front end.

    Attributes:
        facts: What `serve_remote` was given.
        block_tokens: Tokens of a cache block.
        num_blocks: Blocks of its cache.
    """

    def __init__(self, channel: Channel) -> None:
        """Wait until the replica is ready.

        Raises:
            ConnectionError: It has ended instead.
        """
        message = channel.receive()
        if message is None:
            raise ConnectionError("the replica has ended.")
        self.facts: dict[str, Any] = message[1]
        self.block_tokens, self.num_blocks = self.facts["layout"]
        self._channel, self._stats = channel, Stats()
        self._changing = threading.Lock()
        self._listeners: dict[int, OnEvent] = {}
        self._replies: dict[int, queue.SimpleQueue[str]] = {}
        self._embeddings: dict[int, OnVectors] = {}
        self._numbers = count()
        self._is_gone = False

    def start(self, on_begun: Callable[[Sequence[int]], None]) -> None:
        """Receive events from now on, in a thread; `on_begun` is called with the ids of requests that start to run."""
        threading.Thread(target=self._receive, args=(on_begun,), name="replica", daemon=True).start()

    def _receive(self, on_begun: Callable[[Sequence[int]], None]) -> None:
        while (message := self._channel.receive()) is not None:
            kind, *values = message
            if kind == "begun":
                on_begun(values[0])
            elif kind == "vectors":
                self._embedded(*values)
            elif kind == "reply":
                with self._changing:
                    self._replies.pop(values[0]).put(values[1])
            else:
                self._stats = Stats(**values[1])
                for event in values[0]:
                    self._take(*event)
        with self._changing:
            self._is_gone = True
            for reply in self._replies.values():
                reply.put("")
            self._replies.clear()

    def _take(self, is_end: bool, number: int, *values: Any) -> None:
        if is_end:
            with self._changing:
                listener = self._listeners.pop(number, None)
        else:
            listener = self._listeners.get(number)
        if listener is not None:
            listener(Finished(number, *values) if is_end else _token(number, *values))

    def _embedded(self, number: int, dtype: str, shape: list[int], data: str) -> None:
        import numpy as np  # which the command line does without

        on_vectors = self._embeddings.pop(number)
        on_vectors(np.frombuffer(base64.b64decode(data), dtype).reshape(shape))

    def embed(self, texts: Sequence[tuple[int, ...]], on_vectors: OnVectors) -> None:
        """Compute the vectors of texts. If the replica has gone or is about to, nothing happens."""
        number = next(self._numbers)
        self._embeddings[number] = on_vectors
        self._channel.send(["embed", number, texts])

    def submit(self, request: ServeRequest, on_event: OnEvent) -> None:
        """Add a request, and wait for the answer whether it can be served. If the replica has gone, nothing happens.

        Raises:
            PlanError: The request can never be served; the message has its numbers.
        """
        reply: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self._changing:
            if self._is_gone:
                return
            self._listeners[request.id], self._replies[request.id] = on_event, reply
        self._channel.send(["submit", *plain_request(request)])
        if refusal := reply.get():
            with self._changing:
                self._listeners.pop(request.id, None)
            raise PlanError(refusal)

    def cancel(self, number: int) -> None:
        """End a request within a step; nothing happens if it has ended."""
        self._channel.send(["cancel", number])

    def replace(self, following: str) -> None:
        """End the loop after all its requests; see `Inbox.replace`."""
        self._channel.send(["replace", following])

    def shutdown(self, *, drain: bool = True) -> None:
        """End the loop, after all its requests or after cancelling them."""
        self._channel.send(["shutdown", drain])

    def stats(self) -> Stats:
        """The state of the loop after its last step."""
        return self._stats


def _token(number: int, token: int, text: str, logprob: float | None, top: list[list[Any]]) -> Token:
    return Token(number, token, text, logprob, tuple((name, score) for name, score in top))
