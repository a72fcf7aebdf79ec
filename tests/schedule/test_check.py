from __future__ import annotations

from inspect import cleandoc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita import Schedule, ScheduleError
from partita.schedule import KINDS, Action, Kind, build, check, lower
from tests.schedule.sizes import Case, cases, every_case

F, B, W, BW = Kind.F, Kind.B, Kind.W, Kind.BW


@given(cases())
def test_what_is_built_is_right(case: Case) -> None:
    made = case.build()
    check(made)
    check(lower(made))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", range(1, 5))
def test_everything_that_is_built_is_right(kind: str, first: int) -> None:
    for case in every_case(kind, range(first, 25, 4)):
        made = case.build()
        check(made)
        check(lower(made))


def faults(schedule: Schedule) -> str:
    """The message of `check`, or nothing."""
    try:
        check(schedule)
    except ScheduleError as error:
        return str(error)
    return ""


def changed(schedule: Schedule, rank: int, row: list[Action]) -> Schedule:
    return Schedule((*schedule.ranks[:rank], tuple(row), *schedule.ranks[rank + 1 :]))


TRAINING = tuple(kind for kind in KINDS if kind != "forward-only")


@st.composite
def places(draw: st.DrawFn, *kinds: Kind, lowered: bool | None = None) -> tuple[Schedule, int, int]:
    """A schedule that trains, a rank and a step of it, where there is an action of one of `kinds`."""
    case = draw(cases(TRAINING, max_pp=5, max_m=8).filter(lambda case: case.pp > 1))
    made = lower(case.build()) if (draw(st.booleans()) if lowered is None else lowered) else case.build()
    rank = draw(st.sampled_from([r for r in range(case.pp) if not kinds or kinds_of(made, r) & set(kinds)]))
    row = made.ranks[rank]
    step = draw(st.sampled_from([step for step, action in enumerate(row) if not kinds or action.kind in kinds]))
    return made, rank, step


def kinds_of(schedule: Schedule, rank: int) -> set[Kind]:
    return {action.kind for action in schedule.ranks[rank]}


@given(places())
def test_a_dropped_action_is_missed(place: tuple[Schedule, int, int]) -> None:
    made, rank, step = place
    row = list(made.ranks[rank])
    row.pop(step)
    assert faults(changed(made, rank, row))


@given(places(), st.data())
def test_an_action_twice_is_caught(place: tuple[Schedule, int, int], data: st.DataObject) -> None:
    made, rank, step = place
    row = list(made.ranks[rank])
    row.insert(data.draw(st.integers(0, len(row))), row[step])
    assert f"{made.ranks[rank][step]} occurs twice" in faults(changed(made, rank, row))


@given(places(), st.data())
def test_an_action_on_another_rank_is_caught(place: tuple[Schedule, int, int], data: st.DataObject) -> None:
    made, rank, step = place
    other = data.draw(st.integers(0, made.num_ranks - 1).filter(lambda r: r != rank))
    row, longer = list(made.ranks[rank]), list(made.ranks[other])
    action = row.pop(step)
    longer.insert(data.draw(st.integers(0, len(longer))), action)
    assert f"stage {action.stage} is on two ranks" in faults(changed(changed(made, rank, row), other, longer))


@given(places(B, BW, W, Kind.SEND_F))
def test_an_action_before_what_it_needs_is_caught(place: tuple[Schedule, int, int]) -> None:
    made, rank, step = place
    row = list(made.ranks[rank])
    stage, kind, i = row[step]
    need = Action(stage, B if kind is W else F, i)
    row.insert(row.index(need), row.pop(step))
    assert f"needs {need}, which comes later" in faults(changed(made, rank, row))


@given(places(Kind.RECV_F, Kind.RECV_B, lowered=True))
def test_a_receive_after_its_use_is_caught(place: tuple[Schedule, int, int]) -> None:
    made, rank, step = place
    row = list(made.ranks[rank])
    stage, kind, i = row[step]
    uses = [Action(stage, F, i)] if kind is Kind.RECV_F else [Action(stage, BW, i), Action(stage, B, i)]
    use = next(action for action in uses if action in row)
    row.insert(row.index(use), row.pop(step))
    assert f"{use} needs {made.ranks[rank][step]}, which comes later" in faults(changed(made, rank, row))


