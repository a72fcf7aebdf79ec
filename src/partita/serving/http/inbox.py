"""What the front end needs of the step loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from partita.serving.requests import OnEvent, ServeRequest

if TYPE_CHECKING:
    from partita.serving.embedding import OnVectors


class Stats(Protocol):
    """What a step loop counts; its own class documents each number."""

    @property
    def queued(self) -> int:
        """Requests that wait."""

    @property
    def running(self) -> int:
        """Requests that run."""

    @property
    def blocks_used(self) -> int:
        """Cache blocks that running requests hold."""

    @property
    def blocks_kept(self) -> int:
        """Cache blocks that keep the beginning of earlier texts."""

    @property
    def blocks_free(self) -> int:
        """Empty cache blocks."""

    @property
    def tokens(self) -> int:
        """New tokens so far."""

    @property
    def steps(self) -> int:
        """Steps so far."""


class Embeds(Protocol):
    """The entrance to a loop that computes vectors, called from any thread."""

    def embed(self, texts: Sequence[tuple[int, ...]], on_vectors: OnVectors) -> None:
        """Compute the vectors of texts; `on_vectors` receives them, or why there are none, from a thread of the loop.

        Raises:
            ModelError: No request is accepted any more.
        """


class Inbox(Protocol):
    """The deciding rank's entrance to the step loop, called from any thread."""

    def submit(self, request: ServeRequest, on_event: OnEvent) -> None:
        """Add a request; `on_event` receives its tokens and its end from the loop's thread.

        Raises:
            PartitaError: The request can never be answered; the message has its numbers.
        """

    def cancel(self, number: int) -> None:
        """End a request, if it has not ended, and free its blocks."""

    @property
    def closed(self) -> str:
        """Why no request is accepted any more; empty while requests are."""

    def stats(self) -> Stats:
        """What the loop is doing."""


class Library(Protocol):
    """The models that a server can load."""

    def names(self) -> Sequence[str]:
        """Their names."""

    def load(self, name: str) -> None:
        """Serve the model of a name from now on, once the requests of the present one have ended.

        Raises:
            PartitaError: There is none, or it cannot be loaded; the present one is then still served.
        """
