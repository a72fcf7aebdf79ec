"""Choosing tokens from logits of which each rank has some columns: as transformers' processors do, in their order.

Whole logits are not put together. Each rank tells the largest of its own and what all of its own weigh together; from that the
token is found as it would be from whole logits, to the same number drawn. Only where what was told does not settle it (hundreds
of tokens about as likely as each other, inside the nucleus) the rest is told too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from partita.core.plan import Plan
from partita.generation.choice import Choice
from partita.generation.settings import Sequence

Array = np.ndarray[Any, np.dtype[np.float64]]
Gather = Callable[[Array], Array]
"""Given an array of the same shape on every rank: theirs in rank order, `[ranks, ...]`."""

ALL_EXCLUDED = -(1 << 20)
"""What stands in place of an id where every logit is minus infinity."""

SHORTLIST = 128
"""How many of its likeliest tokens a rank tells where their number is not given."""


@dataclass(frozen=True)
class Columns:
    """Which columns of the logits this rank has, and how it hears of the others.

    Attributes:
        start: The id of its first column.
        width: The columns of the rank that has most.
        rank: Its place among the ranks.
        gather: How ranks tell each other.
    """

    start: int = 0
    width: int = 0
    rank: int = 0
    gather: Gather = lambda array: array[None]


def generator_of(choice: Choice, place: int) -> np.random.Generator:
    """Where the chance of the sequence at `place` comes from: the same numbers on either engine."""
    return np.random.default_rng([choice.seed, place])


def no_token(rank: int) -> int:
    """What stands in place of an id where logits of tensor rank `rank` are NaN or infinite."""
    return -1 - rank


def failure_of(sequences: Iterable[Sequence], plan: Plan, replica: int) -> str:
    """What the code of the first of a replica's sequences that has one says, in words; nothing where none has."""
    failed = next((sequence for sequence in sequences if sequence.failure), None)
    if failed is None:
        return ""
    step = len(failed.tokens) + 1
    if failed.failure == ALL_EXCLUDED:
        return (
            f"at step {step} every logit is minus infinity, so no token can be chosen. The model, or settings such as "
            "suppress_tokens and bad_words_ids, exclude every token. Change the settings."
        )
    rank = plan.mesh.rank(dp=replica, pp=plan.stage_rank(plan.loss_stage), tp=no_token(failed.failure))
    return (
        f"at step {step} logits of rank {rank} are NaN or infinite, so no token can be chosen. Check the "
        "weights, or compute in a wider dtype (--dtype float32)."
    )


def choose(
    logits: Array,
    sequences: SequenceOf[Sequence],
    choice: Choice,
    generators: SequenceOf[np.random.Generator],
    columns: Columns | None = None,
) -> list[int]:
    """The next id of each row; every rank calls it and gets the same. Codes where logits are not finite.

    Args:
        logits: `[rows, vocab_r]`, this rank's columns; all of them without `columns`.
        sequences: What each row continues.
        choice: How it is chosen.
        generators: Where the chance of each row comes from, in the same state on every rank; one number is drawn unless the
            most likely is taken, and a second one with XTC.
        columns: Which columns these are.
    """
    columns = columns or Columns()
    scores = np.array(logits, np.float64)
    # A model may exclude tokens by minus infinity.
    wrong = np.logical_not(np.all(scores < np.inf, axis=1))
    for row, one, is_wrong in zip(scores, sequences, wrong, strict=True):
        if not is_wrong:
            _process(row, one, choice, columns.start)
    scores[wrong] = np.nan
    if choice.temperature == 0:
        return _most_likely(scores, columns)
    scores /= choice.temperature
    draws = [generator.random() for generator in generators]
    excludes = [choice.xtc_probability > 0 and g.random() < choice.xtc_probability for g in generators]
    if any(excludes):
        return _excluding(scores, excludes, draws, choice, columns)
    told = _Told.by_all(scores, choice, columns)
    if (codes := _codes(told.tops)) is not None:
        return codes
    if not told.values.shape[-1]:
        return _from_all(scores, told, draws, columns)
    ids = [_from_some(told, row, draw, choice) for row, draw in enumerate(draws)]
    # The first rank's word counts: of machines of different kinds the last bit of a weight need not agree.
    decided = columns.gather(np.array(ids, np.float64))[0]
    if (decided < 0).any():
        whole = np.concatenate(_parts(scores, columns), 1)
        for row in np.flatnonzero(decided < 0):
            kept = np.arange(whole.shape[1])
            decided[row] = _drawn(*_kept(whole[row], kept, None, choice)[:2], draws[row])
        decided = columns.gather(decided)[0]
    return [int(one) for one in decided]


