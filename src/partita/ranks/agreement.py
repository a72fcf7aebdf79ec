"""What one rank knows, told to all: along one axis of the mesh after the other, which in the end is to everybody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from partita.errors import PeerFailed


class Hears(Protocol):
    """What either engine's communicators can do."""

    def all_gather_object(self, value: object) -> list[Any]:
        """The objects of all ranks of the group."""


def failure_record(rank: int, error: BaseException | None) -> list[Any] | None:
    """What rank `rank` of the run sends of its error, None where it has none: the rank that failed, type and text."""
    if error is None:
        return None
    if isinstance(error, PeerFailed):
        return [error.rank, error.reason]
    return [rank, f"{type(error).__name__}: {error}"]


def raise_failure_of_peer(records: Sequence[list[Any] | None]) -> None:
    """Raise `PeerFailed` with the first of the records that `failure_record` made, if there is one."""
    first = next((record for record in records if record is not None), None)
    if first is not None:
        raise PeerFailed(*first)


def worst(axes: Sequence[Hears], mine: str | None) -> str | None:
    """Of what the ranks say, the same on every rank: that of the first who says anything but nothing.

    Raises whatever a lost rank makes the communicators raise.
    """
    for comm in axes:
        mine = next((said for said in comm.all_gather_object(mine) if said), mine)
    return mine


def standing(axes: Sequence[Hears], error: str | None, is_done: bool) -> tuple[str | None, bool]:
    """How a work of all ranks stands, the same on every rank: what went wrong first, and whether all are done."""
    for comm in axes:
        told = comm.all_gather_object([error, is_done])
        error = next((said for said, _ in told if said), error)
        is_done = all(done for _, done in told)
    return error, is_done
