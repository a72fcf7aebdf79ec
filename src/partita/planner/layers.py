"""Assign layers to stages so that a step takes as little time as possible, and every rank has the memory.

A step of a pipeline takes one pass of a micro-batch through all stages, and then the slowest rank's work on every further
micro-batch (2104.04473, section 2.2; with v stages on a rank the first pass is v times shorter):

    seconds = sum of t / v + (microbatches - 1 / v) * load        t: seconds of a stage, forward and backward
                                                                  load: the largest sum of t of one rank's stages

With one stage on each rank `place` is exact. For a fixed largest stage the stages that begin as early and as late as possible
are found greedily. On equal devices the sum of t is the same for all assignments, and the smallest largest stage is the best
one. On unlike devices a dynamic programme finds the smallest sum for every largest stage that could be better.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple

from partita.core.sharding.split import deal

EXHAUSTIVE = 2_000
"""With several stages on a rank, up to this many assignments are all compared."""

LARGEST_ONLY = 1 << 40
"""A number of micro-batches beside which only the largest stage counts."""

PRECISION = 1e-12
"""The relative difference below which two times are equal."""

SLACK = 0.02
"""The share by which the bytes of stages may exceed those of an estimate."""

TAKERS = 4
"""With more assignments, a layer moves to one of that many ranks with the least to compute."""


@dataclass(frozen=True)
class Amounts:
    """Seconds or bytes of each stage, as a sum over its layers.

    Attributes:
        layers: The amount of each layer, by stage: the devices and the number of micro-batches that are alive differ.
        outside: What each stage has besides its layers: the embedding, the head.
    """

    layers: tuple[tuple[float, ...], ...]
    outside: tuple[float, ...]

    @cached_property
    def sums(self) -> tuple[tuple[float, ...], ...]:
        """For each stage, the sums of the first n layers."""
        made = {id(row): (0.0, *accumulate(row)) for row in {id(row): row for row in self.layers}.values()}
        return tuple(made[id(row)] for row in self.layers)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether a layer has the same amount on every stage."""
        return all(row == self.layers[0] for row in self.layers)

    def of(self, counts: Sequence[int]) -> list[float]:
        """The amount of each stage with these numbers of layers."""
        found, start = [], 0
        for sums, outside, count in zip(self.sums, self.outside, counts, strict=True):
            end = start + count
            found.append(sums[end] - sums[start] + outside)
            start = end
        return found


@dataclass(frozen=True)
class Memory:
    """The bytes of stages, and how many each pipeline rank may use for them."""

    bytes: Amounts
    limit: tuple[float, ...]

    def share(self, counts: Sequence[int], homes: Sequence[int]) -> float:
        """The largest share of its memory that a rank needs."""
        return max(held / limit for held, limit in zip(loads_of(self.bytes.of(counts), homes), self.limit, strict=True))

    def is_short(self, homes: Sequence[int], slack: float = 0.0) -> bool:
        """Whether no assignment fits: not all layers have room, if each rank takes as many as it can of those with the fewest
        bytes."""
        room = 0
        stages: dict[int, list[int]] = {}
        for stage, home in enumerate(homes):
            stages.setdefault(home, []).append(stage)
        sums: dict[tuple[int, ...], list[float] | float] = {}
        for home, own in stages.items():
            free = self.limit[home] * (1 + slack + PRECISION) - sum(self.bytes.outside[stage] for stage in own)
            if free < 0:
                return True
            rows = {id(self.bytes.layers[stage]): self.bytes.layers[stage] for stage in own}
            key = tuple(sorted(rows))
            if key not in sums:
                least = (
                    next(iter(rows.values())) if len(rows) == 1 else tuple(map(min, zip(*rows.values(), strict=True)))
                )
                one = min(least)
                sums[key] = one if one == max(least) else list(accumulate(sorted(least)))
            found = sums[key]
            room += bisect_right(found, free) if isinstance(found, list) else int(free / found * (1 + PRECISION))
        return room < len(self.bytes.layers[0])

    @cached_property
    def may_suffice(self) -> bool:
        """Whether the memory of all ranks together suffices for all layers, each where it needs the fewest bytes."""
        least: float = sum(map(min, zip(*set(self.bytes.layers), strict=True)))
        return least + sum(self.bytes.outside) <= sum(self.limit) * (1 + SLACK)


