from __future__ import annotations

from inspect import cleandoc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita import Schedule, ScheduleError
from partita.schedule import Action, Costs, Kind, build, check, lower, simulate
from tests.schedule.sizes import Case, cases

COSTS = st.floats(0, 100, allow_subnormal=False)


def rows(text: str) -> str:
    return str(Schedule.from_csv("\n".join(",".join(line.split()) for line in cleandoc(text).splitlines())))


def test_sends_and_receives_of_1f1b() -> None:
    """Rank 1 posts the receive of micro-batch 1 before it computes 0, rank 0 that of gradient 1 before forward 2."""
    assert str(lower(build("1f1b", 2, 3))) == rows(
        """
        0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0BW0 0RECV_B1 0F2 0SEND_F2 0BW1 0RECV_B2 0BW2
        1RECV_F0 1RECV_F1 1F0 1BW0 1SEND_B0 1F1 1BW1 1SEND_B1 1RECV_F2 1F2 1BW2 1SEND_B2
        """
    )


def test_nothing_is_sent_between_stages_of_one_rank() -> None:
    assert str(lower(build("zb-v", 2, 1))) == rows(
        """
        0F0 0SEND_F0 3RECV_F0 3F0 3B0 3SEND_B0 3W0 0RECV_B0 0B0 0W0
        1RECV_F0 1F0 2F0 2SEND_F0 2RECV_B0 2B0 2W0 1B0 1SEND_B0 1W0
        """
    )
    for kind in ("interleaved-1f1b", "zb-v", "gpipe"):
        assert not lower(build(kind, 1, 3)).is_lowered


def test_a_lowered_schedule_stays_as_it_is() -> None:
    made = lower(build("zb-h1", 3, 5))
    assert lower(made, Costs(5, 1, 9)) is made


@given(cases(), st.tuples(COSTS, COSTS, COSTS, COSTS))
def test_lowering_only_adds_what_crosses_ranks(case: Case, costs: tuple[float, float, float, float]) -> None:
    made = case.build()
    lowered = lower(made, Costs(*costs))
    check(lowered)
    computing = tuple(tuple(action for action in row if action.is_compute) for row in lowered.ranks)
    assert computing == made.ranks
    crossings = [
        (action, made.rank_of[to])
        for rank, row in enumerate(made.ranks)
        for action in row
        if action.kind is not Kind.W
        and 0 <= (to := action.stage + (1 if action.kind is Kind.F else -1)) < made.num_stages
        and made.rank_of[to] != rank
    ]
    assert sum(len(row) for row in lowered.ranks) == sum(len(row) for row in made.ranks) + 2 * len(crossings)


@given(cases(), st.tuples(COSTS, COSTS, COSTS, COSTS))
def test_lowering_changes_no_time(case: Case, costs: tuple[float, float, float, float]) -> None:
    made = case.build()
    before, after = simulate(made, Costs(*costs)), simulate(lower(made, Costs(*costs)), Costs(*costs))
    for rank, row in enumerate(after.schedule.ranks):
        kept = [index for index, action in enumerate(row) if action.is_compute]
        assert tuple(after.starts[rank][index] for index in kept) == before.starts[rank]
        assert tuple(after.ends[rank][index] for index in kept) == before.ends[rank]
    assert after.peak_activations == before.peak_activations
    assert (after.makespan, after.bubble_span) == (before.makespan, before.bubble_span)


@given(cases(max_pp=4, max_m=8), st.data())
def test_costs_by_stage_lower_right_too(case: Case, data: st.DataObject) -> None:
    made = case.build()
    by_stage = st.lists(COSTS, min_size=made.num_stages, max_size=made.num_stages).map(tuple)
    costs = Costs(data.draw(by_stage), data.draw(by_stage), data.draw(by_stage), data.draw(COSTS))
    check(lower(made, costs))


def test_a_send_follows_what_it_sends() -> None:
    for row in lower(build("interleaved-1f1b", 4, 9, 3), Costs(3, 2, 2, 1)).ranks:
        for producer, send in pairwise(row):
            if send.kind is Kind.SEND_F:
                assert producer == Action(send.stage, Kind.F, send.microbatch)
            if send.kind is Kind.SEND_B:
                assert producer == Action(send.stage, Kind.BW, send.microbatch)


def test_what_cannot_run_cannot_be_lowered() -> None:
    with pytest.raises(
        ScheduleError, match=r"rank 0 waits forever to run 0BW0. `partita.schedule.check` shows the reason"
    ):
        lower(Schedule.from_csv("0F0,0BW0,0F1,0BW1\n1F1,1F0,1BW0,1BW1"))
