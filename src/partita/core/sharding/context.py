"""Which positions of a sequence each context parallel rank has: two chunks, one from each end, so that causal work is equal."""

from __future__ import annotations

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


def _joined(first: tuple[int, int], last: tuple[int, int]) -> Chunks:
    held = [place for place in (first, last) if place[0] < place[1]]
    if len(held) == 2 and held[0][1] == held[1][0]:
        return ((held[0][0], held[1][1]),)
    return tuple(held)
