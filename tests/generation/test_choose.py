"""Choosing tokens: what can be drawn and how likely, and the same from columns on several ranks as from whole logits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.generation.choice import Choice
from partita.generation.sample import SHORTLIST, Columns, choose, generator_of
from partita.generation.settings import Sequence


def after(seen: list[list[int]]) -> list[Sequence]:
    return [Sequence(place, ids, 99) for place, ids in enumerate(seen)]


def one(logits: Any, seen: list[int], sampling: Choice, generator: np.random.Generator) -> int:
    return choose(logits[None], after([seen]), sampling, [generator])[0]


LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 3.0])


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {0, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {4}),  # the likeliest has 0.636 by itself
        ({"top_p": 0.65}, {0, 4}),
        ({"min_p": 0.2}, {0, 4}),  # e^-1 is more than a fifth, e^-2 less
        ({"repetition_penalty": 1e9, "top_k": 1}, {1}),  # 0 and 4 were there
        ({"temperature": 1e-3}, {4}),
    ],
)
def test_what_can_be_drawn(changes: dict[str, Any], possible: set[int]) -> None:
    sampling = Choice(**{"temperature": 1.0, **changes})
    generator = np.random.default_rng(0)
    assert {one(LOGITS, [0, 4], sampling, generator) for _ in range(3000)} == possible


def test_draws_follow_the_probabilities() -> None:
    generator = np.random.default_rng(1)
    draws = [one(LOGITS, [], Choice(temperature=1.0), generator) for _ in range(20000)]
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert np.abs(np.bincount(draws, minlength=5) / 20000 - expected).max() < 0.015


def test_the_same_as_transformers_processors() -> None:
    """What is left after transformers' processors is what can be drawn, with the same probabilities."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    logits = np.random.default_rng(3).standard_normal(50) * 3
    seen = [1, 5, 5, 9]
    sampling = Choice(temperature=0.7, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.5)
    scores = torch.tensor(logits)[None]
    for processor in (
        hf.RepetitionPenaltyLogitsProcessor(1.5), hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(12),
        hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.02),
    ):  # fmt: skip
        scores = processor(torch.tensor([seen]), scores)
    expected = scores.softmax(-1)[0].numpy()
    generator = np.random.default_rng(0)
    counts = np.bincount([one(logits, seen, sampling, generator) for _ in range(20000)], minlength=50) / 20000
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(expected))
    assert np.abs(counts - expected).max() < 0.015


def over_ranks(
    logits: Any, seen: list[list[int]], sampling: Choice, sizes: list[int], steps: int = 1
) -> tuple[list[list[list[int]]], int]:
    """What each of several ranks, one a thread, chooses at each step, and how many numbers the first has told."""
    ranks, barrier = len(sizes), threading.Barrier(len(sizes), timeout=20)
    board: list[Any] = [None] * ranks
    told = [0]
    starts = np.cumsum([0, *sizes])
    found: list[list[list[int]]] = [[] for _ in sizes]

    def gather_of(rank: int) -> Callable[[Any], Any]:
        def gather(mine: Any) -> Any:
            board[rank] = mine
            told[0] += mine.size if rank == 0 else 0
            barrier.wait()
            together = np.stack(board)
            barrier.wait()
            return together

        return gather

    def work(rank: int) -> None:
        generators = [generator_of(sampling, row) for row in range(len(seen))]
        columns = Columns(int(starts[rank]), max(sizes), rank, gather_of(rank))
        for _ in range(steps):
            mine = logits[:, starts[rank] : starts[rank + 1]]
            found[rank].append(choose(mine, after(seen), sampling, generators, columns))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, told[0]


SAMPLINGS = [
    Choice(temperature=1.0),
    Choice(temperature=0.7, repetition_penalty=1.3),
    Choice(temperature=1.0, top_k=3),
    Choice(temperature=1.0, top_k=200),
    Choice(temperature=1.3, top_p=0.8),
    Choice(temperature=1.0, min_p=0.3),
    Choice(temperature=1.0, min_p=1e-9),
    Choice(temperature=1.0, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    Choice(temperature=0.0, repetition_penalty=2.0),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.top_k}-{s.top_p}-{s.min_p}-{s.temperature}")
@pytest.mark.parametrize("sharpness", [0.0, 0.01, 1.0, 6.0])
@pytest.mark.parametrize("sizes", [[301], [150, 151], [1, 300], [76, 75, 75, 75]])
def test_columns_give_what_whole_logits_give(sampling: Choice, sharpness: float, sizes: list[int]) -> None:
    # Rounded, so that some are equally likely.
    logits = np.round(np.random.default_rng(7).standard_normal((3, 301)) * sharpness, 2)
    seen = [[3, 299, 150], [], [7]]
    generators = [generator_of(sampling, row) for row in range(3)]
    expected = [choose(logits, after(seen), sampling, generators) for _ in range(20)]
    found, _ = over_ranks(logits, seen, sampling, sizes, steps=20)
    assert found == [expected] * len(sizes)


def test_only_a_shortlist_is_told_where_it_settles_the_matter() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 40_000)) * 5
    for sampling, most in (
        (Choice(temperature=1.0), 8),
        (Choice(temperature=1.0, top_p=0.5), 2 * SHORTLIST + 8),
        (Choice(temperature=1.0, top_k=40), 2 * SHORTLIST + 8),
        (Choice(temperature=0.0, repetition_penalty=1.1), 8),
    ):
        assert over_ranks(logits, [[1]], sampling, [20_000, 20_000])[1] <= most
    flat = np.zeros((1, 40_000))
    assert over_ranks(flat, [[]], Choice(temperature=1.0, top_p=0.5), [20_000, 20_000])[1] > 20_000


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=3), st.integers(0, 150), st.floats(0.01, 1.0), st.floats(0.0, 1.0),
    st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
def test_any_filters_over_any_columns(
    sizes: list[int], top_k: int, top_p: float, min_p: float, decimals: int, seed: int
) -> None:
    sampling = Choice(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    logits = np.round(np.random.default_rng(seed).standard_normal((1, sum(sizes))), decimals)
    expected = choose(logits, after([[]]), sampling, [generator_of(sampling, 0)])
    assert over_ranks(logits, [[]], sampling, sizes)[0] == [[expected]] * len(sizes)