def _codes(tops: Array) -> list[int] | None:
    """A code in place of each row's id where the largest logits `tops`, `[ranks, rows]`, of any row are not finite."""
    best = tops.max(0)
    if np.isfinite(best).all():
        return None
    row = int((~np.isfinite(best)).argmax())
    excluded = best[row] == -np.inf
    # The run ends, so that no row needs its own id.
    return [ALL_EXCLUDED if excluded else no_token(int(tops[:, row].argmax()))] * len(best)


def _process(row: Array, sequence: Sequence, choice: Choice, start: int) -> None:
    """Change a row of logits, of which the first is that of id `start`, as transformers' processors do before choice."""
    prompt, tokens = sequence.prompt, sequence.tokens
    for token, bias in choice.logit_bias:
        row[_inside((token,), start, row.size)] += bias
    seen = np.asarray((prompt + tokens)[-choice.penalty_window :], np.int64) - start
    _penalize(row, seen, choice)
    forced = choice.forced(prompt, tokens)
    if forced:
        row[:] = -np.inf
        row[_inside(forced, start, row.size)] = 0.0
    row[_inside(choice.banned(prompt, tokens), start, row.size)] = -np.inf


def _inside(ids: Iterable[int], start: int, size: int) -> list[int]:
    return [i - start for i in ids if start <= i < start + size]


@dataclass(frozen=True)
class _Told:
    """What all ranks have told of their columns.

    Attributes:
        tops: `[ranks, rows]`, the largest score.
        sums: `[ranks, rows]`, of exp(score - top).
        floors: `[ranks, rows]`, below or at which are the scores not told; minus infinity where all are.
        values: `[ranks, rows, told]`, the largest scores.
        ids: `[ranks, rows, told]`, theirs.
    """

    tops: Array
    sums: Array
    floors: Array
    values: Array
    ids: Array

    @staticmethod
    def by_all(scores: Array, choice: Choice, columns: Columns) -> _Told:
        rows, own = scores.shape
        filtered = choice.top_k > 0 or choice.top_p < 1.0 or choice.min_p > 0.0
        count = min(max(choice.top_k + 1, SHORTLIST), max(columns.width, own)) if filtered else 0
        mine = np.full((rows, 3 + 2 * count), -np.inf)
        mine[:, 0] = scores.max(1)
        # A rank of which every id is banned has no top to compare with.
        tops = np.where(np.isfinite(mine[:, :1]), mine[:, :1], 0.0)
        mine[:, 1] = np.exp(scores - tops).sum(1)
        held = min(count, own)
        if held:
            places = np.argpartition(-scores, held - 1, axis=1)[:, :held]
            mine[:, 3 : 3 + held] = np.take_along_axis(scores, places, 1)
            mine[:, 3 + count : 3 + count + held] = places + columns.start
            if held < own:
                mine[:, 2] = mine[:, 3 : 3 + held].min(1)
        told = columns.gather(mine)
        return _Told(told[:, :, 0], told[:, :, 1], told[:, :, 2], told[:, :, 3 : 3 + count], told[:, :, 3 + count :])

    def weights(self, row: int) -> Array:
        """`[ranks]`, what the scores of each rank weigh, where the largest of all weighs 1."""
        tops = self.tops[:, row]
        weights: Array = self.sums[:, row] * np.exp(tops - tops.max())
        return weights


def _penalize(row: Array, seen: np.ndarray[Any, np.dtype[np.int64]], choice: Choice) -> None:
    """Apply the penalties for ids that appeared, in mlx-lm's order: repetition, presence, frequency."""
    there, counts = np.unique(seen[(seen >= 0) & (seen < row.size)], return_counts=True)
    penalty = choice.repetition_penalty
    if penalty != 1.0:
        row[there] = np.where(row[there] < 0, row[there] * penalty, row[there] / penalty)
    row[there] -= choice.presence_penalty + choice.frequency_penalty * counts


def _excluding(scores: Array, excludes: list[bool], draws: list[float], choice: Choice, columns: Columns) -> list[int]:
    """The next ids where XTC excludes the most likely ids of some rows, which takes the scores of all ranks."""
    parts = _parts(scores, columns)
    if (codes := _codes(np.stack([part.max(1) for part in parts]))) is not None:
        return codes
    ids = []
    for row, draw, excluded in zip(np.concatenate(parts, 1), draws, excludes, strict=True):
        kept, weights, _ = _kept(row, np.arange(row.size), None, choice)
        if excluded:
            likely = weights > choice.xtc_threshold * weights.sum()
            least = weights[likely].min(initial=np.inf)
            stay = ~(likely & (weights > least)) | np.isin(kept, list(choice.eos_ids))
            kept, weights = kept[stay], weights[stay]
        ids.append(_drawn(kept, weights, draw))
    # The first rank's word counts, as in `choose`.
    return [int(one) for one in columns.gather(np.array(ids, np.float64))[0]]


