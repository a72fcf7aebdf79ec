"""The search against every arrangement there is."""

from __future__ import annotations

import random

import pytest

from partita.core.mesh import Mesh
from partita.cost.work import Estimate, Work
from partita.planner import best
from tests.planner.costs import AllArrangements, RandomCosts

Key = tuple[Mesh, str, int]


def _key(estimate: Estimate) -> Key:
    made = estimate.arrangement
    return made.mesh, made.schedule, made.vpp


def _best_of_all(costs: RandomCosts, optimize: str) -> dict[Key, float]:
    """The best value of each mesh, schedule and number of stages."""
    found: dict[Key, float] = {}
    for estimate in AllArrangements(costs).estimates:
        if estimate.fits:
            value = estimate.step_s if optimize == "time" else max(use.total for use in estimate.memory)
            found[_key(estimate)] = min(value, found.get(_key(estimate), value))
    return found


@pytest.mark.parametrize("optimize", ["time", "memory"])
@pytest.mark.parametrize("seed", range(24))
def test_the_ten_best_are_those_of_all_arrangements(seed: int, optimize: str) -> None:
    ranks = random.Random(seed).choice((1, 2, 3, 4, 6, 7, 8, 12, 16))
    costs = RandomCosts(seed, Work(batch_size=random.Random(seed).choice((4, 12, 16))), ranks, unlike=seed % 3 == 0)
    wanted = sorted(_best_of_all(costs, optimize).values())[:10]
    result = best(lambda work, ranks: costs, costs.work, ranks, optimize=optimize, explain=False)  # type: ignore[arg-type]
    assert all(plan.fits for plan in result.plans)
    assert len({_key(plan) for plan in result.plans}) == len(result.plans)
    values = [plan.step_s if optimize == "time" else max(use.total for use in plan.memory) for plan in result.plans]
    assert values == pytest.approx(wanted, rel=1e-6)
