"""What a measured step says of its costs: put into the simulator, they give the step again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.schedule import Costs, Kind, Schedule, Timeline, build, lower, measured_costs, simulate
from tests.schedule.sizes import Case, cases

COST = st.floats(0.125, 8)


def by_stage(stages: int, data: st.DataObject) -> Costs:
    row = st.lists(COST, min_size=stages, max_size=stages).map(tuple)
    return Costs(data.draw(row), data.draw(row), data.draw(row), data.draw(st.floats(0, 3)))


@given(cases(), st.data())
def test_a_simulated_step_is_measured_as_what_it_was_made_of(case: Case, data: st.DataObject) -> None:
    schedule = lower(case.build())
    costs = by_stage(schedule.num_stages, data)
    timeline = simulate(schedule, costs)
    found = measured_costs(timeline)
    assert found.f == pytest.approx(costs.f)
    if schedule.trains:
        # Of both gradients at once only the sum can be seen.
        pairs = zip(found.b, found.w, costs.b, costs.w, strict=True)  # type: ignore[arg-type]
        assert [b + w for b, w, _, _ in pairs] == pytest.approx([b + w for b, w in zip(costs.b, costs.w, strict=True)])  # type: ignore[arg-type]
    if any(action.kind is Kind.B for row in schedule.ranks for action in row):
        assert found.b == pytest.approx(costs.b)
        assert found.w == pytest.approx(costs.w)
    # Where somebody waited, the hop is what it was; where nobody did, nothing is known of it.
    assert found.comm == pytest.approx(costs.comm, abs=1e-9) or found.comm == 0.0
    if found.comm:
        assert simulate(schedule, found).makespan == pytest.approx(timeline.makespan)


def test_by_hand() -> None:
    #  rank 0   F0 F1 .  .  .  BW0 .  BW1          a forward 1, a backward 2 and 3, a hop 1
    #  rank 1   .  . F0 BW0    F1  BW1
    schedule = Schedule.from_csv("0F0,0F1,0BW0,0BW1\n1F0,1BW0,1F1,1BW1")
    timeline = Timeline(schedule, ((0, 1, 6, 11), (2, 3, 5, 6)), ((1, 2, 8, 13), (3, 5, 6, 9)))
    # Waited for: 1F0 from 1 to 2, 0BW0 from 5 to 6, 0BW1 from 9 to 11; 1F1 was there long before its turn.
    assert measured_costs(timeline) == Costs((1.0, 1.0), (1.0, 1.25), (1.0, 1.25), 1.0)


def test_one_slow_micro_batch_does_not_count() -> None:
    schedule = build("1f1b", 2, 9)
    timeline = simulate(schedule, Costs(1.0, 1.0, 1.0))
    ends = [list(row) for row in timeline.ends]
    starts = [list(row) for row in timeline.starts]
    # The last backward of rank 0 takes a hundred times as long, as if the machine had slept.
    ends[0][-1] = starts[0][-1] + 200
    slow = replace(timeline, ends=tuple(map(tuple, ends)))
    assert measured_costs(slow) == measured_costs(timeline)


def test_forwards_alone_and_one_rank_alone() -> None:
    assert measured_costs(simulate(build("forward-only", 2, 4), Costs(2.0))) == Costs(
        (2.0, 2.0), (0.0, 0.0), (0.0, 0.0)
    )
    alone = measured_costs(simulate(build("1f1b", 1, 4), Costs(2.0, 3.0, 5.0, 7.0)))
    assert alone == Costs((2.0,), (4.0,), (4.0,), 0.0)


def test_virtual_stages_of_one_rank_are_no_hop() -> None:
    # Stage 1 hands on to stage 2 on the same rank: the V turns there.
    schedule = lower(build("zb-v", 2, 5))
    assert measured_costs(simulate(schedule, Costs(1, 1, 1, 0.5))).comm == pytest.approx(0.5)
    assert measured_costs(simulate(lower(build("interleaved-1f1b", 1, 5, 2)), Costs(1, 1, 1, 0.5))).comm == 0.0
