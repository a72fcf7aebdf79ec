"""mlx-lm's XTC, logit bias, presence and frequency penalties and penalty window had no counterpart on either engine."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_xtc, make_logits_processors

from partita.errors import PlanError
from partita.generation import Sampling
from partita.generation.choice import Choice
from partita.generation.sample import Columns, choose, generator_of
from partita.generation.settings import Sequence
from partita.torch.collectives.threads import run_as_threads

PROMPT, TOKENS = [3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5]
LOGITS = 3 * np.random.default_rng(0).normal(size=12)


def chosen(choice: Choice, logits: Any = LOGITS, place: int = 0, columns: Columns | None = None) -> int:
    sequence = Sequence(0, list(PROMPT), 100, list(TOKENS))
    (found,) = choose(np.array([logits]), [sequence], choice, [generator_of(choice, place)], columns)
    return found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"logit_bias": ((4, 2.0), (7, -3.0))}, {"logit_bias": {4: 2.0, 7: -3.0}}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5, "presence_context_size": 100}),
        ({"frequency_penalty": 0.7}, {"frequency_penalty": 0.7, "frequency_context_size": 100}),
        ({"frequency_penalty": 0.7, "penalty_window": 4}, {"frequency_penalty": 0.7, "frequency_context_size": 4}),
        (
            {"repetition_penalty": 1.4, "presence_penalty": -0.5, "penalty_window": 3, "logit_bias": ((5, 1.0),)},
            {"repetition_penalty": 1.4, "repetition_context_size": 3, "presence_penalty": -0.5, "presence_context_size": 3,
             "logit_bias": {5: 1.0}},
        ),
    ],
)  # fmt: skip
def test_processors_are_mlx_lms(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    logits = mx.array(LOGITS[None], mx.float32)
    for processor in make_logits_processors(**theirs):
        logits = processor(mx.array(PROMPT + TOKENS), logits)
    # Each id in turn becomes the one that a bias makes the most likely by a little: so the whole row is compared.
    row = np.array(logits[0], np.float64)
    biased = dict(ours.get("logit_bias", ()))
    for token in range(row.size):
        if token in PROMPT + TOKENS or token in biased:
            continue
        for margin, want in ((1e-4, token), (-1e-4, int(row.argmax()))):
            extra = row.max() - row[token] + margin
            choice = Choice(**{**ours, "logit_bias": (*biased.items(), (token, extra))})
            assert chosen(choice) == (want if row.argmax() != token else token)


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3])
def test_xtc_excludes_what_mlx_lm_excludes(threshold: float) -> None:
    theirs = np.array(apply_xtc(mx.array(LOGITS, mx.float32), 1.0, threshold, []))
    weights = np.exp(theirs - LOGITS.max())
    ends = np.cumsum(weights) / weights.sum()
    choice = Choice(temperature=1.0, xtc_probability=1.0, xtc_threshold=threshold, seed=5)
    for place in range(40):
        draw = generator_of(choice, place).random()
        assert chosen(choice, place=place) == int(np.searchsorted(ends, draw, side="right"))


def test_xtc_is_applied_as_often_as_asked_and_spares_end_tokens() -> None:
    top = int(LOGITS.argmax())
    weights = np.exp(LOGITS - LOGITS.max())
    share = float(weights[top] / weights.sum())
    choice = Choice(temperature=1.0, xtc_probability=0.5, xtc_threshold=0.05)
    found = [chosen(choice, place=place) for place in range(2000)]
    assert np.mean([one == top for one in found]) == pytest.approx(share / 2, abs=0.04)
    spared = Choice(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.05, eos_ids=frozenset([top]))
    assert any(chosen(spared, place=place) == top for place in range(20))


@pytest.mark.parametrize("parts", [2, 3])
def test_ranks_with_columns_choose_what_one_with_all_would(parts: int) -> None:
    choice = Choice(
        temperature=0.9, top_p=0.95, xtc_probability=0.5, xtc_threshold=0.05, presence_penalty=0.4, frequency_penalty=0.2,
        penalty_window=6, logit_bias=((0, 0.5), (11, 1.0)),
    )  # fmt: skip
    edges = [i * LOGITS.size // parts for i in range(parts + 1)]
    for place in range(20):
        want = chosen(choice, place=place)

        def one(comm: Any, place: int = place) -> int:
            a, b = list(pairwise(edges))[comm.rank]
            width = max(y - x for x, y in pairwise(edges))

            def gather(mine: Any) -> Any:
                return np.stack(comm.all_gather_object(np.array(mine)))

            return chosen(choice, LOGITS[a:b], place, Columns(a, width, comm.rank, gather))

        assert run_as_threads(parts, one) == [want] * parts


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"xtc_threshold": 0.6}, "xtc_threshold must be in"),
        ({"xtc_probability": -0.1}, "xtc_probability must be in"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must be finite numbers by id"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias must be finite numbers by id"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be a finite number"),
        ({"penalty_window": -1}, "penalty_window must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        Sampling(**settings)