def _most_likely(scores: Array, columns: Columns) -> list[int]:
    places = scores.argmax(1)
    told = columns.gather(np.stack([scores.max(1), places + columns.start], 1).astype(np.float64))
    if (codes := _codes(told[:, :, 0])) is not None:
        return codes
    best = told[:, :, 0].argmax(0)
    return [int(told[rank, row, 1]) for row, rank in enumerate(best)]


def _from_all(scores: Array, told: _Told, draws: list[float], columns: Columns) -> list[int]:
    """Without filters: the rank in whose share of the whole weight the draw falls finds the id."""
    # Weighed by the first rank, so that all agree on who that is.
    shares = columns.gather(np.stack([told.weights(row) for row in range(len(draws))]))[0]
    mine, owners = np.zeros(len(draws)), []
    for row, draw in enumerate(draws):
        ends = np.cumsum(shares[row])
        target = draw * ends[-1]
        owner = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
        owners.append(owner)
        if owner == columns.rank:
            within = (target - (ends[owner] - shares[row, owner])) / shares[row, owner]
            weights = np.exp(scores[row] - told.tops[owner, row])
            mine[row] = columns.start + _drawn(np.arange(weights.size), weights, within)
    chosen = columns.gather(mine)
    return [int(chosen[owner, row]) for row, owner in enumerate(owners)]


def _from_some(told: _Told, row: int, draw: float, choice: Choice) -> int:
    """The id, or -1 where what was told does not settle it."""
    values, ids = told.values[:, row].ravel(), told.ids[:, row].ravel()
    there = np.isfinite(ids)
    order = np.argsort(ids[there])
    values, whole_ids = values[there][order], ids[there][order].astype(np.int64)
    total = None if choice.top_k else float(told.weights(row).sum())
    kept, weights, least = _kept(values, whole_ids, total, choice)
    # All scores above the floor were told.
    floor = told.floors[:, row].max()
    return _drawn(kept, weights, draw) if least > floor or floor == -np.inf else -1


def _kept(
    scores: Array, ids: np.ndarray[Any, np.dtype[np.int64]], total: float | None, choice: Choice
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], Array, float]:
    """The ids that are left by the filters, in order, what they weigh, and the least score that had to be known for it.

    Args:
        scores: Of `ids`, which hold at least all that will be kept.
        ids: In order.
        total: What all scores weigh, where the largest weighs 1; None where they are all here, or only the kept count.
        choice: The filters.
    """
    least = scores.max() + np.log(choice.min_p) if choice.min_p > 0.0 else -np.inf
    if choice.top_k > 0 or choice.top_p < 1.0:
        least = -np.inf
    if 0 < choice.top_k < scores.size:
        # What is as likely as the last of them stays, as in transformers.
        stay = scores >= np.partition(scores, -choice.top_k)[-choice.top_k]
        scores, ids = scores[stay], ids[stay]
        least = scores.min()
    weights = np.exp(scores - scores.max())
    if choice.top_p < 1.0:
        likely = np.argsort(-scores, kind="stable")
        ordered = weights[likely]
        before = np.cumsum(ordered) - ordered
        stay = np.sort(likely[before < choice.top_p * (total if total is not None else ordered.sum())])
        weights, ids = weights[stay], ids[stay]
        # Of the likeliest k every one counts, as they are weighed together.
        least = scores[stay].min() if least == -np.inf else least
    if choice.min_p > 0.0:
        stay = weights >= choice.min_p
        weights, ids = weights[stay], ids[stay]
    return ids, weights, float(least)


def _drawn(ids: np.ndarray[Any, np.dtype[np.int64]], weights: Array, draw: float) -> int:
    ends = np.cumsum(weights)
    return int(ids[min(int(np.searchsorted(ends, draw * ends[-1], side="right")), ids.size - 1)])


def _parts(scores: Array, columns: Columns) -> list[Array]:
    """The scores of each rank, `[rows, vocab_r]`."""
    own = scores.shape[1]
    wide = np.zeros((scores.shape[0], 1 + max(columns.width, own)))
    wide[:, 0], wide[:, 1 : 1 + own] = own, scores
    return [part[:, 1 : 1 + int(part[0, 0])] for part in columns.gather(wide)]