def seconds_of(times: Sequence[float], homes: Sequence[int], microbatches: int) -> float:
    """The seconds of a step whose stages take these `times` for a micro-batch; `homes` is the rank of each stage."""
    vpp = len(times) // (max(homes) + 1)
    return sum(times) / vpp + (microbatches - 1 / vpp) * max(loads_of(times, homes))


def place(
    seconds: Amounts, homes: Sequence[int], microbatches: int, memory: Memory | None = None
) -> tuple[int, ...] | None:
    """The number of layers of each stage for the shortest step; None if no assignment that was found fits the memory.

    With one stage on each rank the result is the best one. With several, it is if all assignments are compared.

    Args:
        seconds: Time of a micro-batch, forward and backward.
        homes: The pipeline rank of each stage.
        microbatches: Micro-batches of a step.
        memory: The memory of every rank; None if it is not a limit.
    """
    if memory is not None and not memory.may_suffice:
        return None
    if len(homes) > max(homes) + 1:
        return _place_several(seconds, homes, microbatches, memory)
    return _Chain(seconds, microbatches, memory).best()


class _Chain:
    """One stage on each rank. Times and bytes only grow with the number of layers."""

    def __init__(self, seconds: Amounts, microbatches: int, memory: Memory | None) -> None:
        self._seconds, self._microbatches, self._memory = seconds, microbatches, memory
        self._stages, self._count = len(seconds.outside), len(seconds.layers[0])

    def best(self) -> tuple[int, ...] | None:
        largest = self._smallest_largest()
        if largest is None:
            return None
        if self._seconds.is_uniform or self._microbatches >= LARGEST_ONLY:
            return self._near_even(largest)
        return self._shortest(largest)

    def _end(self, stage: int, start: int, largest: float) -> int:
        """The end of the longest stage that begins at layer `start`; -1 if not even an empty stage is possible."""
        return min(
            self._reach(self._seconds, stage, start, largest),
            self._count
            if self._memory is None
            else self._reach(self._memory.bytes, stage, start, self._memory.limit[stage]),
        )

    @staticmethod
    def _reach(amounts: Amounts, stage: int, start: int, limit: float) -> int:
        sums, outside = amounts.sums[stage], amounts.outside[stage]
        end = bisect_right(sums, sums[start] + limit - outside) - 1
        while end >= start and sums[end] - sums[start] + outside > limit:  # the sums are rounded
            end -= 1
        while end + 1 < len(sums) and sums[end + 1] - sums[start] + outside <= limit:
            end += 1
        return end if end >= start else -1

    def _ends(self, largest: float) -> list[int] | None:
        """The latest end of each stage; None if the stages do not suffice."""
        ends = []
        end = 0
        for stage in range(self._stages):
            end = self._end(stage, end, largest)
            if end < 0:
                return None
            ends.append(end)
        return ends if end == self._count else None

    def _smallest_largest(self) -> float | None:
        """The smallest time of the largest stage, among the times that stages can have."""
        ends = self._ends(math.inf)
        if ends is None:
            return None
        counts = [end - start for start, end in pairwise([0, *ends])]
        low, high = 0.0, max(self._seconds.of(counts))
        while high - low > PRECISION * high:
            middle = (low + high) / 2
            ends = self._ends(middle)
            if ends is None:
                middle = self._next(middle)
                if middle >= high:
                    return high
                ends = self._ends(middle)
            if ends is None:
                low = middle
            else:
                high = max(self._seconds.of([end - start for start, end in pairwise([0, *ends])]))
        return high

    def _next(self, largest: float) -> float:
        """The smallest time above `largest` with which a stage may be longer than with it; infinite if memory is the limit."""
        found, start = math.inf, 0
        for stage, outside in enumerate(self._seconds.outside):
            sums, end = self._seconds.sums[stage], self._end(stage, start, largest)
            if end < 0:
                return min(found, outside) if outside > largest else found
            if end == self._reach(self._seconds, stage, start, largest) and end < self._count:
                found = min(found, sums[end + 1] - sums[start] + outside)
            start = end
        return found

    def _near_even(self, largest: float) -> tuple[int, ...]:
        """Of the assignments with that largest stage one that is near to equal numbers of layers."""
        earliest = [self._count]
        for stage in reversed(range(1, self._stages)):
            start = earliest[-1]
            while start > 0 and self._end(stage, start - 1, largest) >= earliest[-1]:
                start -= 1
            earliest.append(start)
        earliest.reverse()
        edges = [0]
        for stage, wanted in enumerate(accumulate(deal(self._count, self._stages, allow_empty=True)[:-1])):
            latest = self._end(stage, edges[-1], largest)
            edges.append(min(max(wanted, edges[-1], earliest[stage]), latest))
        return tuple(end - start for start, end in pairwise([*edges, self._count]))

    def _shortest(self, smallest: float) -> tuple[int, ...]:
        """The best assignment over all times of the largest stage."""
        rest = self._microbatches - 1
        found, total = self._smallest_sum(math.inf)
        best, best_s = found, total + rest * max(self._seconds.of(found))
        for largest in self._times(smallest, best_s, total, rest):
            if total + rest * largest >= best_s:
                break
            counts, its_total = self._smallest_sum(largest)
            its_s = its_total + rest * max(self._seconds.of(counts))
            if its_s < best_s:
                best, best_s = counts, its_s
        return best

    def _times(self, smallest: float, best_s: float, total: float, rest: int) -> list[float]:
        """The times that a largest stage can have and that could be better than `best_s`, the smallest first."""
        found = {smallest}
        for sums, outside in set(zip(self._seconds.sums, self._seconds.outside, strict=True)):
            for start in range(self._count + 1):
                for end in range(start, self._count + 1):
                    time = sums[end] - sums[start] + outside
                    if time > smallest and total + rest * time < best_s:
                        found.add(time)
        return sorted(found)

    def _smallest_sum(self, largest: float) -> tuple[tuple[int, ...], float]:
        """The assignment with the smallest sum of times whose stages take at most `largest`, and that sum.

        best[stage][end] is the smallest sum of the first stages with layers 0 to end, and the start of the last of them.
        """
        rows: list[dict[int, tuple[float, int]]] = []
        before: dict[int, float] = {0: 0.0}
        for stage in range(self._stages):
            sums, outside = self._seconds.sums[stage], self._seconds.outside[stage]
            row: dict[int, tuple[float, int]] = {}
            for start, so_far in before.items():
                base = so_far + outside - sums[start]
                for end in range(start, self._end(stage, start, largest) + 1):
                    time = base + sums[end]
                    if end not in row or time < row[end][0]:
                        row[end] = time, start
            rows.append(row)
            before = {end: time for end, (time, _) in row.items()}
        total, counts, end = before[self._count], [], self._count
        for row in reversed(rows):
            start = row[end][1]
            counts.append(end - start)
            end = start
        return tuple(reversed(counts)), total


