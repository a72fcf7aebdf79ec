"""Distribute layers of unequal sizes over stages so that the largest stage is as small as possible."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise


def balance(sizes: Sequence[int], even: Sequence[int], first: int = 0, last: int = 0) -> list[int]:
    """The number of consecutive layers of each stage, at least one, whose largest stage is the smallest possible.

    Of the distributions with that largest stage it is one near to `even`, and `even` itself if that is among them.

    Args:
        sizes: The size of each layer, at least 0.
        even: The numbers of layers of each stage of another distribution, at least 1 each, which come to all layers.
        first: The size of what the first stage has besides its layers (the embedding).
        last: The same of the last stage (norm and head).
    """
    stages = len(even)
    # What the first and the last stage have besides belongs to their outermost layers, which no distribution moves.
    weights = [*sizes]
    weights[0] += first
    weights[-1] += last
    sums = [0, *accumulate(weights)]
    largest = _smallest_largest(sums, stages, at_least=max(weights))
    # The earliest layer at which each stage can begin, so that the stages from it on suffice for the rest.
    earliest = [len(sizes)]
    for _ in range(stages - 1):
        earliest.append(bisect_left(sums, sums[earliest[-1]] - largest))
    earliest.reverse()
    edges = [0]
    for stage, wanted in enumerate(list(accumulate(even))[:-1]):
        latest = min(_reach(sums, edges[-1], largest), len(sizes) - (stages - 1 - stage))
        edges.append(min(max(wanted, edges[-1] + 1, earliest[stage]), latest))
    return [end - start for start, end in pairwise([*edges, len(sizes)])]


def _reach(sums: Sequence[int], start: int, largest: int) -> int:
    """The end of the longest stage that begins at `start` and is no larger than `largest`."""
    return bisect_right(sums, sums[start] + largest) - 1


def _smallest_largest(sums: Sequence[int], stages: int, at_least: int) -> int:
    """The size of the largest stage of the best distribution, by bisection."""

    def suffices(largest: int) -> bool:
        end = 0
        for _ in range(stages):
            end = _reach(sums, end, largest)
        return end == len(sums) - 1

    low, high = at_least, sums[-1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle + 1, high)
    return low
