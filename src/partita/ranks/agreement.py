"""Share a value of one rank with all ranks: gathered along each axis of the mesh in turn, it reaches every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from partita.errors import PeerFailed


class Gathers(Protocol):
    """The method that the communicators of both engines have."""

    def all_gather_object(self, value: object) -> list[Any]:
        """Gather the objects of all ranks of the group."""


def failure_record(rank: int, error: BaseException | None) -> list[Any] | None:
    """The record of `error` on rank `rank`: the rank that failed, and type and text of its error; None without an error."""
    if error is None:
        return None
    if isinstance(error, PeerFailed):
        return [error.rank, error.reason]
    return [rank, f"{type(error).__name__}: {error}"]


def raise_failure_of_peer(records: Sequence[list[Any] | None]) -> None:
    """Raise `PeerFailed` for the first record from `failure_record` that is not None, if any."""
    first = next((record for record in records if record is not None), None)
    if first is not None:
        raise PeerFailed(*first)


def first_text(axes: Sequence[Gathers], text: str | None) -> str | None:
    """Return the text of the first rank that has one, the same on every rank; None if no rank has one.

    Raises whatever the communicators raise when a rank is lost.
    """
    for comm in axes:
        text = next((other for other in comm.all_gather_object(text) if other), text)
    return text


def agreed_state(axes: Sequence[Gathers], error: str | None, is_done: bool) -> tuple[str | None, bool]:
    """The state of work that all ranks share, the same on every rank: the first error, and whether all ranks are done."""
    for comm in axes:
        states = comm.all_gather_object([error, is_done])
        error = next((other for other, _ in states if other), error)
        is_done = all(done for _, done in states)
    return error, is_done
