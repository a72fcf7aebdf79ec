"""The answer to a question: the best plans, why others lose, and what fits if nothing does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from partita.cost.work import RECOMPUTE, Estimate, Work
from partita.errors import PlanError
from partita.planner.costs import CostsOf
from partita.planner.engines import ENGINES, Features, unsupported
from partita.planner.search import Found, Optimize, Search
from partita.planner.space import SCHEDULES, Bound, Fixed, divisors, with_experts

MORE_RANKS = 10
"""How often the number of ranks is doubled to find one that suffices."""


@dataclass(frozen=True)
class Loser:
    """A class of plans that the best one does not belong to.

    Attributes:
        change: What its plans have in common, in the names of options.
        estimate: The best of them; None if none fits.
        closest: If none fits, the one that comes closest, if one was estimated.
        least: If none was estimated, what they need at least.
    """

    change: str
    estimate: Estimate | None = None
    closest: Estimate | None = None
    least: Bound | None = None


@dataclass(frozen=True)
class Nearest:
    """A plan that fits, of a question similar to the one that was asked.

    Attributes:
        change: How the question differs, in the names of options.
        estimate: The best plan.
    """

    change: str
    estimate: Estimate


@dataclass(frozen=True)
class Result:
    """The answer.

    Attributes:
        plans: The best plans that fit, the best first: for each mesh and schedule the best one.
        losers: Classes of other plans.
        external: The best plan for an engine that executes all settings, if it is better than `plans`.
        nearest: If nothing fits, plans of similar questions that do.
        closest: If nothing fits, the estimate that comes closest, if one was made.
        least: If nothing fits and nothing was estimated, what a plan needs at least.
        evaluated: The number of estimates that were made.
    """

    plans: tuple[Estimate, ...]
    losers: tuple[Loser, ...] = ()
    external: Estimate | None = None
    nearest: tuple[Nearest, ...] = ()
    closest: Estimate | None = None
    least: Bound | None = None
    evaluated: int = 0


def best(
    costs_of: CostsOf,
    work: Work,
    ranks: int,
    fixed: Fixed | None = None,
    *,
    optimize: Optimize = "time",
    count: int = 10,
    features: Features = ENGINES["torch"],
    explain: bool = True,
) -> Result:
    """The best plans for a piece of work on a number of ranks.

    Args:
        costs_of: The costs.
        work: The work.
        ranks: The number of ranks.
        fixed: What is not for the planner to choose.
        optimize: `time` for the shortest step, `memory` for the fewest bytes on the fullest rank, `cost` for the fewest
            seconds times ranks, where fewer ranks may be used.
        count: The number of plans.
        features: What the engine executes. What is fixed may be anything.
        explain: Whether to find out why others lose.

    Raises:
        PlanError: The parts that are fixed contradict each other, or the machine has fewer ranks.
    """
    with _without_collector():
        return _best(costs_of, work, ranks, fixed or Fixed(), optimize, count, features, explain=explain)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the garbage collector: a search makes many objects, keeps most, and leaves no cycles behind."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _best(
    costs_of: CostsOf, work: Work, ranks: int, fixed: Fixed, optimize: Optimize, count: int, features: Features, *,
    explain: bool,
) -> Result:  # fmt: skip
    search = Search(work, costs_of(work, ranks), ranks, features)
    found = search.run(fixed, optimize=optimize, count=count)
    plans = found.plans
    if not plans:
        nearest = tuple(_nearest(costs_of, work, ranks, fixed, features)) if explain else ()
        return Result((), (), None, nearest, found.closest, found.least, search.evaluated)
    losers: tuple[Loser, ...] = ()
    if explain:
        plans, losers = _explained(search, fixed, plans, optimize)
    external = _external(search, fixed, plans[0], optimize) if explain else None
    return Result(plans, losers, external, evaluated=search.evaluated)


def _explained(
    search: Search, fixed: Fixed, plans: tuple[Estimate, ...], optimize: Optimize
) -> tuple[tuple[Estimate, ...], tuple[Loser, ...]]:
    """The plans and the losers. A class that has a better plan than the best, as a local search may miss one, puts it first."""
    while True:
        losers = tuple(_losers(search, fixed, plans[0], optimize))
        found = [loser.estimate for loser in losers if loser.estimate is not None]
        first = min((plans[0], *found), key=lambda one: search.value(one, optimize)[0])
        if first is plans[0]:
            return plans, losers
        made = first.arrangement
        others = (
            one for one in plans
            if (one.arrangement.mesh, one.arrangement.schedule) != (made.mesh, made.schedule)
        )  # fmt: skip
        plans = (first, *others)[: len(plans)]


def _losers(search: Search, fixed: Fixed, winner: Estimate, optimize: Optimize) -> Iterator[Loser]:
    for change, other in _classes(search, fixed, winner):
        try:
            found = search.run(other, optimize=optimize, count=1)
        except PlanError:
            continue  # no mesh of that many ranks has the size
        loser = _loser(change, found)
        if loser is not None and loser.estimate != winner:
            yield loser


def _loser(change: str, found: Found) -> Loser | None:
    if found.plans:
        return Loser(change, found.plans[0])
    if found.closest is None and found.least is None:
        return None  # there are no such plans
    return Loser(change, None, found.closest, found.least)


def _classes(search: Search, fixed: Fixed, winner: Estimate) -> Iterator[tuple[str, Fixed]]:
    """The classes of plans to compare the best one with: other sizes of the mesh with its schedule, other settings of its mesh.

    Sizes that the search leaves out unless they are fixed are left out here too.
    """
    made, mesh = winner.arrangement, winner.arrangement.mesh
    trains = search.work.purpose == "train"
    schedule = fixed.schedule or (made.schedule if trains and mesh.pp > 1 else None)
    most_of = search.costs.most
    sizes_of = (
        ("tp", most_of.tp),
        ("pp", most_of.pp),
        ("dp", search.ranks),
        ("cp", most_of.cp if search.features.context else 1),
        ("ep", most_of.ep),
    )
    for axis, most in sizes_of:
        size = int(getattr(mesh, axis))
        for other in dict.fromkeys((1, size // 2, size * 2)):
            if 1 <= other <= most and other != size and getattr(fixed, axis) is None and fixed.layers is None:
                sizes: dict[str, Any] = {axis: other}
                if axis == "ep":
                    if with_experts(mesh, other, fixed, search.features) is None:
                        continue
                    sizes["tp"] = mesh.tp
                kept = fixed.schedule if axis == "pp" and other == 1 else schedule
                yield f"{axis} {other}", replace(fixed, **sizes, schedule=kept)
    if not trains:
        return
    here = replace(fixed, tp=mesh.tp, pp=mesh.pp, dp=mesh.dp, cp=mesh.cp, ep=mesh.ep)
    if mesh.pp > 1 and fixed.schedule is None:
        for kind in SCHEDULES:
            if kind != made.schedule:
                yield kind, replace(here, schedule=kind)
    here = replace(here, schedule=made.schedule)
    if fixed.microbatches is None:
        for number in (made.microbatches // 2, made.microbatches * 2):
            if number >= 1:
                yield f"microbatches {number}", replace(here, microbatches=number)
    here = replace(here, microbatches=made.microbatches)
    if fixed.recompute is None:
        for recompute in RECOMPUTE:
            if recompute != made.recompute:
                yield f"recompute {recompute}", replace(here, recompute=recompute)
    if fixed.zero is None and mesh.dp * mesh.cp > 1:
        yield f"zero {1 - min(made.zero, 1)}", replace(here, zero=1 - min(made.zero, 1))


EXTERNAL = Features(zero=(1, 2, 3), overlap_gradients=(True,))
"""What other engines execute, but for what is never better."""


def _external(search: Search, fixed: Fixed, winner: Estimate, optimize: Optimize) -> Estimate | None:
    """The best plan with this schedule for an engine that executes all settings, if it is better."""
    if search.work.purpose != "train":
        return None
    schedule = fixed.schedule or (winner.arrangement.schedule if winner.arrangement.mesh.pp > 1 else None)
    value = search.value(winner, optimize)[0]
    found = search.run(
        replace(fixed, schedule=schedule), optimize=optimize, count=1, features=EXTERNAL, below=value
    ).plans
    if not found or not unsupported(found[0].arrangement, search.features):
        return None
    return found[0] if search.value(found[0], optimize)[0] < value else None


def _nearest(costs_of: CostsOf, work: Work, ranks: int, fixed: Fixed, features: Features) -> Iterator[Nearest]:
    """Plans that fit: for an engine with more features, with one of the fixed parts free, with more ranks, and of less work."""
    search = Search(work, costs_of(work, ranks), ranks, features)
    if found := _first(Search(work, search.costs, ranks, Features()), fixed):
        yield Nearest(" ".join(unsupported(found.arrangement, features)), found)
    freed = False
    for change, other in _freed(fixed):
        if found := _first(search, other):
            freed = True
            yield Nearest(f"without {change}", found)
    if not freed and len(fixed.given) > 1 and (found := _first(search, Fixed())):
        yield Nearest("without all that is fixed", found)
    for cp in divisors(ranks)[1:] if fixed.cp is None and features.context else ():
        if found := _first(search, replace(fixed, cp=cp)):
            yield Nearest(f"cp {cp}", found)
            break
    for power in range(1, MORE_RANKS + 1):
        more = ranks << power
        try:
            found = _first(Search(work, costs_of(work, more), more, features), replace(fixed, dp=None))
        except PlanError:
            break
        if found:
            yield Nearest(f"ranks {more}", found)
            break
    for change, less in _less(work):
        if found := _first(Search(less, costs_of(less, ranks), ranks, features), fixed):
            yield Nearest(change, found)
            break


def _first(search: Search, fixed: Fixed) -> Estimate | None:
    try:
        plans = search.run(fixed, count=1).plans
    except PlanError:
        return None
    return plans[0] if plans else None


def _freed(fixed: Fixed) -> Iterator[tuple[str, Fixed]]:
    """Each of the fixed parts free, first those that are easily changed."""
    order = (
        "recompute",
        "zero",
        "microbatches",
        "sequence_parallel",
        "schedule",
        "layers",
        "vpp",
        "etp",
        "ep",
        "cp",
        "dp",
        "pp",
        "tp",
    )
    for name in order:
        if name in fixed.given:
            yield f"{name} {fixed.given[name]}", replace(fixed, **{name: None})


def _less(work: Work) -> Iterator[tuple[str, Work]]:
    """Less and less of the work: shorter sequences, a smaller batch, fewer sequences."""
    names = ("sequence_length", "batch_size") if work.purpose == "train" else ("context", "sequences")
    for name in names:
        value = getattr(work, name) // 2
        while value >= 1:
            less = replace(work, **{name: value})
            if less.purpose != "train" and less.sequence_length > less.context:
                less = replace(less, sequence_length=less.context)
            yield f"{name} {value}", less
            value //= 2