def _place_several(
    seconds: Amounts, homes: Sequence[int], microbatches: int, memory: Memory | None
) -> tuple[int, ...] | None:
    """Several stages on each rank: all assignments if they are few, else from an even one by moving single layers."""
    stages, layers = len(homes), len(seconds.layers[0])

    own: list[list[int]] = [[] for _ in range(max(homes) + 1)]
    for stage, home in enumerate(homes):
        own[home].append(stage)
    vpp = stages // len(own)

    def rated(counts: list[int], times: _Values, held: _Values | None) -> _Assignment:
        over = 0.0
        if memory is not None and held is not None:
            over = sum(used - limit for used, limit in zip(held.loads, memory.limit, strict=True) if used > limit)
        step_s = sum(times.each) / vpp + (microbatches - 1 / vpp) * max(times.loads)
        return _Assignment((over, step_s, sum(count * count for count in counts)), counts, times, held)

    def assigned(counts: Sequence[int]) -> _Assignment:
        held = None if memory is None else _Values.of(memory.bytes, own, counts)
        return rated(list(counts), _Values.of(seconds, own, counts), held)

    def moved(before: _Assignment, giver: int, taker: int) -> _Assignment:
        counts = before.counts.copy()
        counts[giver] -= 1
        counts[taker] += 1
        span = min(giver, taker), max(giver, taker)
        held = (
            before.held if memory is None or before.held is None else before.held.moved(memory.bytes, own, counts, span)
        )
        return rated(counts, before.times.moved(seconds, own, counts, span), held)

    even = deal(layers, stages, allow_empty=True)
    if math.comb(layers + stages - 1, stages - 1) <= EXHAUSTIVE:
        best = min(map(assigned, (even, *compositions(layers, stages))), key=_rating)
    else:
        best = _improved(assigned(even), own, memory, moved)
    return tuple(best.counts) if best.rating[0] == 0 else None


