"""Which rank runs which stage: every size, and the pictures of the papers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.core.layout.placement import PLACEMENTS, Placement, home_of, stage_at

SIZES = [(pp, vpp) for pp in range(1, 9) for vpp in range(1, 6)]

#          rank 0  rank 1  rank 2  rank 3
LOOP = [
    (0, 1, 2, 3),
    (4, 5, 6, 7),
    (8, 9, 10, 11),
]
V = [
    (0, 1, 2, 3),
    (7, 6, 5, 4),
    (8, 9, 10, 11),
]


@pytest.mark.parametrize(("placement", "grid"), [("loop", LOOP), ("v", V)])
def test_three_turns_over_four_ranks(placement: Placement, grid: list[tuple[int, ...]]) -> None:
    assert [tuple(stage_at(placement, 4, rank, vpp) for rank in range(4)) for vpp in range(3)] == grid


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_stage_has_one_home(placement: Placement) -> None:
    for pp, vpp in SIZES:
        places = [(rank, v) for v in range(vpp) for rank in range(pp)]
        stages = [stage_at(placement, pp, rank, v) for rank, v in places]
        assert sorted(stages) == list(range(pp * vpp))
        assert [home_of(placement, pp, stage) for stage in stages] == places


@given(st.sampled_from(PLACEMENTS), st.integers(1, 500), st.integers(0, 10**6))
def test_homes_of_large_pipelines(placement: Placement, pp: int, stage: int) -> None:
    rank, vpp = home_of(placement, pp, stage)
    assert 0 <= rank < pp
    assert stage_at(placement, pp, rank, vpp) == stage
    # The virtual stages of a rank are in the order of the pipeline.
    assert vpp == 0 or stage_at(placement, pp, rank, vpp - 1) < stage


def test_a_v_hands_on_within_a_rank_where_it_turns() -> None:
    for pp in range(1, 9):
        for stage in range(3 * pp - 1):
            here, there = (home_of("v", pp, s)[0] for s in (stage, stage + 1))
            assert abs(here - there) == (0 if (stage + 1) % pp == 0 else 1)


def test_one_stage_a_rank_is_the_same_either_way() -> None:
    for pp in range(1, 9):
        assert [home_of("v", pp, s) for s in range(pp)] == [home_of("loop", pp, s) for s in range(pp)]
