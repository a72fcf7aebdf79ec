"""Which positions of a sequence each context parallel rank has: two chunks, one from each end, so that causal work is equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from partita.core.sharding.split import deal
from partita.errors import PlanError

Chunks = tuple[tuple[int, int], ...]
"""Start and stop of each chunk of a rank, in the order of positions; chunks without positions are left out."""


def chunks_of(length: int, ranks: int) -> tuple[Chunks, ...]:
    """The chunks of every rank for a sequence of `length` tokens: of 2 x `ranks` chunks rank r has r and 2 x `ranks` - 1 - r.

    Under a causal mask a chunk's work grows with its place, and the two of a rank come to the same for every rank
    ("zig-zag": Brandon et al. 2023, 2311.09431; Llama 3, 2407.21783, section 3.3.2). Of sizes that differ by one, the first
    chunks are the longer ones.

    Raises:
        PlanError: A rank would have no position.

    Examples:
        >>> chunks_of(9, 2)
        (((0, 3), (7, 9)), ((3, 7),))
    """
    if length < ranks:
        raise PlanError(
            f"a sequence of {length} tokens cannot be split over cp={ranks}: every rank needs at least one. Use cp={length} or "
            "longer sequences."
        )
    if ranks == 1:
        return (((0, length),),)
    sizes = deal(length, 2 * ranks, allow_empty=True)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    places = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return tuple(_joined(places[r], places[-1 - r]) for r in range(ranks))


def positions_of(chunks: Chunks) -> list[int]:
    """The positions of a rank, in order."""
    return [position for start, stop in chunks for position in range(start, stop)]


def keepers_of(counts: Sequence[int], tokens: int) -> list[int]:
    """The rank that keeps each of `tokens` further tokens, where the ranks have `counts`: of those with the fewest, the first.

    Examples:
        >>> keepers_of((5, 3), 4)
        [1, 1, 0, 1]
    """
    counts, keepers = list(counts), []
    for _ in range(tokens):
        keepers.append(counts.index(min(counts)))
        counts[keepers[-1]] += 1
    return keepers


def tokens_held(length: int, rank: int, ranks: int) -> int:
    """How many of `length` tokens a rank holds where token t is on rank t mod `ranks`: it is at place t // `ranks` there.

    Examples:
        >>> [tokens_held(7, rank, 3) for rank in range(3)]
        [3, 2, 2]
    """
    return max(0, -(-(length - rank) // ranks))


@dataclass(frozen=True)
class Block:
    """Rows of a rank that attend keys of a rank, all given by their places in the ranks' tensors.

    Attributes:
        rows: Start and stop.
        keys: Start and stop.
        shift: The position of the first row less that of the first key.
        kind: "full": every row sees every key. "causal": row i sees keys 0..i. "window": row i sees key j if
            0 <= `shift` + i - j < window.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    shift: int
    kind: str

    @property
    def pairs(self) -> int:
        """How many products of a row and a key are computed."""
        rows, keys = self.rows[1] - self.rows[0], self.keys[1] - self.keys[0]
        return rows * (rows + 1) // 2 if self.kind == "causal" else rows * keys


def blocks_of(own: Chunks, held: Chunks, window: int | None = None, tile: int | None = None) -> list[Block]:
    """What the rows of chunks `own` attend of the keys of chunks `held`, under a causal mask of at most `window` keys.

    Two chunks are equal or disjoint. At most `tile` rows are in a block.

    Examples:
        >>> [(one.rows, one.keys, one.kind) for one in blocks_of(((0, 3), (7, 9)), ((3, 7),))]
        [((3, 5), (0, 4), 'full')]
    """
    return [
        Block((start - first + row, stop - first + row), (low - other + key, high - other + key), start - low, kind)
        for (first, last), row in _placed(own)
        for start, stop in _tiles(first, last, tile)
        for (other, end), key in _placed(held)
        for low, high, kind in _key_ranges(start, stop, other, end, window)
    ]


def _placed(chunks: Chunks) -> Iterator[tuple[tuple[int, int], int]]:
    """Each chunk and its place in the rank's tensors."""
    place = 0
    for start, stop in chunks:
        yield (start, stop), place
        place += stop - start


def _tiles(start: int, stop: int, tile: int | None) -> Iterator[tuple[int, int]]:
    step = tile or stop - start
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _key_ranges(start: int, stop: int, other: int, end: int, window: int | None) -> Iterator[tuple[int, int, str]]:
    """Of keys `other` to `end`, those that rows `start` to `stop` see, all positions."""
    low = other if window is None else max(other, start - window + 1)
    high = min(end, stop)
    if low >= high:
        return
    if window is not None and window < stop - start:
        yield low, high, "window"
        return
    seen_by_all = low if window is None else min(max(low, stop - window), high)
    own = min(max(start, seen_by_all), high)
    for first, last, kind in ((low, seen_by_all, "window"), (seen_by_all, own, "full"), (own, high, "causal")):
        if first < last:
            yield first, last, kind


def _joined(first: tuple[int, int], last: tuple[int, int]) -> Chunks:
    held = [place for place in (first, last) if place[0] < place[1]]
    if len(held) == 2 and held[0][1] == held[1][0]:
        return ((held[0][0], held[1][1]),)
    return tuple(held)
