"""Generation of sequences of one length as a batch, on one stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.core.plan import Plan
from partita.core.sharding.split import Split
from partita.generation.choice import Choice
from partita.generation.sample import choose, generator_of
from partita.generation.settings import OnText, Sequence
from partita.generation.tokenizer import Tokenizer
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.mlx_lm_internals import make_cache
from partita.mlx.model.head import columns_of, local_logits, most_likely, wide_rows
from partita.mlx.model.parts import main_output
from partita.mlx.model.rotary import recomputed_beyond, text_length

PREFILL_TOKENS = 2048
"""Number of prompt tokens that pass through the model at once."""


@dataclass
class _Text:
    """The ids of a batch, `[batch, tokens]`, and the model's cache of all but the last."""

    ids: mx.array
    cache: list[Any]


class Batches:
    """Continues sequences, a batch of one length at a time, with the model on a single stage."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        groups: ParallelGroups,
        choice: Choice,
        tokenizer: Tokenizer | None,
        on_text: OnText | None,
    ) -> None:
        """Create the shared state of a run's batches."""
        self.model, self.plan, self.groups, self.comm, self.choice = model, plan, groups, groups.tp, choice
        self.tokenizer, self.on_text = tokenizer, on_text
        self.recomputed_beyond = recomputed_beyond(plan.spec.config)

    def batch(self, batch: list[Sequence]) -> None:
        """Continue sequences whose prompts are of one length."""
        greedy, limit = self.choice.is_plain, max(s.limit for s in batch)
        generators = [generator_of(self.choice, s.place) for s in batch]
        with local_logits(self.model, self.plan) as split:
            text = _Text(mx.array([s.prompt for s in batch]), make_cache(self.model))
            logits = self._prefill(text.ids, text.cache)
            # In greedy decoding, a step runs while the tokens of the previous step are processed.
            chosen = self._chosen(logits, split, batch, generators)
            for step in range(limit):
                following = None
                if greedy and step + 1 < limit:
                    following = self._chosen(self._advance(text, chosen), split, batch, generators)
                    mx.async_eval(following)
                if self._accept(batch, chosen):
                    mx.eval(following if following is not None else chosen)
                    return
                if following is None:
                    following = self._chosen(self._advance(text, chosen), split, batch, generators)
                chosen = following

    def _advance(self, text: _Text, chosen: mx.array) -> mx.array:
        """Append the chosen ids `[batch]` to the text and return the next logits."""
        # A code in place of an id is negative.
        chosen = mx.maximum(chosen, 0)
        text.ids = mx.concatenate([text.ids, chosen[:, None].astype(text.ids.dtype)], axis=1)
        if text.ids.shape[1] - 1 == self.recomputed_beyond:
            text.cache = make_cache(self.model)
            return self._prefill(text.ids, text.cache)
        return self._forward(chosen[:, None], text.cache)

    def _prefill(self, ids: mx.array, cache: list[Any]) -> mx.array:
        """The logits after the prompts. All tokens but the last only fill the cache, without logits."""
        last = ids.shape[1] - 1
        with text_length(self.model, ids.shape[1]):
            for start in range(0, last, PREFILL_TOKENS):
                self.model(ids[:, start : min(start + PREFILL_TOKENS, last)], cache=cache)
                mx.eval([c.state for c in cache])
            return self._forward(ids[:, last:], cache)

    def _forward(self, ids: mx.array, cache: list[Any]) -> mx.array:
        """The logits after the last ids, `[batch, vocab]` or this rank's columns."""
        return main_output(self.model(ids, cache=cache))[:, -1]

    def _chosen(
        self, logits: mx.array, split: Split | None, batch: list[Sequence], generators: list[np.random.Generator]
    ) -> mx.array:
        """The next token of each sequence, `[batch]`, the same on all ranks. The first rank samples for all."""
        if self.choice.is_plain:
            return most_likely(logits, split, self.comm)
        rows = wide_rows(logits)
        if split is not None and logits.shape[-1] != split.size:
            return mx.array(choose(rows, batch, self.choice, generators, columns_of(split, self.comm)), mx.int32)
        # All tensor ranks have the same logits; the first rank decides.
        ids = mx.zeros((len(batch),), mx.int32)
        if self.comm.rank == 0:
            ids = mx.array(choose(rows, batch, self.choice, generators), mx.int32)
        return self.comm.broadcast(ids)

    def _accept(self, batch: list[Sequence], chosen: mx.array) -> bool:
        """Append a token to each unfinished sequence. Returns whether all are finished."""
        tokens: list[int] = chosen.tolist()  # type: ignore[assignment]
        for sequence, token in zip(batch, tokens, strict=True):
            if not sequence.finish_reason:
                sequence.accept(token, self.choice, self.tokenizer)
                sequence.show(self.on_text, self.choice.stop)
        return all(s.finish_reason for s in batch)
