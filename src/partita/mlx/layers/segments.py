"""Segments: fused parts of one dimension of a weight, each of which is distributed over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

from partita.core.sharding.split import Split
from partita.errors import PlanError

Segments = int | Sequence[int] | Sequence[float] | Sequence[Fraction]
"""A number of equal segments, or the positions between them: element indices (integers), or fractions of the dimension."""

_NEAR = 1e-6


def segment_lengths(size: int, segments: Segments) -> list[int]:
    """The lengths of the segments of `size` elements.

    Fractions are of the dimension, as in MLX: `[0.5, 0.75]` of 8 splits at 4 and 6. A fraction must fall on an element, where
    MLX takes the one below: 0.29 of 100 is 29, and not 28 for 0.29 being a little less in binary.

    Raises:
        PlanError: They do not divide `size`, fall between two elements, or do not ascend within it.
    """
    if isinstance(segments, int):
        if segments < 1 or size % segments:
            raise PlanError(f"segments must divide the {size} elements evenly; got {segments}. Pass the positions.")
        return [size // segments] * segments
    cuts = [_position(size, cut) for cut in segments]
    bounds: list[int] = [0, *cuts, size]
    if any(b <= a for a, b in pairwise(bounds)):
        raise PlanError(f"segments must ascend inside (0, {size}); got {list(segments)}, which split at {cuts}.")
    return [b - a for a, b in pairwise(bounds)]


def _position(size: int, cut: float | Fraction) -> int:
    if isinstance(cut, int):
        return cut
    exact = float(cut * size)
    if abs(exact - round(exact)) > _NEAR * size:
        raise PlanError(f"the segment position {cut} of {size} elements is {exact:g}, which is not an integer.")
    return round(exact)


def segment_split(
    size: int,
    parts: int,
    segments: Segments,
    sizes: Sequence[int] | None,
    unit: Callable[[Sequence[int]], int],
) -> Split:
    """The split of `size` elements over `parts` ranks.

    Args:
        size: Elements of the dimension.
        parts: Number of ranks.
        segments: The fused segments; each is distributed separately.
        sizes: Size of each rank's part of a single segment (default: equal parts).
        unit: Maps the lengths of the segments to the number of elements that stay together.

    Raises:
        PlanError: The arguments do not fit.
    """
    lengths = segment_lengths(size, segments)
    if sizes is None:
        return Split.even(size, parts, unit=unit(lengths), segments=lengths if len(lengths) > 1 else None)
    if len(lengths) > 1:
        raise PlanError("sizes and segments exclude each other: `sizes` apply to one segment.")
    if len(sizes) != parts or sum(sizes) != size or min(sizes) < 1:
        raise PlanError(f"sizes must be {parts} positive numbers that add up to {size}; got {tuple(sizes)}.")
    starts = [sum(sizes[:rank]) for rank in range(parts)]
    return Split(size, tuple(((start, start + n),) for start, n in zip(starts, sizes, strict=True)))
