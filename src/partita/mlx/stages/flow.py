"""Generating over pipeline stages: groups of sequences circulate, so that every stage has one to compute with.

    rank 0      G0 prompt   G1 prompt   |  ids of G0 -> G0   |  ids of G1 -> G1   | ...
    rank 1                  G0 prompt   |  G1 prompt         |  G0                | ...

The stage with the loss chooses tokens. Their ids travel around the pipeline from rank to rank, each before the hidden state
that is computed from them; logits are never sent. A prompt is processed in parts: while a stage computes one, the previous
stage computes the next.

Sends block until they are received. So the choosing rank sends the ids of a group once the next hidden state has arrived (at
once without other groups in progress), and every other rank passes ids on after its computation with them: then no two
ranks wait for each other, and none waits for the other's computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from partita.generation.sample import generator_of
from partita.generation.settings import Sequence
from partita.mlx.mlx_lm_internals import make_cache
from partita.mlx.model.head import local_logits
from partita.mlx.model.parts import main_output
from partita.mlx.model.rotary import text_length
from partita.mlx.stages.batches import PREFILL_TOKENS, Batches
from partita.mlx.stages.layers import Message
from partita.mlx.stages.links import Links
from partita.mlx.stages.run import run_stage


@dataclass
class _Group:
    """Sequences that pass through the pipeline as a group.

    Attributes:
        sequences: The sequences.
        generators: The random generator of each.
        caches: The model's cache, by stage of this rank.
        is_done: Whether all sequences have ended.
    """

    sequences: list[Sequence]
    generators: list[np.random.Generator]
    caches: dict[int, list[Any]]
    is_done: bool = False


class Flow(Batches):
    """Continues sequences over several stages."""

    def batch(self, batch: list[Sequence]) -> None:
        """Continue sequences whose prompts are of one length; every rank of the pipeline calls it."""
        pp, vpp = self.groups.pp, self.plan.vpp
        mine = (self.plan.stage_index(pp.rank, i) for i in range(vpp))
        self.stages = sorted(stage for stage in mine if stage <= self.plan.loss_stage)
        self.picker = self.plan.stage_rank(self.plan.loss_stage)
        self.links = Links(pp)
        self.pending: list[tuple[_Group, mx.array]] = []
        # With several stages per rank, several groups would deadlock.
        count = min(len(batch), pp.size) if vpp == 1 else 1
        edges = [i * len(batch) // count for i in range(count + 1)]
        groups = [self._group(batch[a:b]) for a, b in pairwise(edges)]
        with local_logits(self.model, self.plan) as self.split:
            for group in groups:
                self._prompt(group, is_last=group is groups[-1])
            limit = max(s.limit for s in batch)
            for step in range(1, limit + 1):
                for group in groups:
                    self._step(group, is_last=step == limit)
            self._tell()

    def _group(self, sequences: list[Sequence]) -> _Group:
        generators = [generator_of(self.choice, s.place) for s in sequences]
        return _Group(sequences, generators, {stage: make_cache(self.model) for stage in self.stages})

    def _prompt(self, group: _Group, *, is_last: bool) -> None:
        """Fill the caches, and choose the first tokens. No token is sent before the last prompt has arrived."""
        ids = mx.array([s.prompt for s in group.sequences])
        last = ids.shape[1] - 1
        with text_length(self.model, ids.shape[1]):
            for start in range(0, last, PREFILL_TOKENS):
                self._pass(group, ids[:, start : min(start + PREFILL_TOKENS, last)], picks=False, tells=False)
            self._pass(group, ids[:, last:], picks=True, tells=is_last)

    def _step(self, group: _Group, *, is_last: bool) -> None:
        """Append the tokens of the previous step, and compute the next ones."""
        if group.is_done:
            return
        if self.groups.pp.rank == self.picker:
            if any(waiting is group for waiting, _ in self.pending):
                self._tell()
            if not group.is_done and not is_last:
                self._pass(group, self._next_ids(group), picks=True)
            return
        ids = self.groups.pp.recv((len(group.sequences),), mx.int32, (self.groups.pp.rank - 1) % self.groups.pp.size)
        group.is_done = self._accept(group.sequences, ids)
        if group.is_done or is_last:
            self._pass_on(ids)
        else:
            self._pass(group, self._next_ids(group), picks=True, ids_to_tell=ids)

    def _next_ids(self, group: _Group) -> mx.array:
        """The last ids, or the full text if the family drops its cache."""
        texts = [s.prompt + s.tokens for s in group.sequences]
        length = max(len(text) for text in texts)
        if length - 1 == self.recomputed_beyond:
            group.caches = {stage: make_cache(self.model) for stage in self.stages}
            # A finished sequence repeats its last token.
            return mx.array([text + text[-1:] * (length - len(text)) for text in texts])
        return mx.array([text[-1:] for text in texts])

    def _pass(
        self, group: _Group, ids: mx.array, *, picks: bool, tells: bool = True, ids_to_tell: mx.array | None = None
    ) -> None:
        """Run ids through this rank's stages.

        Args:
            group: The group of the ids.
            ids: `[sequences, tokens]`.
            picks: Whether to choose a token after them.
            tells: Whether the choosing rank sends its previous tokens once these have arrived.
            ids_to_tell: Ids to pass on to the next rank before the hidden state.
        """
        key = tuple(ids.shape)
        made: Any = None
        for stage in self.stages:
            received = made
            if stage > 0 and self.plan.stage_rank(stage - 1) != self.groups.pp.rank:
                received = self.links.receive(self.plan.stage_rank(stage - 1), stage, key)
            if tells and stage == self.stages[0]:
                self._tell()
            cache = group.caches[stage]
            made = run_stage(self.model, self.plan, stage, received, ids, cache, output=picks)
            mx.eval([entry.state for entry in cache], made.arrays if isinstance(made, Message) else [])
            if stage < self.plan.loss_stage and self.plan.stage_rank(stage + 1) != self.groups.pp.rank:
                self._pass_on(ids_to_tell)
                ids_to_tell = None
                self.links.send(self.plan.stage_rank(stage + 1), stage, made, key)
        self._pass_on(ids_to_tell)
        if picks and self.groups.pp.rank == self.picker:
            chosen = self._chosen(main_output(made)[:, -1], self.split, group.sequences, group.generators)
            mx.async_eval(chosen)
            self.pending.append((group, chosen))

    def _tell(self) -> None:
        """Append the chosen tokens, and send them to the next rank."""
        for group, chosen in self.pending:
            group.is_done = self._accept(group.sequences, chosen)
            self._pass_on(chosen)
        self.pending.clear()

    def _pass_on(self, ids: mx.array | None) -> None:
        """Send ids to the next rank, unless that rank chose them."""
        pp = self.groups.pp
        if ids is not None and (pp.rank + 1) % pp.size != self.picker:
            pp.send(ids, (pp.rank + 1) % pp.size)
