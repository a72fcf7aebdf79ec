"""Split: the ranges of one dimension that each rank of an axis holds. All arithmetic of sharded tensors, in integers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from math import lcm
from typing import Any

from partita.errors import PlanError

Range = tuple[int, int]
"""Start and stop, half open."""


def check_sizes(least: int = 1, **sizes: object) -> None:
    """Raise `PlanError`, with its name, for a size that is not an integer of at least `least`."""
    for name, size in sizes.items():
        if type(size) is not int or size < least:
            raise PlanError(f"{name} must be a whole number of at least {least}, but is {size!r}.")


def deal(count: int, parts: int, weights: Sequence[float] | None = None, *, allow_empty: bool = False) -> list[int]:
    """The number of `count` indivisible units that each of `parts` ranks gets, in rank order.

    Without weights the counts differ by at most one, and the first ranks have the larger ones. With weights (relative speeds
    or memories) they follow the largest remainders (Hamilton's method), ties to the first rank; unless `allow_empty`, a
    rank that would get nothing takes one unit from the rank with the most.
    """
    if parts < 1:
        raise PlanError(f"parts must be at least 1, but is {parts}.")
    if count < parts and not allow_empty:
        raise PlanError(
            f"{count} unit{'s' if count != 1 else ''} cannot be distributed over {parts} ranks: every rank must hold one. "
            f"Use at most {count} rank{'s' if count != 1 else ''}, or allow_empty=True."
        )
    if weights is None:
        return [count // parts + (rank < count % parts) for rank in range(parts)]
    if len(weights) != parts or not all(0 < weight < float("inf") for weight in weights):
        raise PlanError(f"weights must be {parts} positive finite numbers, one per rank, but are {tuple(weights)}.")
    exact = [Fraction(weight) for weight in weights]
    shares = [count * weight / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(parts), key=lambda rank: (counts[rank] - shares[rank], rank))
    for rank in by_remainder[: count - sum(counts)]:
        counts[rank] += 1
    while not allow_empty and 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same elements in the same order with adjoining ranges joined and empty ones dropped."""
    merged: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


@dataclass(frozen=True)
class Split:
    """One dimension of `size` elements over the ranks of an axis.

    Attributes:
        size: Elements of the unsplit dimension.
        by_rank: For each rank, the ranges that it holds, in the order of its local tensor. Ranges of
            different ranks may overlap (replicated heads): then the lowest rank that holds an element owns it.

    Build one with `even`, `heads`, `kv_heads`, `concat` or `replicated`; they raise `PlanError` for invalid arguments.
    """

    size: int
    by_rank: tuple[tuple[Range, ...], ...]

    def __post_init__(self) -> None:
        if self.size < 0 or not self.by_rank:
            raise PlanError(
                f"a split needs a size of at least 0 and at least one rank, but has {self.size} and {self.parts} ranks."
            )
        for rank, ranges in enumerate(self.by_rank):
            for start, stop in ranges:
                if not 0 <= start < stop <= self.size:
                    raise PlanError(
                        f"rank {rank} holds the range [{start}, {stop}), which is not inside [0, {self.size})."
                    )
            if any(stop > start for (_, stop), (start, _) in pairwise(sorted(ranges))):
                raise PlanError(f"rank {rank} holds elements twice: its ranges {ranges} overlap.")
        held = sorted({r for ranges in self.by_rank for r in ranges})
        reach = 0
        for start, stop in held:
            if start > reach:
                break
            reach = max(reach, stop)
        if reach < self.size:
            raise PlanError(f"element {reach} of {self.size} is held by no rank.")

    # --- constructors ---------------------------------------------------------------------------------------------------

    @classmethod
    def even(
        cls,
        size: int,
        parts: int,
        *,
        unit: int = 1,
        weights: Sequence[float] | None = None,
        segments: Sequence[int] | None = None,
        allow_empty: bool = False,
    ) -> Split:
        """`size` elements distributed in units of `unit`, first ranks first.

        Args:
            size: Elements of the dimension.
            parts: Ranks of the axis.
            unit: Elements that stay together: a head's width, a quantization group, their least common multiple.
            weights: Relative shares of unequal devices, one per rank.
            segments: Lengths of the dimensions fused in this one, in order (gate and up; query, key and value). Each
                is split by itself and a rank holds its part of each.
            allow_empty: Whether a rank may hold nothing.
        """
        for name, number in (("size", size), ("parts", parts), ("unit", unit)):
            if type(number) is not int:
                raise PlanError(f"{name} must be a whole number, but is {number!r}.")
        if segments is not None:
            if sum(segments) != size or any(length < 1 for length in segments):
                raise PlanError(f"segments must be positive and add up to {size}, but are {tuple(segments)}.")
            return cls.concat(
                [cls.even(n, parts, unit=unit, weights=weights, allow_empty=allow_empty) for n in segments]
            )
        if size < 0:
            raise PlanError(f"size must not be negative, but is {size}.")
        if unit < 1 or size % unit:
            raise PlanError(f"size {size} must be a whole number of units of {unit}. Choose a unit that divides it.")
        bounds = [0, *accumulate(n * unit for n in deal(size // unit, parts, weights, allow_empty=allow_empty))]
        return cls(size, tuple(merge([(bounds[rank], bounds[rank + 1])]) for rank in range(parts)))

    @classmethod
    def heads(cls, num_heads: int, num_kv_heads: int, parts: int, *, width: int = 1, unit: int = 1) -> Split:
        """Query heads of `width` elements; `kv_heads` with the same arguments holds the KV heads that they attend to.

        With at least as many KV heads as ranks, heads are distributed in groups that share a KV head, and no KV head is
        copied. With fewer, each KV head's group is distributed over the ranks that hold it if the ranks are a multiple of
        the KV heads; if not, the query heads are distributed one by one. `unit` adjacent heads stay together (if a
        quantization group is wider than a head), if necessary at the cost of copies.
        """
        group = _group_size(num_heads, num_kv_heads)
        if num_heads % unit:
            raise PlanError(
                f"num_heads ({num_heads}) must be a multiple of unit ({unit}), the heads that stay together."
            )
        together = lcm(group, unit)
        if num_heads // unit < parts:
            raise PlanError(
                f"{num_heads} attention heads{f' in units of {unit}' if unit > 1 else ''} cannot be distributed over {parts} "
                f"ranks: every rank must hold one. Use tp={num_heads // unit} or less."
            )
        if num_kv_heads >= parts and num_heads % together == 0 and num_heads // together >= parts:
            return cls.even(num_heads * width, parts, unit=together * width)
        if num_kv_heads < parts and parts % num_kv_heads == 0 and group % unit == 0:
            counts = deal(group // unit, parts // num_kv_heads) * num_kv_heads
        else:
            counts = deal(num_heads // unit, parts)
        bounds = [0, *accumulate(n * unit * width for n in counts)]
        return cls(num_heads * width, tuple(((bounds[r], bounds[r + 1]),) for r in range(parts)))

    @classmethod
    def kv_heads(cls, num_heads: int, num_kv_heads: int, parts: int, *, width: int = 1, unit: int = 1) -> Split:
        """The KV heads that each rank's query heads attend to; ranges overlap if there are fewer than ranks."""
        group = _group_size(num_heads, num_kv_heads)
        queries = cls.heads(num_heads, num_kv_heads, parts, unit=unit)
        ranges = [ranges[0] for ranges in queries.by_rank]
        return cls(
            num_kv_heads * width,
            tuple(((start // group * width, ((stop - 1) // group + 1) * width),) for start, stop in ranges),
        )

    @classmethod
    def concat(cls, splits: Sequence[Split]) -> Split:
        """Dimensions concatenated in one tensor, each with its own split."""
        if not splits or len({split.parts for split in splits}) != 1:
            raise PlanError("concat takes at least one split, all over the same number of ranks.")
        offsets = [0, *accumulate(split.size for split in splits)]
        return cls(
            offsets[-1],
            tuple(
                merge(
                    (start + offset, stop + offset)
                    for split, offset in zip(splits, offsets, strict=False)
                    for start, stop in split.by_rank[rank]
                )
                for rank in range(splits[0].parts)
            ),
        )

    @classmethod
    def replicated(cls, size: int, parts: int) -> Split:
        """Every rank holds the complete dimension; rank 0 owns it."""
        return cls(size, (merge([(0, size)]),) * parts)

    def scaled(self, width: int) -> Split:
        """The same split of a dimension with `width` elements for each element of this one."""
        return Split(
            self.size * width, tuple(tuple((a * width, b * width) for a, b in ranges) for ranges in self.by_rank)
        )

    # --- queries ----------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> int:
        """Ranks of the axis."""
        return len(self.by_rank)

    def ranges(self, rank: int) -> tuple[Range, ...]:
        """The ranges that `rank` holds, in local order."""
        self._check_rank(rank)
        return self.by_rank[rank]

    @cached_property
    def local_sizes(self) -> tuple[int, ...]:
        """Elements that each rank holds."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.by_rank)

    def local_size(self, rank: int) -> int:
        """Elements that `rank` holds."""
        self._check_rank(rank)
        return self.local_sizes[rank]

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.parts:
            raise PlanError(f"rank must be in [0, {self.parts}), but is {rank!r}.")

    def owner(self, index: int) -> int:
        """The rank that owns element `index`: the lowest of those that hold it."""
        return self.holders(index)[0]

    def holders(self, index: int) -> tuple[int, ...]:
        """Every rank that holds element `index`."""
        if not 0 <= index < self.size:
            raise PlanError(f"index must be in [0, {self.size}), but is {index}.")
        return tuple(r for r, ranges in enumerate(self.by_rank) if any(a <= index < b for a, b in ranges))

    def to_global(self, rank: int, local_index: int) -> int:
        """The unsplit position of element `local_index` of `rank`'s local tensor."""
        left = local_index
        for start, stop in self.by_rank[rank]:
            if 0 <= left < stop - start:
                return start + left
            left -= stop - start
        raise PlanError(f"local_index must be in [0, {self.local_size(rank)}), but is {local_index}.")

    def to_local(self, rank: int, index: int) -> int | None:
        """The position of element `index` in `rank`'s local tensor, or None if `rank` does not hold it."""
        offset = 0
        for start, stop in self.by_rank[rank]:
            if start <= index < stop:
                return offset + index - start
            offset += stop - start
        return None

    def owned_ranges(self, rank: int) -> tuple[Range, ...]:
        """The ranges that `rank` owns, over all ranks every element once: those that it writes, and counts in a norm."""
        lower = sorted(r for ranges in self.by_rank[:rank] for r in ranges)
        owned: list[Range] = []
        for start, stop in self.by_rank[rank]:
            for a, b in lower:
                if a < stop and b > start:
                    owned.append((start, max(start, a)))
                    start = min(stop, b)
            owned.append((start, stop))
        return merge(owned)

    @cached_property
    def shared_ranges(self) -> tuple[Range, ...]:
        """The ranges that more than one rank holds, in ascending order: those whose gradients are summed."""
        changes: dict[int, int] = {}
        for ranges in self.by_rank:
            for start, stop in ranges:
                changes[start] = changes.get(start, 0) + 1
                changes[stop] = changes.get(stop, 0) - 1
        edges = sorted(changes)
        held = accumulate(changes[edge] for edge in edges)
        return merge((a, b) for (a, b), count in zip(pairwise(edges), held, strict=False) if count > 1)

    @property
    def is_partition(self) -> bool:
        """Whether every element is held by only one rank."""
        return not self.shared_ranges

    @cached_property
    def is_in_order(self) -> bool:
        """Whether the ranks' parts, concatenated, are the unsplit dimension in its order."""
        return merge(r for ranges in self.by_rank for r in ranges) == merge([(0, self.size)])

    # --- as data ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        runs = groupby(enumerate(self.by_rank), key=lambda item: item[1])
        cells = []
        for ranges, group in runs:
            ranks = [rank for rank, _ in group]
            label = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
            cells.append(f"{label}: {'+'.join(f'{a}:{b}' for a, b in ranges) or '-'}")
        return f"{self.size} = [{', '.join(cells)}]"

    def to_data(self) -> dict[str, Any]:
        """Plain lists and integers for JSON."""
        return {"size": self.size, "by_rank": [[list(r) for r in ranges] for ranges in self.by_rank]}

    @classmethod
    def from_data(cls, data: Any) -> Split:
        """The inverse of `to_data`; raises `PlanError` for anything else."""
        try:
            size, by_rank = data["size"], data["by_rank"]
            split = tuple(tuple((a, b) for a, b in ranges) for ranges in by_rank)
            numbers = [size, *(edge for ranges in split for r in ranges for edge in r)]
        except (TypeError, KeyError, ValueError) as error:
            raise PlanError(
                f"a split needs `size` and `by_rank` (a list of [start, stop] per rank), but is {data!r:.200}."
            ) from error
        if not split or any(type(number) is not int for number in numbers):
            raise PlanError(f"a split needs integers and at least one rank, but is {data!r:.200}.")
        return cls(size, split)


def kv_positions(group: int, heads: Split, rank: int) -> tuple[int, ...]:
    """For each query head of `rank`, the position among the rank's own KV heads of the one that it attends to.

    `group` query heads share a KV head; `heads` has the query heads of each rank.
    """
    (start, stop), *_ = heads.ranges(rank)
    return tuple(head // group - start // group for head in range(start, stop))


def _group_size(num_heads: int, num_kv_heads: int) -> int:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise PlanError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads}).")
    return num_heads // num_kv_heads
