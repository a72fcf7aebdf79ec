"""The requests that run, on every rank, and the choice of their next tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import numpy as np

from partita.generation import Sequence
from partita.generation.choice import Choice
from partita.generation.sample import Array, Columns, choose, generator_of
from partita.serving.grammar import Matcher
from partita.serving.message import Admission


class Draws(np.random.Generator):
    """A request's random numbers, which can be taken again."""

    def __init__(self, choice: Choice) -> None:
        """The numbers of the first prompt of `generate` with these settings."""
        super().__init__(generator_of(choice, 0).bit_generator)
        self._taken: list[float] = []
        self._next = 0

    def random(self) -> float:  # type: ignore[override]
        """The next number."""
        if self._next == len(self._taken):
            self._taken.append(float(super().random()))
        self._next += 1
        return self._taken[self._next - 1]

    def settle(self) -> None:
        """Forget the numbers taken."""
        self._taken, self._next = [], 0

    def rewind(self) -> None:
        """Take the numbers since `settle` again."""
        self._next = 0


@dataclass
class Served:
    """A request that runs, on any rank.

    Attributes:
        admission: The request and its blocks.
        choice: Its settings.
        matcher: The state of its grammar, where tokens are chosen; None without a grammar.
        sequence: Its tokens.
        draws: Its random numbers.
        kind: Its settings without those that differ between rows of one call of `choose`.
    """

    admission: Admission
    choice: Choice
    matcher: Matcher | None = None
    sequence: Sequence = field(init=False)
    draws: Draws = field(init=False)
    kind: Choice = field(init=False)

    def __post_init__(self) -> None:
        request = self.admission.request
        self.sequence = Sequence(0, list(request.prompt), self.choice.limit(len(request.prompt)))
        self.draws = Draws(self.choice)
        # Only a forced last token depends on the limit.
        limit = self.choice.max_new_tokens if self.choice.forced_eos_token_ids else 1
        self.kind = replace(self.choice, seed=0, stop=(), max_new_tokens=limit)

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is chosen from unchanged logits."""
        return self.choice.is_plain and self.matcher is None

    def ids(self, start: int, count: int) -> list[int]:
        """Tokens of the text, prompt included."""
        prompt, tokens = self.sequence.prompt, self.sequence.tokens
        return [
            *prompt[start : start + count],
            *tokens[max(0, start - len(prompt)) : max(0, start + count - len(prompt))],
        ]


def chosen(logits: Array, served: SequenceOf[Served], columns: Columns | None) -> list[int]:
    """The next id of each row, as `choose` gives it for the row alone; every rank must call this.

    Args:
        logits: `[rows, vocab_r]`, this rank's columns; all of them without `columns`.
        served: The request of each row.
        columns: The columns on this rank.
    """
    ids = [0] * len(served)
    logits = _masked(logits, served, columns or Columns())
    kinds: dict[Choice, list[int]] = {}
    for row, one in enumerate(served):
        one.draws.settle()
        kinds.setdefault(one.kind, []).append(row)
    for kind, rows in kinds.items():
        found = _choose(logits, served, rows, kind, columns)
        if len(rows) > 1 and found[0] < 0:
            # A row whose logits are not finite gives all rows its code.
            found = [_choose(logits, served, [row], kind, columns)[0] for row in rows]
        for row, token in zip(rows, found, strict=True):
            ids[row] = token
            matcher = served[row].matcher
            if matcher is not None and token >= 0:
                matcher.accept(token)
    return ids


def _masked(logits: Array, served: SequenceOf[Served], columns: Columns) -> Array:
    """The logits, minus infinity where the grammar of a row excludes an id."""
    rows = [row for row, one in enumerate(served) if one.matcher is not None]
    if not rows:
        return logits
    logits = np.array(logits)
    own = logits.shape[1]
    for row in rows:
        matcher = served[row].matcher
        assert matcher is not None
        allowed = matcher.allowed()[columns.start : columns.start + own]
        logits[row, : len(allowed)][~allowed] = -np.inf
        logits[row, len(allowed) :] = -np.inf
    return logits


def _choose(
    logits: Array, served: SequenceOf[Served], rows: list[int], kind: Choice, columns: Columns | None
) -> list[int]:
    for row in rows:
        served[row].draws.rewind()
    sequences, draws = [served[row].sequence for row in rows], [served[row].draws for row in rows]
    return choose(logits[rows], sequences, kind, draws, columns)


def log_probabilities(
    logits: Array, ids: SequenceOf[int], count: int, columns: Columns | None
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """For each row the log probability of its id, and the `count` most likely ids with theirs; every rank must call this.

    Args:
        logits: `[rows, vocab_r]`, this rank's columns, before any setting.
        ids: The chosen id of each row.
        count: The number of most likely ids.
        columns: The columns on this rank; all of them if None.
    """
    columns = columns or Columns()
    scores = np.asarray(logits, np.float64)
    rows, own = scores.shape
    held = min(count, own)
    mine = np.full((rows, 3 + 2 * count), -np.inf)
    mine[:, 0] = scores.max(1)
    tops = np.where(np.isfinite(mine[:, :1]), mine[:, :1], 0.0)
    mine[:, 1] = np.exp(scores - tops).sum(1)
    for row, token in enumerate(ids):
        if 0 <= token - columns.start < own:
            mine[row, 2] = scores[row, token - columns.start]
    if held:
        places = np.argsort(-scores, 1, kind="stable")[:, :held]
        mine[:, 3 : 3 + held] = np.take_along_axis(scores, places, 1)
        mine[:, 3 + count : 3 + count + held] = places + columns.start
    sent = columns.gather(mine)
    best = sent[:, :, 0].max(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        totals = best + np.log((sent[:, :, 1] * np.exp(sent[:, :, 0] - best)).sum(0))
    result = []
    for row in range(rows):
        values, names = sent[:, row, 3 : 3 + count].ravel(), sent[:, row, 3 + count :].ravel()
        order = np.lexsort((names, -values))[:count]
        top = tuple((int(names[i]), float(values[i] - totals[row])) for i in order if np.isfinite(names[i]))
        result.append((float(sent[:, row, 2].max() - totals[row]), top))
    return result
