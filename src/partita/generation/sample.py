"""Choose tokens from logits whose columns are distributed over ranks, as transformers' processors do, in their order.

The logits are never gathered. Each rank sends its largest logits and the total weight of all of its own; from these, the same
random number gives the same token as from complete logits. Only if they do not determine it (hundreds of about equally likely
tokens in the nucleus) do ranks send the rest too.
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
"""All-gather of an array of the same shape on every rank: `[ranks, ...]`."""

ALL_EXCLUDED = -(1 << 20)
"""The code in place of an id if every logit is minus infinity."""

SHORTLIST = 128
"""The number of its most likely tokens that a rank sends if it is not given."""


@dataclass(frozen=True)
class Columns:
    """The columns of the logits on this rank, and the collective that gathers those of the others.

    Attributes:
        start: The id of its first column.
        width: The largest number of columns of any rank.
        rank: This rank.
        gather: All-gather among the ranks.
    """

    start: int = 0
    width: int = 0
    rank: int = 0
    gather: Gather = lambda array: array[None]


def generator_of(choice: Choice, place: int) -> np.random.Generator:
    """The random generator of the sequence at `place`, with the same numbers on either engine."""
    return np.random.default_rng([choice.seed, place])


def no_token(rank: int) -> int:
    """The code in place of an id if logits of tensor rank `rank` are NaN or infinite."""
    return -1 - rank


def failure_of(sequences: Iterable[Sequence], plan: Plan, replica: int) -> str:
    """The error for the first of a replica's sequences that has a code; empty if none has."""
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
    """The next id of each row, the same on every rank; every rank must call this. A code if logits are not finite.

    Args:
        logits: `[rows, vocab_r]`, this rank's columns; all of them without `columns`.
        sequences: The sequence of each row.
        choice: The settings for choosing.
        generators: The random generator of each row, in the same state on every rank; one number is sampled unless the
            most likely token is chosen, and a second one with XTC.
        columns: The columns on this rank.
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
    samples = [generator.random() for generator in generators]
    excludes = [choice.xtc_probability > 0 and g.random() < choice.xtc_probability for g in generators]
    if any(excludes):
        return _excluding(scores, excludes, samples, choice, columns)
    sent = _Scores.by_all(scores, choice, columns)
    if (codes := _codes(sent.tops)) is not None:
        return codes
    if not sent.values.shape[-1]:
        return _from_all(scores, sent, samples, columns)
    ids = [_from_some(sent, row, sample, choice) for row, sample in enumerate(samples)]
    # The first rank's result is used: on different kinds of machines the last bit of a weight may differ.
    decided = columns.gather(np.array(ids, np.float64))[0]
    if (decided < 0).any():
        whole = np.concatenate(_parts(scores, columns), 1)
        for row in np.flatnonzero(decided < 0):
            kept = np.arange(whole.shape[1])
            decided[row] = _sampled(*_kept(whole[row], kept, None, choice)[:2], samples[row])
        decided = columns.gather(decided)[0]
    return [int(one) for one in decided]


def _codes(tops: Array) -> list[int] | None:
    """A code in place of each row's id if the largest logits `tops`, `[ranks, rows]`, of any row are not finite."""
    best = tops.max(0)
    if np.isfinite(best).all():
        return None
    row = int((~np.isfinite(best)).argmax())
    excluded = best[row] == -np.inf
    # The run ends, so no row needs its own id.
    return [ALL_EXCLUDED if excluded else no_token(int(tops[:, row].argmax()))] * len(best)


def _process(row: Array, sequence: Sequence, choice: Choice, start: int) -> None:
    """Change a row of logits, the first of which is that of id `start`, as transformers' processors do before choosing."""
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
class _Scores:
    """The scores that all ranks have sent.

    Attributes:
        tops: `[ranks, rows]`, the largest score.
        sums: `[ranks, rows]`, of exp(score - top).
        floors: `[ranks, rows]`, an upper bound of the scores not sent; minus infinity if all were sent.
        values: `[ranks, rows, sent]`, the largest scores.
        ids: `[ranks, rows, sent]`, their ids.
    """

    tops: Array
    sums: Array
    floors: Array
    values: Array
    ids: Array

    @staticmethod
    def by_all(scores: Array, choice: Choice, columns: Columns) -> _Scores:
        rows, own = scores.shape
        filtered = choice.top_k > 0 or choice.top_p < 1.0 or choice.min_p > 0.0
        count = min(max(choice.top_k + 1, SHORTLIST), max(columns.width, own)) if filtered else 0
        mine = np.full((rows, 3 + 2 * count), -np.inf)
        mine[:, 0] = scores.max(1)
        # If all ids of a rank are banned, it has no top to compare with.
        tops = np.where(np.isfinite(mine[:, :1]), mine[:, :1], 0.0)
        mine[:, 1] = np.exp(scores - tops).sum(1)
        held = min(count, own)
        if held:
            places = np.argpartition(-scores, held - 1, axis=1)[:, :held]
            mine[:, 3 : 3 + held] = np.take_along_axis(scores, places, 1)
            mine[:, 3 + count : 3 + count + held] = places + columns.start
            if held < own:
                mine[:, 2] = mine[:, 3 : 3 + held].min(1)
        sent = columns.gather(mine)
        return _Scores(sent[:, :, 0], sent[:, :, 1], sent[:, :, 2], sent[:, :, 3 : 3 + count], sent[:, :, 3 + count :])

    def weights(self, row: int) -> Array:
        """`[ranks]`, the total weight of each rank's scores, relative to the largest score."""
        tops = self.tops[:, row]
        weights: Array = self.sums[:, row] * np.exp(tops - tops.max())
        return weights


