from __future__ import annotations

from collections import Counter
from inspect import cleandoc

import pytest

from partita import ScheduleError
from partita.core.layout.placement import home_of
from partita.schedule import (
    KINDS,
    Action,
    Costs,
    Kind,
    build,
    check_kind,
    grid,
    orders,
    placement_of,
    simulate,
    vpp_of,
)
from tests.schedule.sizes import Case, every_case

# Rank x time where every action takes 1, so BW takes 2.
GRIDS = {
    Case("gpipe", 3, 4, 1): """
        rank 0 F0 F1 F2 F3                   BW0-- BW1-- BW2-- BW3--
        rank 1    F0 F1 F2 F3          BW0-- BW1-- BW2-- BW3--
        rank 2       F0 F1 F2 F3 BW0-- BW1-- BW2-- BW3--
        """,
    # 2104.04473, figure 4 above, of 3 ranks.
    Case("1f1b", 3, 5, 1): """
        rank 0 F0 F1 F2             BW0-- F3 BW1-- F4 BW2--    BW3--    BW4--
        rank 1    F0 F1       BW0-- F2 BW1-- F3 BW2-- F4 BW3--    BW4--
        rank 2       F0 BW0-- F1 BW1-- F2 BW2-- F3 BW3-- F4 BW4--
        """,
    Case("1f1b", 3, 1, 1): """
        rank 0 F0                   BW0--
        rank 1    F0          BW0--
        rank 2       F0 BW0--
        """,
    # 2401.10241, figure 3 above.
    Case("zb-h1", 4, 8, 1): """
        rank 0 F0 F1 F2 F3          B0 W0 F4 B1 W1 F5 B2 W2 F6 B3 W3 F7 B4 W4 B5 W5 B6 W6 B7 W7
        rank 1    F0 F1 F2       B0 F3 B1 W0 F4 B2 W1 F5 B3 W2 F6 B4 W3 F7 B5 W4 B6 W5 B7 W6 W7
        rank 2       F0 F1    B0 F2 B1 F3 B2 W0 F4 B3 W1 F5 B4 W2 F6 B5 W3 F7 B6 W4 B7 W5 W6 W7
        rank 3          F0 B0 F1 B1 F2 B2 F3 B3 W0 F4 B4 W1 F5 B5 W2 F6 B6 W3 F7 B7 W4 W5 W6 W7
        """,
    # 2401.10241, figure 3 below.
    Case("zb-h2", 4, 8, 1): """
        rank 0 F0 F1 F2 F3 F4 F5 F6 B0 W0 F7 B1 W1 B2 W2 B3 W3 B4 W4 B5 W5 B6 W6 B7 W7
        rank 1    F0 F1 F2 F3 F4 B0 F5 B1 F6 B2 W0 F7 B3 W1 B4 W2 B5 W3 B6 W4 B7 W5 W6 W7
        rank 2       F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 W0 F7 B5 W1 B6 W2 B7 W3 W4 W5 W6 W7
        rank 3          F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 W0 F7 B7 W1 W2 W3 W4 W5 W6 W7
        """,
    Case("zb-v", 2, 4, 2): """
        rank 0 0F0 0F1 0F2 3F0 3B0 3W0 3F1 3B1 3W1 0F3 0B0 0W0 3F2 3B2 3W2 0B1 0W1 3F3 3B3 3W3 0B2 0W2 0B3 0W3
        rank 1     1F0 2F0 1F1 2F1 2B0 2W0 1F2 1B0 1W0 2F2 2B1 2W1 1F3 1B1 1W1 2F3 2B2 2W2 1B2 2B3 1B3 1W2 2W3 1W3
        """,
    Case("interleaved-1f1b", 2, 4, 2): """
        rank 0 0F0 0F1 2F0 2F1 0F2     2BW0--- 0F3 2BW1--- 2F2 0BW0--- 2F3 0BW1---     2BW2---     2BW3--- 0BW2--- 0BW3---
        rank 1     1F0 1F1 3F0 3BW0--- 3F1 3BW1--- 1F2 1BW0--- 1F3 1BW1--- 3F2 3BW2--- 3F3 3BW3--- 1BW2--- 1BW3---
        """,
    Case("forward-only", 2, 3, 2): """
        rank 0 0F0 0F1 2F0 2F1 0F2     2F2
        rank 1     1F0 1F1 3F0 3F1 1F2     3F2
        """,
}


@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_grids(case: Case) -> None:
    drawn = grid(simulate(case.build(), Costs())).splitlines()[1:]
    assert drawn == cleandoc(GRIDS[case]).splitlines()