def runs(schedule: Schedule) -> bool:
    """By brute force: does every action find what it needs done, where transfers are done at both ends at once?"""
    done: set[Action] = set()
    at = [0] * schedule.num_ranks

    def heads() -> dict[Action, int]:
        return {row[at[rank]]: rank for rank, row in enumerate(schedule.ranks) if at[rank] < len(row)}

    def ready(action: Action) -> bool:
        stage, kind, i = action
        if kind in (Kind.SEND_F, Kind.SEND_B):
            backward = {Action(stage, B, i), Action(stage, BW, i)}
            return action.partner in heads() and bool(
                done & ({Action(stage, F, i)} if kind is Kind.SEND_F else backward)
            )
        if kind in (Kind.RECV_F, Kind.RECV_B):
            return action.partner in heads() and ready(action.partner)
        if kind is F:
            needs = [{Action(stage - 1, F, i)}] if stage else []
            received = Action(stage, Kind.RECV_F, i)
        elif kind is W:
            return Action(stage, B, i) in done
        else:
            needs = [{Action(stage, F, i)}]
            if stage < schedule.num_stages - 1:
                needs.append({Action(stage + 1, B, i), Action(stage + 1, BW, i)})
            received = Action(stage, Kind.RECV_B, i)
        return all(done & need for need in needs) and (
            received in done or not any(received in r for r in schedule.ranks)
        )

    while True:
        able = [action for action in heads() if ready(action)]
        if not able:
            return not heads()
        for action in {able[0]} | ({able[0].partner} if not able[0].is_compute else set()):
            at[heads()[action]] += 1
            done.add(action)


