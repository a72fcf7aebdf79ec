from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita import Schedule, ScheduleError
from partita.schedule import Action, Costs, Timeline, build, lower, simulate
from tests.schedule.sizes import Case, cases

F, B, W = 3.0, 2.0, 1.0
COST = st.floats(0.125, 8)


def idle(kind: str, p: int, m: int, costs: Costs, vpp: int | None = None) -> float:
    """The time that is lost of the longest span."""
    line = simulate(build(kind, p, m, vpp), costs)
    span = sum(line.busy) / p / (1 - line.bubble_span)
    return span - sum(line.busy) / p


# Every sum below is of quarters, so floats are exact but for the division in `idle`.
@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("more", [0, 1, 7])
def test_bubbles_in_closed_form(p: int, more: int) -> None:
    """GPipe and 1F1B: 1811.06965, 2104.04473; interleaved: 2104.04473; ZB-H1: 2401.10241, table 2. m is at least 2 p."""
    m, costs = 2 * p + more, Costs(F, B, W)
    whole = (p - 1) * (F + B + W)
    assert idle("gpipe", p, m, costs) == pytest.approx(whole, abs=1e-9)
    assert idle("1f1b", p, m, costs) == pytest.approx(whole, abs=1e-9)
    assert idle("zb-h1", p, m, costs) == pytest.approx((p - 1) * (F + B - W), abs=1e-9)
    assert idle("zb-h2", p, m, costs) == pytest.approx((p - 1) * (F + B - 2 * W), abs=1e-9)
    assert simulate(build("zb-h2", p, m), costs).bubble_makespan >= simulate(build("zb-h2", p, m), costs).bubble_span


@pytest.mark.parametrize("v", [1, 2, 3, 4])
@pytest.mark.parametrize("p", [1, 2, 4, 5])
def test_interleaving_divides_the_bubble(p: int, v: int) -> None:
    """By v, where F, B and W are those of a rank, of which a virtual stage has the v-th part. m is a multiple of p."""
    for m in (p, 2 * p, 5 * p):
        costs = Costs(F / v, B / v, W / v)
        assert idle("interleaved-1f1b", p, m, costs, v) == pytest.approx((p - 1) * (F + B + W) / v, abs=1e-9)


@pytest.mark.parametrize("p", range(1, 9))
def test_zb_v_has_no_bubble_where_all_cost_the_same(p: int) -> None:
    """2401.10241, section 6."""
    for m in (2 * p, 2 * p + 1, 5 * p):
        assert idle("zb-v", p, m, Costs(1, 1, 1)) == pytest.approx(0, abs=1e-9)


# 2401.10241: p, m, profiled F, B, W and hop in microseconds; bubble rates of 1F1B, ZB-H1, ZB-H2 (tables of the version
# at ICLR 2024, section 5, and of the authors' repository, megatron/core/pipeline_parallel/efficiency.py).
PUBLISHED = """
     8  24 18522 18086  9337 601   0.2431 0.1585 0.1083
     8  32 18513 18086  9331 626   0.1985 0.1242 0.0837
     8  64 18546 18097  9321 762   0.1240 0.0674 0.0444
     8  24 29718 29444 19927 527   0.2347 0.1323 0.0698
     8  32 29802 29428 19530 577   0.1898 0.1045 0.0559
     8  64 29935 29621 19388 535   0.1091 0.0554 0.0294
    16  48 11347 11248  8132 377   0.2552 0.1397 0.0672
    16  64 11307 11254  8101 379   0.2082 0.1088 0.0516
    16 128 11325 11308  8109 378   0.1251 0.0576 0.0266
    32  96 10419 10207  7715 408   0.2646 0.1421 0.0641
    32 128 10408 10204  7703 408   0.2168 0.1106 0.0490
    32 256 10402 10248  7698 460   0.1352 0.0594 0.0257
"""


@pytest.mark.parametrize("row", PUBLISHED.strip().splitlines())
def test_published_bubble_rates_to_four_decimals(row: str) -> None:
    sizes, rates = row.split()[:6], row.split()[6:]
    p, m, f, b, w, comm = map(int, sizes)
    lines = [simulate(build(kind, p, m), Costs(f, b, w, comm)) for kind in ("1f1b", "zb-h1", "zb-h2")]
    assert [f"{line.bubble_span:.4f}" for line in lines] == rates
    assert lines[0].peak_activations == tuple(range(p, 0, -1))
    assert lines[1].peak_activations == (p,) * p
    assert lines[2].peak_activations == (2 * p - 1,) * p


@pytest.mark.parametrize("p", [1, 2, 3, 6])
def test_peaks(p: int) -> None:
    m = 3 * p
    peaks = {kind: simulate(build(kind, p, m), Costs()).peak_activations for kind in ("gpipe", "zb-v", "forward-only")}
    assert peaks == {"gpipe": (m,) * p, "zb-v": (2 * p,) * p, "forward-only": (1,) * p}
    interleaved = simulate(build("interleaved-1f1b", p, m, 2), Costs()).peak_activations
    assert interleaved == tuple(2 * (p - 1 - rank) + p + 1 for rank in range(p))