def test_groups_of_micro_batches_pass_the_virtual_stages_in_turn() -> None:
    made = build("interleaved-1f1b", 2, 7, 2, group_size=4)
    forwards = [action for action in made.ranks[0] if action.kind is Kind.F]
    backwards = [action for action in made.ranks[0] if action.kind is Kind.BW]
    assert " ".join(map(str, forwards)) == "0F0 0F1 0F2 0F3 2F0 2F1 2F2 2F3 0F4 0F5 0F6 2F4 2F5 2F6"
    assert " ".join(f"{a.stage}.{a.microbatch}" for a in backwards) == (
        "2.0 2.1 2.2 2.3 0.0 0.1 0.2 0.3 2.4 2.5 2.6 0.4 0.5 0.6"
    )


def test_interleaving_one_stage_is_1f1b() -> None:
    assert build("interleaved-1f1b", 4, 6, 1) == build("1f1b", 4, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_does_its_share_on_its_rank(kind: str) -> None:
    """Of all micro-batches, also fewer than ranks, the same actions; stages lie where the placement says."""
    kinds = {"forward-only": [Kind.F]}.get(
        kind, [Kind.F, Kind.B, Kind.W] if kind.startswith("zb") else [Kind.F, Kind.BW]
    )
    for case in every_case(kind, range(1, 12, 3)):
        made = case.build()
        stages = case.pp * case.vpp
        expected = {Action(s, k, i): 1 for s in range(stages) for k in kinds for i in range(case.microbatches)}
        assert Counter(action for row in made.ranks for action in row) == expected, case
        assert made.rank_of == tuple(home_of(placement_of(kind), case.pp, stage)[0] for stage in range(stages)), case


def test_usual_numbers() -> None:
    assert {kind: vpp_of(kind, None) for kind in KINDS} == {
        "gpipe": 1, "1f1b": 1, "interleaved-1f1b": 2, "zb-h1": 1, "zb-h2": 1, "zb-v": 2, "forward-only": 1,
    }  # fmt: skip
    assert vpp_of("forward-only", 3) == 3
    assert {kind for kind in KINDS if placement_of(kind) == "v"} == {"zb-v"}
    assert build("interleaved-1f1b", 2, 4) == build("interleaved-1f1b", 2, 4, 2, group_size=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zbh1", 2, 4), "kind 'zbh1' is not known. Did you mean zb-h1? The kinds are gpipe, 1f1b,"),
        (("ZB_V", 2, 4), "Did you mean zb-v?"),
        (("dapple", 2, 4), "kind 'dapple' is not known. The kinds are"),
        (("gpipe", 0, 4), "pp must be a whole number of at least 1, but is 0."),
        (("gpipe", 2, -1), "microbatches must be a whole number of at least 1, but is -1."),
        (("gpipe", 2, 1.5), "microbatches must be a whole number of at least 1, but is 1.5."),
        (("gpipe", True, 1), "pp must be a whole number of at least 1, but is True."),
        (("interleaved-1f1b", 2, 4, 0), "vpp must be a whole number of at least 1, but is 0."),
        (("1f1b", 2, 4, 2), "1f1b has one stage on every rank, but vpp is 2. Leave it out, or use interleaved-1f1b."),
        (("zb-v", 2, 4, 1), "zb-v has two stages on every rank, but vpp is 1."),
        (("zb-h1", 2, 4, None, 2), "group_size (2) is for interleaved-1f1b only, and the kind is zb-h1."),
        (("interleaved-1f1b", 4, 4, 2, 3), "group_size must be at least pp (4),"),
        (("interleaved-1f1b", 4, 4, 2, 0), "group_size must be a whole number of at least 1, but is 0."),
    ],
)
def test_what_cannot_be_built_is_one_clear_message(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ScheduleError) as error:
        check_kind(*arguments)  # type: ignore[arg-type]
    assert message in str(error.value)
    with pytest.raises(ScheduleError):
        build(*arguments[:4], group_size=arguments[4] if len(arguments) > 4 else None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "vpp"), [*((kind, None) for kind in KINDS), ("interleaved-1f1b", 3), ("forward-only", 2)]
)
def test_orders_are_those_of_the_built_schedule(kind: str, vpp: int | None) -> None:
    for pp, microbatches in ((1, 3), (2, 1), (3, 5), (4, 9)):
        rows = build(kind, pp, microbatches, vpp).ranks
        assert list(orders(kind, pp, microbatches, vpp)) == [[(one.stage, one.kind) for one in row] for row in rows]
