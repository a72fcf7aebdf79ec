"""Placing layers on stages, against every assignment there is."""

from __future__ import annotations

import random

import pytest

from partita.planner.layers import Amounts, Memory, compositions, place, seconds_of


def _amounts(chance: random.Random, stages: int, layers: int, *, unlike: bool) -> Amounts:
    kinds = [chance.uniform(0.5, 4) for _ in range(chance.choice((1, 2, layers)))]
    row = sorted(chance.choice(kinds) for _ in range(layers))
    speeds = [chance.choice((1.0, 0.5, 3.0)) if unlike else 1.0 for _ in range(stages)]
    outside = [0.0] * stages
    outside[0], outside[-1] = chance.uniform(0, 2) * speeds[0], outside[-1] + chance.uniform(0, 6) * speeds[-1]
    return Amounts(tuple(tuple(one * speed for one in row) for speed in speeds), tuple(outside))


@pytest.mark.parametrize("seed", range(120))
def test_the_assignment_is_the_best_of_all(seed: int) -> None:
    chance = random.Random(seed)
    pp, layers, microbatches = chance.randint(1, 5), chance.randint(1, 9), chance.choice((1, 2, 8, 100))
    seconds = _amounts(chance, pp, layers, unlike=seed % 2 == 1)
    memory = None
    if seed % 3:
        held = _amounts(chance, pp, layers, unlike=seed % 4 == 1)
        total = sum(held.layers[0]) + sum(held.outside)
        memory = Memory(held, tuple(total / pp * chance.uniform(0.7, 2.5) for _ in range(pp)))
    homes = tuple(range(pp))

    def fits(counts: tuple[int, ...]) -> bool:
        return memory is None or all(a <= b for a, b in zip(memory.bytes.of(counts), memory.limit, strict=True))

    times = [seconds_of(seconds.of(one), homes, microbatches) for one in compositions(layers, pp) if fits(one)]
    found = place(seconds, homes, microbatches, memory)
    if not times:
        assert found is None
        return
    assert found is not None
    assert sum(found) == layers
    assert fits(found)
    assert seconds_of(seconds.of(found), homes, microbatches) == pytest.approx(min(times), rel=1e-9)


def test_equal_layers_are_distributed_evenly_and_the_head_counts() -> None:
    rows = ((1.0,) * 10,) * 4
    assert place(Amounts(rows, (0.0,) * 4), range(4), 8) == (3, 3, 2, 2)
    assert place(Amounts(rows, (0.0, 0.0, 0.0, 2.0)), range(4), 8) == (3, 3, 3, 1)


def test_a_slow_device_gets_fewer_layers_and_a_small_one_no_more_than_fit() -> None:
    fast, slow = (1.0,) * 12, (3.0,) * 12
    seconds = Amounts((fast, slow), (0.0, 0.0))
    assert place(seconds, range(2), 64) == (9, 3)
    memory = Memory(Amounts((fast, fast), (0.0, 0.0)), (7.0, 12.0))
    assert place(seconds, range(2), 64, memory) == (7, 5)
    assert place(seconds, range(2), 64, Memory(memory.bytes, (4.0, 7.0))) is None


def test_several_stages_of_a_rank_share_its_memory() -> None:
    rows = ((1.0,) * 16,) * 8
    homes = (0, 1, 2, 3) * 2
    seconds = Amounts(rows, (0.0,) * 7 + (1.5,))
    counts = place(seconds, homes, 32)
    assert counts is not None
    assert sum(counts) == 16
    assert max(counts[r] + counts[r + 4] for r in range(4)) == 5  # rank 3 has the head, and gives a layer away
    tight = Memory(Amounts(rows, (0.0,) * 8), (3.0, 5.0, 5.0, 5.0))
    fitted = place(seconds, homes, 32, tight)
    assert fitted is not None
    assert fitted[0] + fitted[4] == 3
    assert place(seconds, homes, 32, Memory(tight.bytes, (3.0,) * 4)) is None