def test_times_of_a_small_schedule() -> None:
    """Two stages of unequal cost, a hop of 0.5; the second is empty going back."""
    made = lower(build("1f1b", 2, 2), costs := Costs((2.0, 3.0), (1.0, 0.0), (1.0, 0.0), 0.5))
    line = simulate(made, costs)
    times = {
        str(action): (start, end)
        for row in zip(made.ranks, line.starts, line.ends, strict=True)
        for action, start, end in zip(*row, strict=True)
    }
    assert {text: times[text] for text in times if "_" not in text} == {
        "0F0": (0.0, 2.0),
        "0F1": (2.0, 4.0),
        "1F0": (2.5, 5.5),
        "1BW0": (5.5, 5.5),
        "0BW0": (6.0, 8.0),
        "1F1": (5.5, 8.5),
        "1BW1": (8.5, 8.5),
        "0BW1": (9.0, 11.0),
    }
    assert times["0SEND_F0"] == (2.0, 2.0)
    assert line.busy == (8.0, 6.0)
    assert line.makespan == 11.0
    assert line.bubble_makespan == line.bubble_span == 1 - 7 / 11


@given(cases(max_pp=5, max_m=8), COST, COST, COST, st.floats(0, 4))
def test_no_action_starts_before_what_it_needs(case: Case, f: float, b: float, w: float, comm: float) -> None:
    made, costs = case.build(), Costs(f, b, w, comm)
    line = simulate(made, costs)
    ends: dict[tuple[int, str, int], float] = {}
    starts: dict[Action, float] = {}
    for rank, row in enumerate(made.ranks):
        assert list(line.starts[rank]) == sorted(line.starts[rank])
        assert all(end <= start for end, start in zip(line.ends[rank], line.starts[rank][1:], strict=False))
        for action, start, end in zip(row, line.starts[rank], line.ends[rank], strict=True):
            assert end == start + costs.duration(action)
            starts[action] = start
            ends[action.stage, action.kind.value.replace("BW", "B"), action.microbatch] = end
    for action, start in starts.items():
        stage, kind, i = action
        needs = {"F": [(stage - 1, "F", i)], "W": [(stage, "B", i)]}.get(
            kind.value, [(stage, "F", i), (stage + 1, "B", i)]
        )
        for need in needs:
            if need in ends:
                hop = comm if made.rank_of[need[0]] != made.rank_of[stage] else 0.0
                assert start >= ends[need] + hop


def test_a_schedule_that_cannot_run() -> None:
    with pytest.raises(ScheduleError, match="rank 0 waits forever to run 0BW0"):
        simulate(Schedule.from_csv("0F0,0BW0\n1F0"), Costs())
    with pytest.raises(ScheduleError, match="rank 1 waits forever to run 1F0"):
        simulate(Schedule.from_csv("0F0\n1RECV_F0,1F0"), Costs())


def test_costs_answer_for_every_kind() -> None:
    costs = Costs((1.0, 2.0), 3.0, (0.5, 0.25), 9.0)
    texts = ("0F0", "1F0", "1B0", "0W0", "1W0", "1BW0", "0SEND_F0", "1RECV_F0")
    assert [costs.duration(Action.parse(text)) for text in texts] == [1.0, 2.0, 3.0, 0.5, 0.25, 3.25, 0.0, 0.0]
    with pytest.raises(ScheduleError, match=r"costs.f has 2 values, but there is a stage 2"):
        costs.duration(Action.parse("2F0"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"f": -1},
            "costs.f must be a finite number of at least 0, or a tuple of such numbers, one per stage, but is -1.",
        ),
        ({"b": math.nan}, "costs.b must be"),
        ({"w": (1.0, math.inf)}, "costs.w must be"),
        ({"f": "1"}, "costs.f must be"),
        ({"f": True}, "costs.f must be"),
        ({"comm": -0.5}, "costs.comm must be a finite number of at least 0, but is -0.5."),
        ({"comm": (1.0, 2.0)}, "costs.comm must be a finite number of at least 0, but is (1.0, 2.0)."),
    ],
)
def test_costs_that_are_none(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError) as error:
        Costs(**arguments)  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_costs_by_stage_must_be_for_all_stages(number: int) -> None:
    made = build("zb-v", 2, 3)
    for run in (simulate, lower):
        with pytest.raises(ScheduleError, match=f"costs.w has {number} values, but the schedule has 4 stages"):
            run(made, Costs(w=(1.0,) * number))


def test_measured_times_have_bubbles_too() -> None:
    """Of two ranks that began at 10 and 12 and were busy for 6 and 4 of 8 and 5."""
    made = Schedule.from_csv("0F0,0SEND_F0,0RECV_B0,0BW0\n1RECV_F0,1F0,1BW0,1SEND_B0")
    line = Timeline(made, ((10, 12, 12.5, 14), (9, 12, 14.5, 17)), ((12, 12.5, 16.5, 18), (11.5, 14, 16.5, 17.5)))
    assert line.busy == (6, 4.0)
    assert line.makespan == 8
    assert line.bubble_makespan == 1 - 5 / 8
    assert line.bubble_span == 1 - 5 / 8
    assert line.peak_activations == (1, 1)


def test_a_timeline_as_data() -> None:
    data = simulate(build("forward-only", 1, 2), Costs(2)).to_dict()
    assert data == {
        "makespan": 4.0,
        "bubble_makespan": 0.0,
        "bubble_span": 0.0,
        "busy": [4.0],
        "peak_activations": [1],
        "ranks": [[["0F0", 0.0, 2.0], ["0F1", 2.0, 4.0]]],
    }


def test_where_nothing_costs_anything_there_is_no_bubble() -> None:
    line = simulate(build("zb-h1", 3, 4), Costs(0, 0, 0))
    assert (line.makespan, line.bubble_makespan, line.bubble_span) == (0.0, 0.0, 0.0)
