"""Closed forms of a step's time against the simulator."""

from __future__ import annotations

from random import Random

import pytest

from partita.cost.makespan import exact, makespan
from partita.schedule import Costs, build, simulate

UNIFORM = [("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 3)]


@pytest.mark.parametrize(("kind", "vpp"), UNIFORM)
@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_equal_stages_take_the_simulators_time(kind: str, vpp: int, pp: int, rounds: int) -> None:
    m, stages = pp * rounds, pp * vpp
    costs = [2.0] * stages, [3.0] * stages, [1.5] * stages
    assert makespan(kind, pp, m, vpp, *costs) == pytest.approx(exact(kind, pp, m, vpp, *costs), rel=1e-12)


@pytest.mark.parametrize(("kind", "vpp"), [*UNIFORM, ("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2), ("forward-only", 2)])
@pytest.mark.parametrize(("pp", "m"), [(2, 1), (3, 5), (4, 13), (7, 2)])
def test_the_order_in_which_actions_are_timed_is_the_simulators(kind: str, vpp: int, pp: int, m: int) -> None:
    chance = Random(m)
    f, b, w = (tuple(chance.choice((0.0, chance.random())) for _ in range(pp * vpp)) for _ in range(3))
    schedule = build(kind, pp, m, vpp if vpp > 1 else None)
    wanted = simulate(schedule, Costs(f, b, w, 0.1)).makespan
    assert exact(kind, pp, m, vpp, f, b, w, 0.1) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("kind", ["zb-h1", "zb-h2", "zb-v"])
@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 40), (4, 41), (6, 100)])
def test_zero_bubbles_continue_at_their_pace(kind: str, pp: int, m: int) -> None:
    vpp = 2 if kind == "zb-v" else 1
    costs = [1.0] * pp * vpp, [1.1] * pp * vpp, [0.9] * pp * vpp
    assert makespan(kind, pp, m, vpp, *costs, 0.05) == pytest.approx(exact(kind, pp, m, vpp, *costs, 0.05), rel=2e-3)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize("comm", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("slow", [0, 1, 3])
def test_unequal_stages_are_near_the_simulators_time(kind: str, comm: float, slow: int) -> None:
    f = [1.0 + 0.5 * (stage == slow) for stage in range(4)]
    costs = f, [2 * one for one in f], [0.0] * 4
    assert makespan(kind, 4, 24, 1, *costs, comm) == pytest.approx(exact(kind, 4, 24, 1, *costs, comm), rel=0.06)
