"""The best arrangements of a model over ranks, by branch and bound.

Meshes are visited in the order of a bound on their time (or bytes), then the groups of a mesh in the order of their own bounds.
The search ends when no bound is below the value of the worst plan that would be listed, so what it finds is the best of all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import count as counter
from typing import Literal, NamedTuple, get_args

from partita.core.mesh import Mesh
from partita.cost.work import Arrangement, Estimate, Recompute, Work
from partita.errors import PlanError
from partita.planner.costs import Costs
from partita.planner.engines import ENGINES, Features
from partita.planner.layers import SLACK, Amounts, Memory, place
from partita.planner.space import Bound, Fixed, Group, Settings, divisors, groups, meshes, recomputes, settings

Optimize = Literal["time", "memory", "cost"]
OPTIMIZE: tuple[Optimize, ...] = get_args(Optimize)

SURELY = 1.1
"""A rank whose stages need so much of its memory, by the sum of their parts, has too little."""

LARGEST_ONLY = 1 << 40
"""A number of micro-batches beside which only the largest stage counts."""

Value = tuple[float, float]
Key = tuple[Mesh, str]


class Placed(NamedTuple):
    """An arrangement with its layers.

    Attributes:
        arrangement: The arrangement.
        share: The largest share of its memory that a rank needs.
        is_free: Whether only time decided about the layers.
        group: If the layers are not placed, since no assignment fits: the group; the share is a bound then.
    """

    arrangement: Arrangement
    share: float
    is_free: bool
    group: Group | None = None


class Search:
    """The search for one piece of work on one machine. Estimates are kept, so that further questions about it are cheap."""

    def __init__(self, work: Work, costs: Costs, ranks: int, features: Features = ENGINES["torch"]) -> None:
        self.work, self.costs, self.ranks, self.features = work, costs, ranks, features
        self._estimates: dict[Arrangement, Estimate] = {}
        self._shares: dict[Arrangement, float] = {}
        self._placed: dict[tuple[Arrangement, bool], Placed] = {}
        self._founds: dict[tuple[object, ...], Found] = {}
        self._bounds: dict[Mesh, Bound | None] = {}
        self._places: dict[
            tuple[int, tuple[int, ...], int, int], tuple[Amounts, Memory | None, tuple[int, ...] | None]
        ] = {}

    def share(self, arrangement: Arrangement) -> float:
        """The largest share of its memory that a rank needs."""
        found = self._shares.get(arrangement)
        if found is None:
            uses, limit = self.costs.memory(arrangement), self.costs.limit(arrangement.mesh)
            found = self._shares[arrangement] = max(
                use.total / limit for use, limit in set(zip(uses, limit, strict=True))
            )
        return found

    @property
    def evaluated(self) -> int:
        """The number of estimates so far."""
        return len(self._estimates)

    def run(
        self, fixed: Fixed, *, optimize: Optimize = "time", count: int = 10, features: Features | None = None,
        below: float = math.inf,
    ) -> Found:  # fmt: skip
        """The best plans; those that are not better than the value `below` may be left out.

        Raises:
            PlanError: No mesh of the ranks has the sizes that are fixed.
        """
        question = fixed, optimize, count, features or self.features, below
        if question not in self._founds:
            self._founds[question] = Found(self, *question)
        return self._founds[question]

    def meshes(self, fixed: Fixed, optimize: Optimize, features: Features) -> Iterator[Mesh]:
        """Every mesh; if cost is to be minimized, also those of fewer ranks, which divide all."""
        yield from meshes(self.ranks, fixed, self.costs.most, features)
        for ranks in divisors(self.ranks)[:-1] if optimize == "cost" else ():
            try:
                yield from meshes(ranks, fixed, self.costs.most, features)
            except PlanError:
                continue

    def bound(self, mesh: Mesh) -> Bound | None:
        """The bound of a mesh; None for one that cannot split the model."""
        if mesh not in self._bounds:
            try:
                self._bounds[mesh] = self.costs.bound(mesh)
            except PlanError:
                self._bounds[mesh] = None
        return self._bounds[mesh]

    def estimate(self, arrangement: Arrangement) -> Estimate:
        """What an arrangement costs."""
        found = self._estimates.get(arrangement)
        if found is None:
            found = self._estimates[arrangement] = self.costs.estimate(arrangement)
        return found

    def value(self, estimate: Estimate, optimize: Optimize) -> Value:
        """What plans are compared by; the smallest is the best."""
        seconds, most = self.costs.seconds_of(estimate), max(use.total for use in set(estimate.memory))
        if optimize == "memory":
            return most, seconds
        return (seconds * estimate.arrangement.mesh.size if optimize == "cost" else seconds), most

    def placed(self, bare: Arrangement, group: Group, optimize: Optimize) -> Placed:
        """The best assignment of the layers that fits; if none does, one that does not, or none."""
        key = bare, optimize == "memory"
        if key not in self._placed:
            self._placed[key] = self._find_place(bare, group, optimize)
        return self._placed[key]

    def _find_place(self, bare: Arrangement, group: Group, optimize: Optimize) -> Placed:
        least = self.costs.least_share(bare)
        if least > 1 + SLACK:
            return Placed(bare, least, is_free=False, group=group)
        memory = self.costs.stage_bytes(bare)
        if optimize == "memory":
            layers = self._place(memory.bytes, replace(group, microbatches=LARGEST_ONLY), None)
            assert layers is not None
            return self._with(bare, layers, memory, group, is_free=False)
        if memory.is_short(group.homes, SLACK):
            return Placed(bare, max(least, math.nextafter(1, 2)), is_free=False, group=group)
        fastest = self.fastest(bare, group)
        if fastest.share <= 1:
            return fastest
        is_short = memory.is_short(group.homes)
        fitted = None if is_short else self._place(self.costs.stage_seconds(bare), group, memory)
        return fastest if fitted is None else self._with(bare, fitted, memory, group, is_free=False)

    def fastest(self, bare: Arrangement, group: Group) -> Placed:
        """The best assignment of the layers, whether it fits or not."""
        layers = self._place(self.costs.stage_seconds(bare), group, None)
        assert layers is not None
        return self._with(bare, layers, self.costs.stage_bytes(bare), group, is_free=True)

    def _with(
        self, bare: Arrangement, layers: tuple[int, ...], memory: Memory, group: Group, *, is_free: bool
    ) -> Placed:
        """The arrangement with these layers. The sum of parts is its share of memory, unless that decides whether it fits."""
        made, share = replace(bare, layers=layers), memory.share(layers, group.homes)
        return Placed(made, self.share(made) if 1 < share <= SURELY else share, is_free)

    def _place(self, seconds: Amounts, group: Group, memory: Memory | None) -> tuple[int, ...] | None:
        """`place`, once for the same amounts, which `costs` keeps."""
        key = id(seconds), group.homes, group.microbatches, id(memory)
        if key not in self._places:
            self._places[key] = seconds, memory, place(seconds, group.homes, group.microbatches, memory)
        return self._places[key][2]


class Found:
    """The best plans of one question.

    Attributes:
        least: Of the meshes that cannot fit, the bound of the one that needs the smallest share of its memory.
    """

    def __init__(
        self, search: Search, fixed: Fixed, optimize: Optimize, count: int, features: Features, below: float
    ) -> None:
        self._search, self._fixed, self._optimize, self._count = search, fixed, optimize, count
        self._features, self._below = features, below
        self._best: dict[Key, tuple[Value, Estimate]] = {}
        self._limit = below
        self._rejected: list[tuple[float, int, Placed]] = []
        self._number = counter()
        self.least: Bound | None = None
        self._run()

    @property
    def closest(self) -> Estimate | None:
        """Of the arrangements that do not fit, the one whose fullest rank needs the smallest share of its memory."""
        while self._rejected:
            placed = self._rejected[0][2]
            if placed.group is None:
                return self._search.estimate(placed.arrangement)
            heapq.heappop(self._rejected)
            self._note_closest(self._search.fastest(placed.arrangement, placed.group))
        return None

    @property
    def plans(self) -> tuple[Estimate, ...]:
        """The best plans, the best first."""
        return tuple(estimate for _, estimate in sorted(self._best.values(), key=lambda one: one[0])[: self._count])

    def _run(self) -> None:
        search, number = self._search, self._number
        heap: list[tuple[float, int, Mesh | Group]] = []
        for mesh in search.meshes(self._fixed, self._optimize, self._features):
            bound = search.bound(mesh)
            if bound is None:
                continue
            if not bound.can_fit:
                self._note_bound(bound)
                continue
            heapq.heappush(heap, (self._least(mesh, bound.seconds, bound.bytes), next(number), mesh))
        while heap and heap[0][0] < self._worst():
            _, _, item = heapq.heappop(heap)
            if isinstance(item, Group):
                self._try(item)
                continue
            bound = search.bound(item)
            assert bound is not None
            choices = settings(item, search.work, self._fixed, self._features)
            parallel = sorted({chosen.sequence_parallel for chosen in choices})
            for group in groups(item, search.work, self._fixed, search.costs.most.pp):
                try:
                    seconds = search.costs.least_seconds(group, parallel=parallel)
                except PlanError:
                    break  # the model cannot be split so
                heapq.heappush(heap, (self._least(item, seconds, bound.bytes), next(number), group))

    def _least(self, mesh: Mesh, seconds: float, bytes_: int) -> float:
        if self._optimize == "memory":
            return float(bytes_)
        return seconds * mesh.size if self._optimize == "cost" else seconds

    def _worst(self) -> float:
        """The value that a plan must be below, or reach, to be listed."""
        return self._limit

    def _try(self, group: Group) -> None:
        search = self._search
        levels = recomputes(search.work, self._fixed, self._features)
        for chosen in settings(group.mesh, search.work, self._fixed, self._features):
            for recompute in levels:
                if self._optimize != "memory" and not self._may_be_better(
                    group, search.costs.least_seconds(group, recompute, chosen)
                ):
                    break
                bare = _bare(group, chosen, recompute)
                if self._fixed.layers is not None:
                    fixed = replace(bare, layers=self._fixed.layers)
                    placed = Placed(fixed, search.share(fixed), is_free=True)
                else:
                    placed = search.placed(bare, group, self._optimize)
                if placed.share > 1:
                    self._note_closest(placed)
                    continue
                made = placed.arrangement
                if self._optimize == "memory" or self._may_be_better(group, search.costs.least_seconds_of(made)):
                    self._note(group, search.estimate(made))
                if placed.is_free and self._optimize != "memory":
                    break  # to compute more again takes longer; it may only help where memory decides the layers

    def _may_be_better(self, group: Group, seconds: float) -> bool:
        """Whether what takes `seconds` at least may be better than the best of its mesh and schedule, and be listed."""
        least = seconds * (group.mesh.size if self._optimize == "cost" else 1)
        own = self._best.get((group.mesh, group.schedule))
        return least < self._worst() and (own is None or least < own[0][0])

    def _note(self, group: Group, estimate: Estimate) -> None:
        key, value = (group.mesh, group.schedule), self._search.value(estimate, self._optimize)
        if key not in self._best or value < self._best[key][0]:
            self._best[key] = value, estimate
            if len(self._best) >= self._count:
                values = sorted(value for value, _ in self._best.values())
                self._limit = min(self._below, values[self._count - 1][0])

    def _note_closest(self, placed: Placed) -> None:
        heapq.heappush(self._rejected, (placed.share, next(self._number), placed))

    def _note_bound(self, bound: Bound) -> None:
        if self.least is None or bound.bytes / bound.limit < self.least.bytes / self.least.limit:
            self.least = bound


def _bare(group: Group, chosen: Settings, recompute: Recompute) -> Arrangement:
    """An arrangement whose layers are not placed yet; it has as many stages as the group."""
    return Arrangement(
        mesh=group.mesh, layers=(0,) * (group.mesh.pp * group.vpp), placement=group.placement, schedule=group.schedule,
        microbatches=group.microbatches, zero=chosen.zero, recompute=recompute, sequence_parallel=chosen.sequence_parallel,
        overlap_gradients=chosen.overlap_gradients,
    )  # fmt: skip


def excess(estimate: Estimate) -> float:
    """The largest share of its memory that a rank needs."""
    return max(use.total / limit for use, limit in zip(estimate.memory, estimate.limit, strict=True))
