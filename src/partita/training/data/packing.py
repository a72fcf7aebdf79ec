"""Packing: which pieces of documents share a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, Any]


def pieces_of(ends: Ints, length: int) -> tuple[Ints, Ints]:
    """The starts and lengths, each int64 `[pieces]`, of pieces of at most `length` + 1 ids that together train on every id.

    A longer text is cut into pieces that overlap by one id: the last target of a piece is the first input of the next.
    """
    import numpy as np

    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else np.empty(0, np.int64)
    sizes = np.asarray(ends, np.int64) - starts
    counts = np.maximum(1, -(-(sizes - 1) // length))
    document = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = number * length
    return starts[document] + begin, np.minimum(length + 1, sizes[document] - begin)


def packed(lengths: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Distribute pieces over rows of `capacity` ids: the longest first, each into the fullest row with enough room.

    Best-fit decreasing (Johnson 1973; for sequences 2404.10830, section 3.2), by a table of rows by their room.

    Returns:
        The pieces in the order of their rows, int64 `[pieces]`, and the end of each row in it, int64 `[rows]`.
    """
    import numpy as np

    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = _Rooms()
    rows: list[list[int]] = []
    for piece in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        size = int(lengths[piece])
        room = rooms.at_least(size)
        if room is None:
            row, room = len(rows), capacity
            rows.append([])
        else:
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.remove(room)
        rows[row].append(piece)
        left = room - size
        if left:
            by_room[left].append(row)
            rooms.add(left)
    order = np.array([piece for row in rows for piece in row], np.int64)
    return order, np.cumsum([len(row) for row in rows]).astype(np.int64)


class _Rooms:
    """The rooms of which there is a row, as bits of a number: the smallest that fits is its lowest bit above a size."""

    def __init__(self) -> None:
        self.bits = 0

    def add(self, room: int) -> None:
        self.bits |= 1 << room

    def remove(self, room: int) -> None:
        self.bits &= ~(1 << room)

    def at_least(self, size: int) -> int | None:
        above = self.bits >> size
        return size + (above & -above).bit_length() - 1 if above else None
