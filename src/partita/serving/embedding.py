"""The loop of a model that gives vectors: the ranks of a replica run the forwards that its first rank sends, as in `loop.py`.

Texts of the same length share a forward, so that no row is padded and no mask is needed: a row's vector is that of its text
alone, up to the rounding of a product with more rows.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from partita.core.plan import Plan
from partita.errors import ModelError, PlanError
from partita.ranks.liveness import doing
from partita.serving.loop import IDLE_S, Stats
from partita.serving.pooling import Pooling, Vectors
from partita.serving.requests import OnEvent, ServeRequest, ServeSettings

Batch = tuple[tuple[int, ...], ...]
"""Texts of one forward, all with the same number of tokens."""

MOST_TOKENS = 8192
"""The largest number of tokens of a forward with several texts."""

NO_TEXT = "this model gives embeddings of texts and continues none. Use /v1/embeddings."

OnVectors = Callable[[Vectors | Exception], None]
"""Receives the vectors of a request, `[texts, width]`, or why there are none, from the loop's thread."""


class Encoder(Protocol):
    """What the loop needs of an engine. Every rank of a replica has one."""

    @property
    def plan(self) -> Plan:
        """The plan of the model."""

    @property
    def decides(self) -> bool:
        """Whether this is the rank that decides every step of its replica: the first of it."""

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens of a text; 0 if there is none."""

    def share(self, data: bytes | None) -> bytes:
        """The bytes of the replica's deciding rank, on each of its ranks; `data` is None on the others."""

    def hidden(self, batches: Sequence[Batch], pool: Callable[[Vectors], Vectors]) -> list[Vectors]:
        """For each batch `pool` of its last hidden states `[texts, tokens, width]`; on the deciding rank."""


@dataclass
class _Request:
    texts: Sequence[tuple[int, ...]]
    on_vectors: OnVectors


class EmbeddingInbox:
    """Texts on their way to the loop; any thread of the deciding rank may call these methods.

    Attributes:
        width: The number of elements of a vector.
        block_tokens: Tokens of a cache block; there is no cache.
        num_blocks: Blocks of the cache: none.
    """

    block_tokens, num_blocks = 1, 0

    def __init__(self, width: int) -> None:
        """Create an empty inbox of a model whose vectors have `width` elements."""
        self.width = width
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        self._running = 0
        self._steps = 0
        self._closed = ""

    def embed(self, texts: Sequence[tuple[int, ...]], on_vectors: OnVectors) -> None:
        """Add a request for the vectors of `texts`, each with at least one id.

        Raises:
            ModelError: The loop has ended or is about to.
        """
        with self._changed:
            if self._closed:
                raise ModelError(f"no request is accepted any more: {self._closed}.")
            self._waiting.append(_Request(texts, on_vectors))
            self._changed.notify()

    def submit(self, request: ServeRequest, on_event: OnEvent) -> None:
        """Refuse to continue a text.

        Raises:
            PlanError: Always.
        """
        raise PlanError(NO_TEXT)

    def cancel(self, number: int) -> None:
        """Do nothing: no text is continued."""

    @property
    def closed(self) -> str:
        """Why no request is accepted any more; empty while requests are."""
        return self._closed

    def shutdown(self, *, drain: bool = True) -> None:
        """End the loop on every rank, after the requests that wait; with `drain=False` these end with an error."""
        with self._changed:
            self._closed = self._closed or "the server is shutting down"
            if not drain:
                self._end(self._closed)
            self._changed.notify()

    def stats(self) -> Stats:
        """The state of the loop; a request counts once, whatever its number of texts."""
        return Stats(queued=len(self._waiting), running=self._running, steps=self._steps)

    def take(self, timeout_s: float) -> list[_Request]:
        """Wait up to `timeout_s` for requests; those of the next step."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout_s)
            found, self._waiting = self._waiting, []
            self._running, self._steps = len(found), self._steps + 1
            return found

    def rest(self) -> None:
        """Note that no request runs."""
        self._running = 0

    def close(self, why: str) -> None:
        """Accept no more requests, and end those that wait."""
        with self._changed:
            self._closed = why
            self._running = 0
            self._end(why)

    def _end(self, why: str) -> None:
        left, self._waiting = self._waiting, []
        for request in left:
            request.on_vectors(ModelError(why))


class EmbeddingLoop:
    """Computes vectors on all ranks of a replica; replicas do not wait for each other.

    Attributes:
        inbox: Where requests arrive; used on the first rank of the replica only.
        on_step: Called there after the vectors of each step.
        most_tokens: The largest number of tokens of a text; 0 if there is none.
    """

    def __init__(self, encoder: Encoder, pooling: Pooling, settings: ServeSettings) -> None:
        """Create a loop over the engine's `encoder`, on every rank with the same settings. Runs a first forward."""
        self.encoder, self.pooling, self.settings = encoder, pooling, settings
        limits = [one for one in (encoder.most_tokens, pooling.most_tokens) if one]
        self.most_tokens = min(limits, default=0)
        (first,) = encoder.hidden([((0,),)], pooling.pool)
        self.inbox = EmbeddingInbox(first.shape[-1])
        self.on_step: Callable[[], None] = lambda: None

    @doing("serving")
    def run(self) -> None:
        """Serve until `inbox.shutdown()` on the first rank of the replica. Blocks; every rank must call it."""
        try:
            while self._step():
                pass
        except BaseException as error:
            self.inbox.close(str(error) or type(error).__name__)
            raise
        self.inbox.close("the server is shutting down")

    def _step(self) -> bool:
        """Run one step. Whether another one follows."""
        requests, data = list[_Request](), None
        order: list[list[tuple[int, int]]] = []
        if self.encoder.decides:
            requests = self.inbox.take(IDLE_S)
            batches, order = self._batches(requests)
            data = json.dumps([batches, bool(self.inbox.closed) and not requests], separators=(",", ":")).encode()
        sent, ends = json.loads(self.encoder.share(data))
        try:
            found = self.encoder.hidden([tuple(map(tuple, batch)) for batch in sent], self.pooling.pool) if sent else []
        except BaseException as error:
            for request in requests:
                request.on_vectors(ModelError(str(error) or type(error).__name__))
            raise
        self._report(requests, order, found)
        if self.encoder.decides:
            self.inbox.rest()
            self.on_step()
        return not ends

    def _batches(self, requests: Sequence[_Request]) -> tuple[list[Batch], list[list[tuple[int, int]]]]:
        """Texts of equal length together, and for each batch the request and the place of each text."""
        lengths: dict[int, list[tuple[int, int]]] = {}
        for number, request in enumerate(requests):
            for place, text in enumerate(request.texts):
                lengths.setdefault(len(text), []).append((number, place))
        order = []
        for length, places in sorted(lengths.items()):
            most = max(1, min(self.settings.max_sequences, MOST_TOKENS // length))
            order += [places[i : i + most] for i in range(0, len(places), most)]
        return [tuple(requests[number].texts[place] for number, place in batch) for batch in order], order

    def _report(
        self, requests: Sequence[_Request], order: Sequence[Sequence[tuple[int, int]]], found: Sequence[Vectors]
    ) -> None:
        rows = {
            place: vector
            for batch, vectors in zip(order, found, strict=False)
            for place, vector in zip(batch, vectors, strict=True)
        }
        for number, request in enumerate(requests):
            request.on_vectors(np.stack([rows[number, place] for place in range(len(request.texts))]))