class _Values(NamedTuple):
    """The amounts of each stage, and their sums on each rank."""

    each: list[float]
    loads: list[float]

    @classmethod
    def of(cls, amounts: Amounts, own: list[list[int]], counts: Sequence[int]) -> _Values:
        """Those of an assignment; `own` has the stages of each rank."""
        each = amounts.of(counts)
        return cls(each, [sum(map(each.__getitem__, stages)) for stages in own])

    def moved(self, amounts: Amounts, own: list[list[int]], counts: list[int], span: tuple[int, int]) -> _Values:
        """Those of another assignment, which differs from the first to the last stage of `span`."""
        each, (first, last) = self.each.copy(), span
        start, sums, outside = sum(counts[:first]), amounts.sums, amounts.outside
        for stage in range(first, last + 1):
            end = start + counts[stage]
            row = sums[stage]
            each[stage] = row[end] - row[start] + outside[stage]
            start = end
        return _Values(each, [sum(map(each.__getitem__, stages)) for stages in own])


class _Assignment(NamedTuple):
    """Layers of each stage, and what they come to.

    Attributes:
        rating: Bytes beyond the limits, the seconds of a step, and how unequal the stages are; the smallest is the best.
        counts: Layers of each stage.
        times: Seconds of a micro-batch.
        held: Bytes; None where memory is not a limit.
    """

    rating: tuple[float, float, int]
    counts: list[int]
    times: _Values
    held: _Values | None


def _rating(one: _Assignment) -> tuple[float, float, int]:
    return one.rating


def _improved(
    best: _Assignment,
    own: list[list[int]],
    memory: Memory | None,
    moved: Callable[[_Assignment, int, int], _Assignment],
) -> _Assignment:
    """Move single layers from the rank that is over its limit, or else has the most to compute, to others while that helps."""
    while True:
        loads = best.times.loads
        if memory is not None and best.held is not None and best.rating[0] > 0:
            loads = [held - limit for held, limit in zip(best.held.loads, memory.limit, strict=True)]
        order = sorted(range(len(loads)), key=loads.__getitem__)
        layers_of = best.counts.__getitem__
        giver = max(own[order[-1]], key=layers_of)
        takers = order[: min(TAKERS, len(order) - 1)] if best.counts[giver] else []
        moves = (moved(best, giver, min(own[rank], key=layers_of)) for rank in takers)
        found = min(moves, key=lambda one: (one.rating, one.counts), default=best)
        if found.rating >= best.rating:
            return best
        best = found


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every tuple of `parts` numbers of at least 0 that come to `total`."""
    for bars in combinations(range(total + parts - 1), parts - 1):
        yield tuple(end - start - 1 for start, end in pairwise((-1, *bars, total + parts - 1)))


def loads_of(amounts: Sequence[float], homes: Sequence[int]) -> list[float]:
    """The sum over the stages of each rank."""
    loads = [0.0] * (max(homes) + 1)
    for amount, home in zip(amounts, homes, strict=True):
        loads[home] += amount
    return loads