@given(cases(max_pp=3, max_m=3), st.booleans(), st.data())
def test_any_order_passes_if_and_only_if_it_runs(case: Case, lowered: bool, data: st.DataObject) -> None:
    """Orders that are a few moves away from a right one, against brute force."""
    made = lower(case.build()) if lowered else case.build()
    for _ in range(data.draw(st.integers(1, 3))):
        rank = data.draw(st.integers(0, made.num_ranks - 1))
        row = list(made.ranks[rank])
        step = data.draw(st.integers(0, len(row) - 1))
        row.insert(max(0, min(len(row), step + data.draw(st.integers(-3, 3)))), row.pop(step))
        made = changed(made, rank, row)
    assert (faults(made) == "") == runs(made)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the schedule has no ranks."),
        ("0F0\n\n", "rank 1 has no action. Leave it out, or give it a stage."),
        ("0F0,0F0", "0F0 occurs twice: rank 0, step 0, and rank 0, step 1."),
        ("0F0\n0F1", "stage 0 is on two ranks: rank 0, step 0, and rank 1, step 0."),
        ("0F0,2F0", "stage 1 has no action, but stage 2 has."),
        ("0F1", "0F0 is missing."),
        ("0F0,0BW0,0F1", "stage 0 has no backward of micro-batch 1: neither BW, nor B and W."),
        ("0F0,0BW0,0W0", "stage 0 has two backwards of micro-batch 0: BW, and B or W."),
        ("0F0,0BW0,0B0", "stage 0 has two backwards of micro-batch 0: BW, and B or W."),
        ("0F0,0B0", "0W0 is missing: 0B0 is half a backward."),
        ("0F0,0W0", "0B0 is missing: 0W0 is half a backward."),
        ("0F0,0BW0\n1F0", "stage 1 has no backward of micro-batch 0"),
        ("0BW0,0F0", "rank 0, step 0: 0BW0 needs 0F0, which comes later (step 1)."),
        ("1F0,0F0", "rank 0, step 0: 1F0 needs 0F0, which comes later (step 1)."),
        ("0F0,1F0,0BW0,1BW0", "rank 0, step 2: 0BW0 needs 1BW0, which comes later (step 3)."),
        ("0F0,0SEND_F0\n1F0", "rank 0, step 1: 0SEND_F0 has no other end: 1RECV_F0 is missing."),
        ("0F0\n1RECV_F0,1F0", "0SEND_F0 is missing: 0F0 is on rank 0, stage 1 on rank 1."),
        ("0F0,0SEND_F0,1RECV_F0,1F0", "0SEND_F0 sends nothing: stages 0 and 1 are both on rank 0."),
        ("0F0,0SEND_F0\n1RECV_F0,1F0,1SEND_F0", "1SEND_F0 has no other end: there is no stage 2."),
        ("0F0,0SEND_F0,0RECV_B0\n1RECV_F0,1F0,1SEND_B0", "0RECV_B0 carries a gradient, but nothing computes one."),
        ("0F0,0SEND_F0,0SEND_F1\n1RECV_F0,1F0,1RECV_F1", "0F1 is missing."),
        ("0SEND_F0,0F0\n1RECV_F0,1F0", "rank 0, step 0: 0SEND_F0 needs 0F0, which comes later (step 1)."),
        ("0F0,0SEND_F0\n1F0,1RECV_F0", "rank 1, step 0: 1F0 needs 1RECV_F0, which comes later (step 1)."),
        (
            "0F0,0F1,0SEND_F0,0SEND_F1\n1RECV_F1,1F1,1RECV_F0,1F0",
            (
                "rank 0 runs 0SEND_F0 (step 2) before 0SEND_F1 (step 3), but rank 1 runs 1RECV_F1 (step 0) before "
                "1RECV_F0 (step 2). Both ranks must run their transfers in the same order."
            ),
        ),
        (
            "0F0,0BW0,0F1,0BW1\n1F1,1F0,1BW0,1BW1",
            (
                "ranks wait for each other: rank 0 with 0BW0 (step 1) for rank 1's 1BW0 (step 2); "
                "rank 1 with 1F1 (step 0) for rank 0's 0F1 (step 2)."
            ),
        ),
    ],
)
def test_every_fault_is_told_in_words(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as error:
        check(Schedule.from_csv(text))
    assert message in str(error.value)


def test_a_ring_of_rendezvous_is_told() -> None:
    """Pairs agree on their order, and every receive precedes its use; yet three ranks wait in a ring."""
    made = Schedule.from_csv(
        "0F0,0SEND_F0,3RECV_F0,3F0,0F1,0SEND_F1,3RECV_F1,3F1\n"
        "1RECV_F0,1F0,1RECV_F1,1SEND_F0,1F1,1SEND_F1\n"
        "2RECV_F0,2F0,2SEND_F0,2RECV_F1,2F1,2SEND_F1\n"
    )
    with pytest.raises(ScheduleError) as error:
        check(made)
    assert str(error.value) == cleandoc(
        """
        ranks wait for each other: rank 0 with 3RECV_F0 (step 2) for rank 2's 2SEND_F0 (step 2); \
rank 2 with 2RECV_F0 (step 0) for rank 1's 1SEND_F0 (step 3); \
rank 1 with 1RECV_F1 (step 2) for rank 0's 0SEND_F1 (step 5).
        step    0          1          2          3          4     5          6
        rank 0  0F0        0SEND_F0  >3RECV_F0<  3F0        0F1   0SEND_F1   3RECV_F1
        rank 1  1RECV_F0   1F0       >1RECV_F1<  1SEND_F0   1F1   1SEND_F1
        rank 2 >2RECV_F0<  2F0        2SEND_F0   2RECV_F1   2F1   2SEND_F1
        """
    )


def test_a_large_schedule_is_shown_around_the_fault() -> None:
    made = build("1f1b", 32, 64)
    row = list(made.ranks[20])
    step = row.index(Action(20, BW, 30))
    row[step], row[step - 1] = row[step - 1], row[step]
    row.remove(Action(20, F, 60))
    with pytest.raises(ScheduleError) as error:
        check(changed(made, 20, row))
    lines = str(error.value).splitlines()
    assert lines[0] == "20F60 is missing."
    assert [line.split()[1] for line in lines[2:]] == [str(rank) for rank in range(16, 25)]
    assert ">" in lines[6]
    assert max(map(len, lines)) < 120
