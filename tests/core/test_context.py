"""Chunks of a sequence over context parallel ranks, for every length and number of ranks."""

from __future__ import annotations

import pytest

from partita.core.sharding.context import chunks_of, positions_of
from partita.errors import PlanError


def test_every_position_is_on_one_rank() -> None:
    for ranks in range(1, 9):
        for length in range(ranks, 70):
            held = [positions_of(own) for own in chunks_of(length, ranks)]
            assert all(own == sorted(own) and own for own in held)
            assert sorted(position for own in held for position in own) == list(range(length))


def test_causal_work_is_balanced() -> None:
    for ranks in (2, 3, 8):
        work = [sum(position + 1 for position in positions_of(own)) for own in chunks_of(2048, ranks)]
        assert max(work) / min(work) < 1.02


def test_refuses_sequences_that_are_too_short() -> None:
    with pytest.raises(PlanError, match=r"a sequence of 2 tokens cannot be split over cp=3.*Use cp=2"):
        chunks_of(2, 3)
