"""What one rank knows, told to all: along one axis of the mesh after the other, which in the end is to everybody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Hears(Protocol):
    """What either engine's communicators can do."""

    def all_gather_object(self, value: object) -> list[Any]:
        """The objects of all ranks of the group."""


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
