"""The front end of all replicas: it distributes requests, and keeps those that wait while the ranks are started again.

                     begun   waiting
a rank is lost       lost    stay here                            `closed` says why
ranks are back               are submitted again
no restart is left           lost
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from partita.errors import ModelError, PartitaError, PlanError
from partita.notes import note
from partita.serving.blocks import digests
from partita.serving.loop import REPLACED, Stats
from partita.serving.requests import Event, Finished, OnEvent, ServeRequest, Token

if TYPE_CHECKING:  # it needs numpy, which the command line does without
    from partita.serving.embedding import OnVectors
    from partita.serving.pooling import Vectors


class Replica(Protocol):
    """The entrance to the loop of one replica: its `Inbox` in this process, or a `RemoteReplica`."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a cache block."""

    @property
    def num_blocks(self) -> int:
        """Blocks of its cache."""

    def submit(self, request: ServeRequest, on_event: OnEvent) -> None:
        """Add a request; see `Inbox`."""

    def cancel(self, number: int) -> None:
        """End a request within a step."""

    def shutdown(self, *, drain: bool = True) -> None:
        """End the loop."""

    def stats(self) -> Stats:
        """The state of the loop."""


class TextReplica(Replica, Protocol):
    """The entrance to the loop of a replica that continues texts."""

    def replace(self, following: str) -> None:
        """End the loop after all requests, to serve another model; see `Inbox`."""


class EmbeddingReplica(Replica, Protocol):
    """The entrance to the loop of a replica that gives vectors."""

    def embed(self, texts: Sequence[tuple[int, ...]], on_vectors: OnVectors) -> None:
        """Compute the vectors of texts; see `EmbeddingInbox`."""


