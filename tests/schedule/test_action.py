from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita import Schedule, ScheduleError
from partita.schedule import Action, Kind, build, format_row, lower, parse_row
from tests.schedule.sizes import Case, cases

ACTIONS = st.builds(Action, st.integers(0, 999_999_999), st.sampled_from(Kind), st.integers(0, 999_999_999))


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("2F0", Action(2, Kind.F, 0)),
        ("0B3", Action(0, Kind.B, 3)),
        ("11W12", Action(11, Kind.W, 12)),
        ("1BW3", Action(1, Kind.BW, 3)),
        ("1SEND_F0", Action(1, Kind.SEND_F, 0)),
        ("2RECV_F0", Action(2, Kind.RECV_F, 0)),
        ("2SEND_B0", Action(2, Kind.SEND_B, 0)),
        ("1RECV_B0", Action(1, Kind.RECV_B, 0)),
    ],
)
def test_an_action_prints_and_parses(text: str, action: Action) -> None:
    assert str(action) == text
    assert Action.parse(text) == action
    assert action.is_compute == ("_" not in text)


@given(ACTIONS)
def test_every_action_parses_back(action: Action) -> None:
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize(
    "text",
    ["", "F", "2F", "F0", "2f0", "2G0", "-1F0", "2F-1", "2F0 ", "2F0x", "2SEND0", "2F0.0", "²F0", "9999999999F0"],
)
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"is not an action: write the stage, one of F, B, W, BW, .* as in 2F0"):
        Action.parse(text)


@pytest.mark.parametrize(("send", "receive"), [("1SEND_F4", "2RECV_F4"), ("2SEND_B4", "1RECV_B4")])
def test_ends_of_a_transfer_know_each_other(send: str, receive: str) -> None:
    assert Action.parse(send).partner == Action.parse(receive)
    assert Action.parse(receive).partner == Action.parse(send)


def test_a_schedule_knows_its_sizes() -> None:
    made = Schedule.from_csv("0F0,3F0,3BW0,0BW0\n1F0,2F0,2BW0,1BW0\n")
    assert (made.num_ranks, made.num_stages, made.num_microbatches) == (2, 4, 1)
    assert made.rank_of == (0, 1, 1, 0)
    assert made.trains
    assert not made.is_lowered
    assert lower(made).is_lowered
    assert not build("forward-only", 2, 3).trains


def test_csv_forgives_blanks_only() -> None:
    made = Schedule.from_csv(" 0F0 ,, 0BW0\r\n1F0\t,1BW0,,")
    assert str(made) == made.to_csv() == "0F0,0BW0\n1F0,1BW0\n"


def test_an_empty_row_is_a_rank() -> None:
    made = Schedule.from_csv("0F0\n\n")
    assert made.ranks == ((Action(0, Kind.F, 0),), ())
    assert Schedule.from_csv(str(made)) == made


@given(cases(max_pp=4, max_m=6))
def test_every_schedule_reads_back_from_csv(case: Case) -> None:
    for made in (case.build(), lower(case.build())):
        read = Schedule.from_csv(str(made))
        assert read == made
        assert hash(read) == hash(made)


def test_rows_alone() -> None:
    row = parse_row("0F0, 0SEND_F0,")
    assert row == (Action(0, Kind.F, 0), Action(0, Kind.SEND_F, 0))
    assert format_row(row) == "0F0,0SEND_F0"
    with pytest.raises(ScheduleError, match=r"^cell 2: 'x' is not an action"):
        parse_row("0F0,x")


def test_errors_name_row_cell_and_text() -> None:
    with pytest.raises(ScheduleError) as error:
        Schedule.from_csv("0F0,0BW0\n1F0,,1BV0\n")
    assert str(error.value).startswith("row 2 (rank 1), cell 3: '1BV0' is not an action: write ")
    with pytest.raises(ScheduleError) as error:
        Schedule.from_csv("x" * 10_000)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0\n0F1", "stage 0 is on ranks 0 and 1"),
        ("0F0,2F0", "stage 1 has no action, but stage 2 has"),
        ("999999999F0", "stage 0 has no action"),
    ],
)
def test_stages_without_one_rank_are_told(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        _ = Schedule.from_csv(text).rank_of
