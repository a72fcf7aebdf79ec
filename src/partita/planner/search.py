"""The best arrangements of a model over ranks, by branch and bound.

Meshes are visited in the order of a bound on their time (or bytes), then their families and groups in the order of their own
bounds; those in which nothing fits once more with the bound of what recomputes more.
The search ends when no bound is below the value of the worst plan that would be listed, so what it finds is the best of all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count as counter
from typing import Literal, NamedTuple, get_args

from partita.core.mesh import Mesh
from partita.cost.work import Arrangement, Estimate, Recompute, Work
from partita.errors import PlanError
from partita.planner.costs import Costs
from partita.planner.engines import ENGINES, Features
from partita.planner.layers import LARGEST_ONLY, SLACK, Amounts, Memory, place
from partita.planner.space import (
    Bound,
    Family,
    Fixed,
    Group,
    Settings,
    divisors,
    families,
    groups,
    meshes,
    recomputes,
    settings,
)

Optimize = Literal["time", "memory", "cost"]
OPTIMIZE: tuple[Optimize, ...] = get_args(Optimize)

SURELY = 1.1
"""A rank whose stages need so much of its memory, by the sum of their parts, has too little."""

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


class _Node(NamedTuple):
    """What the search visits at once: the arrangements of a family or a group that recompute so much, or more."""

    of: Family | Group
    level: int


class _Unplaced(NamedTuple):
    """The arrangements of a family with these settings, none of which fits."""

    node: _Node
    chosen: Settings


class Search:
    """The search for one piece of work on one machine. Estimates are kept, so that further questions about it are cheap."""

    def __init__(self, work: Work, costs: Costs, ranks: int, features: Features = ENGINES["torch"]) -> None:
        self.work, self.costs, self.ranks, self.features = work, costs, ranks, features
        self._estimates: dict[Arrangement, Estimate] = {}
        self._shares: dict[Arrangement, float] = {}
        self._leasts: dict[Arrangement, float] = {}
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

    def most_bytes(self, arrangement: Arrangement) -> int:
        """The bytes of the rank that needs the most."""
        return max(use.total for use in set(self.costs.memory(arrangement)))

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
        least = self.least_share(bare)
        if least > 1:
            return Placed(bare, least, is_free=False, group=group)
        if optimize == "memory":
            memory = self.costs.stage_bytes(bare)
            layers = self._place(memory.bytes, replace(group, microbatches=LARGEST_ONLY), None)
            assert layers is not None
            return self._with(bare, layers, memory, group, is_free=False)
        fastest = self.fastest(bare, group)
        if fastest.share <= 1:
            return fastest
        if self.costs.is_short(bare):
            return fastest
        memory = self.costs.stage_bytes(bare)
        fitted = self._place(self.costs.stage_seconds(bare), group, memory)
        return fastest if fitted is None else self._with(bare, fitted, memory, group, is_free=False)

    def least_share(self, bare: Arrangement) -> float:
        """The share of its memory that a rank needs at least; above 1 only if no assignment of the layers fits."""
        found = self._leasts.get(bare)
        if found is None:
            found = self.costs.least_share(bare)
            if found <= 1 + SLACK:
                found = max(found, math.nextafter(1, 2)) if self.costs.is_short(bare, SLACK) else min(found, 1.0)
            self._leasts[bare] = found
        return found

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
        self._levels = recomputes(search.work, fixed, features)
        self._choices: dict[Mesh, list[Settings]] = {}
        self._best: dict[Key, tuple[Value, Estimate]] = {}
        self._limit = below
        self._rejected: list[tuple[float, int, Placed | _Unplaced]] = []
        self._number = counter()
        self.least: Bound | None = None
        self._run()

    @property
    def closest(self) -> Estimate | None:
        """Of the arrangements that do not fit, the one whose fullest rank needs the smallest share of its memory."""
        while self._rejected:
            found = self._rejected[0][2]
            if isinstance(found, Placed) and found.group is None:
                return self._search.estimate(found.arrangement)
            heapq.heappop(self._rejected)
            if isinstance(found, Placed):
                assert found.group is not None
                self._note_closest(self._search.fastest(found.arrangement, found.group))
                continue
            assert isinstance(found.node.of, Family)
            for group in self._groups(found.node.of):
                bare = _bare(group, found.chosen, self._levels[found.node.level])
                self._note_closest(Placed(bare, self._search.least_share(bare), is_free=False, group=group))
        return None

    @property
    def plans(self) -> tuple[Estimate, ...]:
        """The best plans, the best first."""
        return tuple(estimate for _, estimate in sorted(self._best.values(), key=lambda one: one[0])[: self._count])

    def _run(self) -> None:
        search, number = self._search, self._number
        heap: list[tuple[float, int, Mesh | _Node]] = []
        for mesh in search.meshes(self._fixed, self._optimize, self._features):
            bound = search.bound(mesh)
            if bound is None:
                continue
            if not bound.can_fit:
                self._note_bound(bound)
                continue
            heapq.heappush(heap, (self._least(mesh, bound.seconds, bound.bytes), next(number), mesh))
        while heap and heap[0][0] < self._worst():
            least, _, item = heapq.heappop(heap)
            if not isinstance(item, _Node):
                nodes = [_Node(family, 0) for family in families(item, search.work, self._fixed)]
            elif not self._may_fit(item):
                nodes = [_Node(item.of, item.level + 1)] if item.level + 1 < len(self._levels) else []
            elif isinstance(item.of, Family):
                nodes = [_Node(group, item.level) for group in self._groups(item.of)]
            else:
                self._try(item.of, item.level)
                continue
            for node in nodes:
                try:
                    its = self._least(node.of.mesh, self._least_seconds(node), 0)
                except PlanError:
                    break  # the model cannot be split so
                heapq.heappush(heap, (max(least, its), next(number), node))

    def _groups(self, family: Family) -> Iterator[Group]:
        return groups(family, self._search.work, self._fixed, self._search.costs.most.pp)

    def _least_seconds(self, node: _Node) -> float:
        costs, recompute, parallel = self._search.costs, self._levels[node.level], self._parallel(node.of.mesh)
        if isinstance(node.of, Family):
            return costs.least_seconds_of_family(node.of, recompute, parallel)
        return costs.least_seconds(node.of, recompute, parallel=parallel)

    def _settings(self, mesh: Mesh) -> list[Settings]:
        if mesh not in self._choices:
            self._choices[mesh] = settings(mesh, self._search.work, self._fixed, self._features)
        return self._choices[mesh]

    def _parallel(self, mesh: Mesh) -> list[bool]:
        return sorted({chosen.sequence_parallel for chosen in self._settings(mesh)})

    def _may_fit(self, node: _Node) -> bool:
        """Whether an arrangement of a node that recomputes this much may fit. The frugal ones that do not are noted."""
        if self._optimize == "memory" or self._fixed.layers is not None:
            return True
        search, recompute = self._search, self._levels[node.level]
        rejected: list[tuple[float, Placed | _Unplaced]] = []
        for chosen in _frugal(self._settings(node.of.mesh)):
            if isinstance(node.of, Family):
                share = search.costs.least_share_of_family(node.of, recompute, chosen)
                rejected.append((share, _Unplaced(node, chosen)))
                if share <= 1 + SLACK:
                    return True
            else:
                bare = _bare(node.of, chosen, recompute)
                share = search.least_share(bare)
                rejected.append((share, Placed(bare, share, is_free=False, group=node.of)))
                if share <= 1:
                    return True
        for share, one in rejected:
            heapq.heappush(self._rejected, (share, next(self._number), one))
        return False

    def _least(self, mesh: Mesh, seconds: float, bytes_: int) -> float:
        if self._optimize == "memory":
            return float(bytes_)
        return seconds * mesh.size if self._optimize == "cost" else seconds

    def _worst(self) -> float:
        """The value that a plan must be below, or reach, to be listed."""
        return self._limit

    def _try(self, group: Group, level: int) -> None:
        """Price the arrangements of a group that recompute this much or more."""
        search = self._search
        for chosen in self._settings(group.mesh):
            for recompute in self._levels[level:]:
                bare = _bare(group, chosen, recompute)
                if self._optimize == "memory":
                    if not self._may_need_less(group, search.costs.least_bytes(bare) / (1 + SLACK)):
                        continue
                elif not self._may_be_better(group, search.costs.least_seconds(group, recompute, chosen)):
                    break
                if self._fixed.layers is not None:
                    fixed = replace(bare, layers=self._fixed.layers)
                    placed = Placed(fixed, search.share(fixed), is_free=True)
                else:
                    placed = search.placed(bare, group, self._optimize)
                if placed.share > 1:
                    self._note_closest(placed)
                    continue
                made = placed.arrangement
                if (
                    self._may_need_less(group, search.most_bytes(made))
                    if self._optimize == "memory"
                    else self._may_be_better(group, search.costs.least_seconds_of(made))
                ):
                    self._note(group, search.estimate(made))
                if placed.is_free and self._optimize != "memory":
                    break  # to compute more again takes longer; it may only help where memory decides the layers

    def _may_be_better(self, group: Group, seconds: float) -> bool:
        """Whether what takes `seconds` at least may be better than the best of its mesh and schedule, and be listed."""
        least = seconds * (group.mesh.size if self._optimize == "cost" else 1)
        own = self._best.get((group.mesh, group.schedule))
        return least < self._worst() and (own is None or least < own[0][0])

    def _may_need_less(self, group: Group, bytes_: float) -> bool:
        """Whether what needs so many bytes at least may be better than the best of its mesh and schedule, and be listed.

        Of two plans that need the same, the faster one is better.
        """
        own = self._best.get((group.mesh, group.schedule))
        return bytes_ <= self._worst() and (own is None or bytes_ <= own[0][0])

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


def _frugal(choices: Sequence[Settings]) -> list[Settings]:
    """Of settings those that may need the least memory: what ZeRO gathers in stage 3 is the only thing that a stage adds."""
    zeros = {chosen.zero for chosen in choices}
    few = {max(zeros), max(zeros - {3}, default=3)}
    seen = {(chosen.zero, chosen.sequence_parallel): chosen for chosen in choices if chosen.zero in few}
    return list(seen.values())


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
