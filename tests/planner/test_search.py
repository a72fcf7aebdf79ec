"""The search against every arrangement there is."""

from __future__ import annotations

import random

import pytest

from partita import spec_from_config
from partita.core.mesh import Mesh
from partita.cost.hardware import Hardware
from partita.cost.model import ModelCost
from partita.cost.parts import limits
from partita.cost.work import Estimate, Work
from partita.planner import best, costs_of
from partita.planner.model_costs import ModelCosts
from tests.cli.models import DEEPSEEK_V3, TINY
from tests.planner.costs import AllArrangements, RandomCosts

Key = tuple[Mesh, str]


def _key(estimate: Estimate) -> Key:
    made = estimate.arrangement
    return made.mesh, made.schedule


def _best_of_all(costs: RandomCosts, optimize: str) -> dict[Key, float]:
    """The best value of each mesh, schedule and number of stages."""
    found: dict[Key, float] = {}
    for estimate in AllArrangements(costs, costs.work.batch_size, costs.ranks).estimates:
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


@pytest.mark.slow
def test_deepseek_v3_on_1024_ranks_needs_few_estimates() -> None:
    costs = costs_of(spec_from_config(DEEPSEEK_V3), Hardware.read("h100"))
    found = best(costs, Work(batch_size=4096, sequence_length=4096), 1024, explain=False)
    assert len(found.plans) == 10
    assert found.evaluated < 100
    assert all(plan.fits and plan.arrangement.mesh.size == 1024 for plan in found.plans)
    assert [plan.step_s for plan in found.plans] == sorted(plan.step_s for plan in found.plans)


@pytest.mark.parametrize("machine", ["h100", "two-macs"])
def test_all_arrangements_of_a_real_model_are_no_better(machine: str) -> None:
    """Also where memory decides. On unlike devices the layers of zb-v's turn are not the best ones in all cases."""
    config = {**TINY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5, "vocab_size": 4096}
    hardware, work, ranks = (
        Hardware.read(machine),
        Work(batch_size=4, sequence_length=64),
        2 if machine == "two-macs" else 8,
    )
    free = min(limits(hardware, ranks))
    spec = spec_from_config(config)
    for memory in (0, 60 << 20, 30 << 20, 20 << 20):
        small = hardware.with_memory(hardware.devices[0].memory_bytes - free + memory) if memory else hardware
        costs = ModelCosts(ModelCost.of(spec), work, small, ranks)
        found = best(lambda work, ranks, costs=costs: costs, work, ranks, explain=False).plans  # type: ignore[misc]
        all_costs = [one for one in AllArrangements(costs, work.batch_size, ranks).estimates if one.fits]
        assert bool(found) == bool(all_costs)
        if found:
            proven = [one.step_s for one in all_costs if machine == "h100" or one.arrangement.schedule != "zb-v"]
            assert found[0].step_s <= min(proven) * (1 + 1e-6)
