"""Choosing a token from logits, by one rank for all: as transformers' processors do, in their order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partita.text.sampling import Sampling

Logits = np.ndarray[tuple[int], np.dtype[np.float64]]


def is_greedy(sampling: Sampling) -> bool:
    """Whether the likeliest token is taken as it is, so that the logits themselves are not needed."""
    return sampling.temperature == 0 and sampling.repetition_penalty == 1.0


def choose(logits: Logits, seen: Sequence[int], sampling: Sampling, generator: np.random.Generator) -> int:
    """The next id.

    Args:
        logits: `[vocab]`.
        seen: The ids before it.
        sampling: How it is chosen.
        generator: Where chance comes from; one number is drawn unless the likeliest is taken.
    """
    scores = _penalized(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(scores.argmax())
    kept = np.arange(scores.size)
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.size:
        # What is as likely as the last of them stays, as in transformers.
        least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        kept = np.flatnonzero(scores >= least)
    if sampling.top_p < 1.0:
        likely = kept[np.argsort(-scores[kept], kind="stable")]
        before = np.cumsum(_softmax(scores[likely])) - _softmax(scores[likely])
        kept = np.sort(likely[before < sampling.top_p])
    if sampling.min_p > 0.0:
        probabilities = _softmax(scores[kept])
        kept = kept[probabilities >= sampling.min_p * probabilities.max()]
    cumulated = np.cumsum(_softmax(scores[kept]))
    place = int(np.searchsorted(cumulated, generator.random() * cumulated[-1], side="right"))
    return int(kept[min(place, kept.size - 1)])


def _penalized(logits: Logits, seen: Sequence[int], penalty: float) -> Logits:
    if penalty == 1.0:
        return logits
    scores = logits.copy()
    there = np.unique(np.asarray(seen))
    scores[there] = np.where(scores[there] < 0, scores[there] * penalty, scores[there] / penalty)
    return scores


def _softmax(scores: Logits) -> Logits:
    weights: Logits = np.exp(scores - scores.max())
    return weights / weights.sum()
