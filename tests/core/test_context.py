"""Chunks of a sequence over context parallel ranks, for every length and number of ranks."""

from __future__ import annotations

import itertools

import pytest

from partita.core.sharding.context import blocks_of, chunks_of, positions_of
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


def _seen(length: int, ranks: int, rank: int, window: int | None, tile: int | None) -> list[tuple[int, int]]:
    """Positions of each row and key that a rank multiplies and does not hide."""
    chunks = chunks_of(length, ranks)
    rows, found = positions_of(chunks[rank]), []
    for held in chunks:
        keys = positions_of(held)
        for block in blocks_of(chunks[rank], held, window, tile):
            assert tile is None or block.rows[1] - block.rows[0] <= tile
            for i, j in itertools.product(range(*block.rows), range(*block.keys)):
                distance = block.shift + i - block.rows[0] - (j - block.keys[0])
                assert distance == rows[i] - keys[j]
                hidden = {"full": False, "causal": distance < 0, "window": not 0 <= distance < (window or 0)}[
                    block.kind
                ]
                found += [] if hidden else [(rows[i], keys[j])]
                assert block.kind != "causal" or block.shift == 0
    return found


@pytest.mark.parametrize("window", [None, 1, 3, 5, 12, 50])
def test_blocks_are_what_a_causal_mask_lets_rows_see(window: int | None) -> None:
    for length, ranks, tile in itertools.product((7, 16, 25), (2, 3), (None, 2, 4)):
        for rank, own in enumerate(chunks_of(length, ranks)):
            first = {row: 0 if window is None else max(0, row - window + 1) for row in positions_of(own)}
            want = [(row, key) for row in first for key in range(first[row], row + 1)]
            assert sorted(_seen(length, ranks, rank, window, tile)) == want


def test_blocks_are_balanced_in_every_step() -> None:
    for ranks in (2, 3, 8):
        chunks = chunks_of(2048, ranks)
        for step in range(ranks):
            work = [sum(one.pairs for one in blocks_of(own, chunks[rank - step])) for rank, own in enumerate(chunks)]
            assert max(work) / min(work) < 1.02


def test_refuses_sequences_that_are_too_short() -> None:
    with pytest.raises(PlanError, match=r"a sequence of 2 tokens cannot be split over cp=3.*Use cp=2"):
        chunks_of(2, 3)