class _Place:
    """A replica, how much it has to do, and which prompts it has seen.

    Attributes:
        replica: The replica.
        load: Tokens of its requests that are still to be computed at most.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica, self.load = replica, 0
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def cached(self, found: Sequence[bytes]) -> int:
        """The number of tokens of a prompt, given by the digests of its blocks, that its cache probably has."""
        count = next((i for i, one in enumerate(found) if one not in self._seen), len(found))
        return count * self.replica.block_tokens

    def keep(self, found: Iterable[bytes]) -> None:
        """Remember a prompt that the replica computes; as much is remembered as its cache holds."""
        for one in found:
            self._seen[one] = None
            self._seen.move_to_end(one)
        while len(self._seen) > self.replica.num_blocks:
            self._seen.popitem(last=False)


@dataclass
class _Entry:
    """A request that has not ended.

    Attributes:
        request: The request.
        on_event: Who hears of it.
        place: Where it is served; None while it waits for the ranks to be started again.
        left: Tokens that are still to be computed at most.
        has_begun: Whether a rank has computed any of it.
    """

    request: ServeRequest
    on_event: OnEvent
    left: int
    place: _Place | None = None
    has_begun: bool = False


@dataclass(eq=False)
class _Embedding:
    """Texts whose vectors are computed.

    Attributes:
        on_vectors: Who hears of them.
        place: Where they are computed.
        left: Their tokens.
    """

    on_vectors: OnVectors
    place: _Place
    left: int


class Front:
    """Distributes requests over replicas, by what each has to do and has in its cache. Any thread may call its methods.

    Attributes:
        model: Which of the models that have been served is served now, from 0.
    """

    def __init__(self) -> None:
        """Create a front end that accepts requests after `open`."""
        self._lock = threading.RLock()
        self._entries: dict[int, _Entry] = {}
        self._embeddings: set[_Embedding] = set()
        self._places: list[_Place] = []
        self._down = "the ranks have not started"
        self._ending = ""
        self._drains = True
        self.model = 0

    def open(self, replicas: Sequence[Replica], *, is_other: bool = False) -> None:
        """Serve with `replicas`, which are ready: first the requests that waited for them.

        Args:
            replicas: The replicas.
            is_other: Whether they have another model than those before.
        """
        with self._lock:
            self._places, self._down = [_Place(one) for one in replicas], ""
            self.model += is_other
            waiting = [entry for entry in self._entries.values() if entry.place is None]
        for entry in waiting:
            try:
                self._submit(entry)
            except PartitaError as error:
                self._take(entry, Finished(entry.request.id, "error", str(error)))
        with self._lock:
            ending, drains = self._ending, self._drains
        if ending:
            self._shut(drains)

    def begun(self, numbers: Sequence[int]) -> None:
        """Note that ranks compute these requests from now on."""
        with self._lock:
            for number in numbers:
                if number in self._entries:
                    self._entries[number].has_begun = True

    def lose(self, why: str) -> None:
        """End the requests that have begun with the error `why`. The others wait for `open` or `close`."""
        with self._lock:
            self._places, self._down = [], why
            lost = [entry for entry in self._entries.values() if entry.has_begun]
            for entry in self._entries.values():
                entry.place = None
        self._end(lost, why)

    def close(self, why: str) -> None:
        """End all requests with the error `why`, and accept no more."""
        with self._lock:
            self._ending, self._places = self._ending or why, []
            lost = [*self._entries.values()]
        self._end(lost, why)

    def _end(self, entries: Iterable[_Entry], why: str) -> None:
        with self._lock:
            embeddings, self._embeddings = self._embeddings, set()
        for one in embeddings:
            one.on_vectors(ModelError(why))
        for entry in entries:
            self._take(entry, Finished(entry.request.id, "lost", why, len(entry.request.prompt)))

    def replace(self, following: str) -> None:
        """End the loops of all replicas after the requests that they have, so that they come back with another model.

        Requests are refused until `open`.

        Raises:
            ModelError: No request is accepted.
        """
        with self._lock:
            if self.closed:
                raise ModelError(f"no other model can be loaded now: {self.closed}.")
            self._down, places = REPLACED, list(self._places)
        for place in places:
            cast(TextReplica, place.replica).replace(following)

    def part(self) -> None:
        """Forget the replicas, whose loops have ended, before others come."""
        with self._lock:
            self._places = []

    def submit(self, request: ServeRequest, on_event: OnEvent, model: int | None = None) -> None:
        """Add a request; see `Inbox.submit`. Its ids are those of the model `model`, if it is given."""
        with self._lock:
            if self.closed:
                raise ModelError(f"no request is accepted any more: {self.closed}.")
            if model not in (None, self.model):
                raise ModelError("another model has been loaded since the prompt was read. Send the request again.")
            if request.id in self._entries:
                raise PlanError(f"a request with id {request.id} is being served. Use an id of its own.")
            entry = _Entry(request, on_event, len(request.prompt) + (request.sampling.max_new_tokens or 0))
            self._entries[request.id] = entry
        try:
            self._submit(entry)
        except PartitaError:
            self._forget(entry)
            raise

    def _submit(self, entry: _Entry) -> None:
        """Give a request to the replica that has the least to compute with it."""
        with self._lock:
            if not self._places or entry.place is not None or self._entries.get(entry.request.id) is not entry:
                return
            found: Sequence[bytes] = ()
            if len(self._places) > 1 and not entry.request.inputs:
                found = digests(entry.request.prompt, self._places[0].replica.block_tokens, entry.request.adapter)
            place = min(self._places, key=lambda one: one.load - one.cached(found))
            place.keep(found)
            place.load += entry.left
            entry.place = place
        place.replica.submit(entry.request, lambda event: self._hear(entry, place, event))

    def _hear(self, entry: _Entry, place: _Place, event: Event) -> None:
        """Take an event from a replica, unless the request is no longer served there."""
        if isinstance(event, Finished) and event.reason == "lost":
            return  # `lose` will be called with the reason
        if entry.place is place:
            self._take(entry, event)

    def _take(self, entry: _Entry, event: Event) -> None:
        number = entry.request.id
        with self._lock:
            if self._entries.get(number) is not entry:
                return
            if isinstance(event, Token):
                entry.has_begun = True
                entry.left -= 1
                if entry.place is not None:
                    entry.place.load -= 1
            else:
                self._forget(entry)
        try:
            entry.on_event(event)
        except Exception as error:
            note(f"request {number} ends, because its on_event raised {type(error).__name__}: {error}")
            self.cancel(number)

    def embed(self, texts: Sequence[tuple[int, ...]], on_vectors: OnVectors) -> None:
        """Compute the vectors of texts on the replica that has the least to compute; see `EmbeddingInbox.embed`."""
        with self._lock:
            if self.closed:
                raise ModelError(f"no request is accepted any more: {self.closed}.")
            place = min(self._places, key=lambda place: place.load)
            one = _Embedding(on_vectors, place, sum(map(len, texts)))
            place.load += one.left
            self._embeddings.add(one)
        cast(EmbeddingReplica, place.replica).embed(texts, lambda result: self._receive(one, result))

    def _receive(self, one: _Embedding, result: Vectors | Exception) -> None:
        if isinstance(result, Exception):
            return  # `lose` or `close` will be called with the reason
        with self._lock:
            if one not in self._embeddings:
                return
            self._embeddings.remove(one)
            one.place.load -= one.left
        one.on_vectors(result)

    def _forget(self, entry: _Entry) -> None:
        with self._lock:
            if self._entries.pop(entry.request.id, None) is not None and entry.place is not None:
                entry.place.load -= entry.left

    def cancel(self, number: int) -> None:
        """End a request; see `Inbox.cancel`."""
        with self._lock:
            entry = self._entries.get(number)
        if entry is None:
            return
        place = entry.place
        if place is not None:
            place.replica.cancel(number)
        else:
            self._take(entry, Finished(number, "cancelled", "", len(entry.request.prompt)))

    def shutdown(self, *, drain: bool = True) -> None:
        """End all replicas: after all requests are finished, or with `drain=False` after cancelling them."""
        with self._lock:
            self._ending = self._ending or "the server is shutting down"
            self._drains = self._drains and drain
        self._shut(drain)

    def _shut(self, drain: bool) -> None:
        with self._lock:
            places = list(self._places)
            waiting = [entry.request.id for entry in self._entries.values() if entry.place is None]
        for place in places:
            place.replica.shutdown(drain=drain)
        if not drain:
            for number in waiting:
                self.cancel(number)

    @property
    def closed(self) -> str:
        """Why no request is accepted; empty while requests are."""
        return self._ending or self._down

    @property
    def is_over(self) -> bool:
        """Whether the server is shutting down while no replica is open and no request waits for one."""
        return bool(self._ending) and not self._places and not self._entries

    def stats(self) -> Stats:
        """The state of all loops, and the requests that wait for the ranks."""
        with self._lock:
            places = list(self._places)
            waiting = sum(entry.place is None for entry in self._entries.values())
        return sum((place.replica.stats() for place in places), Stats(queued=waiting))


class Entrance:
    """The entrance to a front end for the requests of one model: their ids mean nothing to the next one."""

    def __init__(self, front: Front, model: int) -> None:
        """Add requests of the model `model` of `front`."""
        self._front, self._model = front, model

    def submit(self, request: ServeRequest, on_event: OnEvent) -> None:
        """Add a request; see `Front.submit`."""
        self._front.submit(request, on_event, self._model)

    def cancel(self, number: int) -> None:
        """End a request."""
        self._front.cancel(number)

    @property
    def closed(self) -> str:
        """Why no request is accepted; empty while requests are."""
        return self._front.closed

    def stats(self) -> Stats:
        """The state of all loops."""
        return self._front.stats()
