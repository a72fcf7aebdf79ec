"""The requests that run on a rank: their settings and their tokens, and what a step chooses for them, on any engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partita.core.plan import Plan
from partita.errors import PlanError
from partita.generation import Tokenizer
from partita.generation.choice import Choice, settle
from partita.generation.generation_config import end_tokens
from partita.generation.prompts import check_ids
from partita.generation.sample import Array, Columns
from partita.serving.choosing import Served, log_probabilities
from partita.serving.grammar import Grammars, Matcher
from partita.serving.message import Admission, Row
from partita.serving.requests import ServeRequest
from partita.serving.rows import Picked


class Texts:
    """The requests that run, by id; the same on every rank of a replica."""

    def __init__(self, plan: Plan, generation: Mapping[str, Any], tokenizer: Tokenizer | None) -> None:
        """Hold no request yet, of a model with the settings `generation` of its own."""
        self._plan, self._generation, self._tokenizer = plan, generation, tokenizer
        self._served: dict[int, Served] = {}
        self._grammars: Grammars | None = None

    def __getitem__(self, number: int) -> Served:
        """The request with an id."""
        return self._served[number]

    def settle(self, request: ServeRequest) -> Choice:
        """The request's settings, completed from the model's own.

        Raises:
            PartitaError: The request has ids or settings that the model does not take, or is too long for its positions.
        """
        choice = self._choice(request)
        self._matcher(request)
        unchecked = [0] if request.inputs else []
        check_ids([request.prompt], choice, self._tokenizer, self._plan.spec.vocab_size, unchecked)
        length, new = len(request.prompt), choice.limit(len(request.prompt))
        self._plan.spec.refuse_beyond_positions(length + new - 1, f"a prompt of {length} tokens with {new} new ones")
        return choice

    def _choice(self, request: ServeRequest) -> Choice:
        ends = self._tokenizer.eos_ids if self._tokenizer is not None else frozenset()
        return settle(request.sampling, self._generation, ends)

    def _matcher(self, request: ServeRequest) -> Matcher | None:
        if not request.grammar:
            return None
        if self._grammars is None:
            if self._tokenizer is None:
                raise PlanError("grammar needs a tokenizer. Give serving_loop one (tokenizer=).")
            ends = end_tokens(self._generation) or self._tokenizer.eos_ids
            self._grammars = Grammars(self._tokenizer, ends, self._plan.spec.vocab_size)
        return self._grammars.matcher(request.grammar)

    def end(self, number: int) -> None:
        """Forget a request."""
        del self._served[number]

    def append(self, number: int, token: int) -> None:
        """Add the token that an earlier step chose for a request."""
        self._served[number].sequence.tokens.append(token)

    def admit(self, admission: Admission) -> Served:
        """Begin a request."""
        served = Served(admission, self._choice(admission.request), self._matcher(admission.request))
        self._served[admission.request.id] = served
        return served

    def blank(self, rows: Sequence[Row]) -> Array:
        """Zeros for what is chosen for each of `rows`, `[rows, 2 + 2 * most]`, as `unpacked` reads it."""
        return np.zeros((len(rows), 2 + 2 * max((_top(self._served[row.id]) for row in rows), default=0)))

    def unpacked(self, rows: Sequence[Row], picked: Array) -> list[Picked]:
        """What was chosen for each of `rows`: a token, its log probability, then the ids and log probabilities of the top."""
        found = []
        for row, values in zip(rows, picked.tolist(), strict=True):
            top, most = _top(self._served[row.id]), (len(values) - 2) // 2
            names, scores = values[2 : 2 + top], values[2 + most : 2 + most + top]
            pairs = tuple((int(name), score) for name, score in zip(names, scores, strict=True) if name >= 0)
            found.append(Picked(int(values[0]), values[1], pairs))
        return found


def _top(served: Served) -> int:
    """The number of most likely tokens that a request wants with each of its own."""
    return served.admission.request.top_logprobs


def write_log_probabilities(picked: Array, wide: Array, served: Sequence[Served], columns: Columns | None) -> None:
    """Write the log probabilities that each of `served` wants beside its token in `picked`; every tensor rank must call this.

    Args:
        picked: `[rows, 2 + 2 * most]`, with the token of each row.
        wide: `[rows, vocab_r]`, this rank's columns of the logits.
        served: The request of each row.
        columns: The columns on this rank; all of them if None.
    """
    wanting = [i for i, one in enumerate(served) if one.admission.request.logprobs]
    if not wanting:
        return
    most = max(_top(served[i]) for i in wanting)
    found = log_probabilities(wide[wanting], picked[wanting, 0].astype(int).tolist(), most, columns)
    width = (picked.shape[1] - 2) // 2
    for i, (logprob, top) in zip(wanting, found, strict=True):
        names = [name for name, _ in top] + [-1] * (width - len(top))
        scores = [score for _, score in top] + [0.0] * (width - len(top))
        picked[i, 1:] = [logprob, *names, *scores]