def _penalize(row: Array, seen: np.ndarray[Any, np.dtype[np.int64]], choice: Choice) -> None:
    """Apply the penalties for ids that have appeared, in mlx-lm's order: repetition, presence, frequency."""
    there, counts = np.unique(seen[(seen >= 0) & (seen < row.size)], return_counts=True)
    penalty = choice.repetition_penalty
    if penalty != 1.0:
        row[there] = np.where(row[there] < 0, row[there] * penalty, row[there] / penalty)
    row[there] -= choice.presence_penalty + choice.frequency_penalty * counts


def _excluding(
    scores: Array, excludes: list[bool], samples: list[float], choice: Choice, columns: Columns
) -> list[int]:
    """The next ids if XTC excludes the most likely ids of some rows, which needs the scores of all ranks."""
    parts = _parts(scores, columns)
    if (codes := _codes(np.stack([part.max(1) for part in parts]))) is not None:
        return codes
    ids = []
    for row, sample, excluded in zip(np.concatenate(parts, 1), samples, excludes, strict=True):
        kept, weights, _ = _kept(row, np.arange(row.size), None, choice)
        if excluded:
            likely = weights > choice.xtc_threshold * weights.sum()
            least = weights[likely].min(initial=np.inf)
            stay = ~(likely & (weights > least)) | np.isin(kept, list(choice.eos_ids))
            kept, weights = kept[stay], weights[stay]
        ids.append(_sampled(kept, weights, sample))
    # The first rank's result is used, as in `choose`.
    return [int(one) for one in columns.gather(np.array(ids, np.float64))[0]]


def _most_likely(scores: Array, columns: Columns) -> list[int]:
    places = scores.argmax(1)
    sent = columns.gather(np.stack([scores.max(1), places + columns.start], 1).astype(np.float64))
    if (codes := _codes(sent[:, :, 0])) is not None:
        return codes
    best = sent[:, :, 0].argmax(0)
    return [int(sent[rank, row, 1]) for row, rank in enumerate(best)]


def _from_all(scores: Array, sent: _Scores, samples: list[float], columns: Columns) -> list[int]:
    """Without filters: the rank whose share of the total weight contains the random number finds the id."""
    # Computed by the first rank, so that all agree on which rank that is.
    shares = columns.gather(np.stack([sent.weights(row) for row in range(len(samples))]))[0]
    mine, owners = np.zeros(len(samples)), []
    for row, sample in enumerate(samples):
        ends = np.cumsum(shares[row])
        target = sample * ends[-1]
        owner = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
        owners.append(owner)
        if owner == columns.rank:
            within = (target - (ends[owner] - shares[row, owner])) / shares[row, owner]
            weights = np.exp(scores[row] - sent.tops[owner, row])
            mine[row] = columns.start + _sampled(np.arange(weights.size), weights, within)
    chosen = columns.gather(mine)
    return [int(chosen[owner, row]) for row, owner in enumerate(owners)]


def _from_some(sent: _Scores, row: int, sample: float, choice: Choice) -> int:
    """The id, or -1 if the scores that were sent do not determine it."""
    values, ids = sent.values[:, row].ravel(), sent.ids[:, row].ravel()
    there = np.isfinite(ids)
    order = np.argsort(ids[there])
    values, whole_ids = values[there][order], ids[there][order].astype(np.int64)
    total = None if choice.top_k else float(sent.weights(row).sum())
    kept, weights, least = _kept(values, whole_ids, total, choice)
    # All scores above the floor were sent.
    floor = sent.floors[:, row].max()
    return _sampled(kept, weights, sample) if least > floor or floor == -np.inf else -1


def _kept(
    scores: Array, ids: np.ndarray[Any, np.dtype[np.int64]], total: float | None, choice: Choice
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], Array, float]:
    """The ids that the filters keep, in order, their weights, and the least score that was needed to find them.

    Args:
        scores: The scores of `ids`, which contain at least all that will be kept.
        ids: The ids in order.
        total: The weight of all scores relative to the largest; None if `scores` has all, or only the kept ones count.
        choice: The filters.
    """
    least = scores.max() + np.log(choice.min_p) if choice.min_p > 0.0 else -np.inf
    if choice.top_k > 0 or choice.top_p < 1.0:
        least = -np.inf
    if 0 < choice.top_k < scores.size:
        # Tokens as likely as the last of them are kept, as in transformers.
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
        # Each of the k most likely tokens counts, since they are weighed together.
        least = scores[stay].min() if least == -np.inf else least
    if choice.min_p > 0.0:
        stay = weights >= choice.min_p
        weights, ids = weights[stay], ids[stay]
    return ids, weights, float(least)


def _sampled(ids: np.ndarray[Any, np.dtype[np.int64]], weights: Array, sample: float) -> int:
    ends = np.cumsum(weights)
    return int(ids[min(int(np.searchsorted(ends, sample * ends[-1], side="right")), ids.size - 1)])


def _parts(scores: Array, columns: Columns) -> list[Array]:
    """The scores of each rank, `[rows, vocab_r]`."""
    own = scores.shape[1]
    wide = np.zeros((scores.shape[0], 1 + max(columns.width, own)))
    wide[:, 0], wide[:, 1 : 1 + own] = own, scores
    return [part[:, 1 : 1 + int(part[0, 0])] for part in columns.gather(wide)]
