"""Forwards of a step: calls of the model with tokens of one text, through all stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.mlx.mlx_lm_internals import leaves_of, make_cache, reserve
from partita.mlx.model.block_cache import TextCache
from partita.mlx.model.parts import main_output, plan_of
from partita.mlx.model.rotary import text_length
from partita.mlx.stages.batches import PREFILL_TOKENS
from partita.mlx.stages.layers import Message
from partita.mlx.stages.links import Links
from partita.mlx.stages.run import run_stage


@dataclass(frozen=True)
class Forward:
    """A call of the model.

    Attributes:
        text: The cache of the text.
        ids: The ids of its next tokens.
        chooses: Whether the logits after the last of them are needed.
        length: The length of the prompt, which rotary frequencies may depend on; 0 after the prompt.
    """

    text: TextCache
    ids: list[int]
    chooses: bool
    length: int = 0


def forwards_of(text: TextCache, ids: list[int], *, chooses: bool, length: int = 0) -> Iterator[Forward]:
    """The forwards of tokens, as `generate` divides a prompt: the last token that is followed by a choice is alone."""
    last = len(ids) - 1 if chooses else len(ids)
    for start in range(0, last, PREFILL_TOKENS):
        yield Forward(text, ids[start : min(start + PREFILL_TOKENS, last)], chooses=False, length=length)
    if chooses:
        yield Forward(text, ids[last:], chooses=True, length=length)


class Through:
    """Runs forwards through the stages of a model."""

    def __init__(self, model: nn.Module) -> None:
        """Run forwards of `model`, a split model."""
        self.model = model
        self.plan, self._groups = plan_of(model)
        self._links = Links(self._groups.pp)
        mine = (self.plan.stage_index(self._groups.pp.rank, i) for i in range(self.plan.vpp))
        self.stages = sorted(stage for stage in mine if stage <= self.plan.loss_stage)

    def new_caches(self, tokens: int = 0) -> dict[int, list[Any]]:
        """Empty caches of this rank's stages, for a text of at most `tokens` tokens if they are given."""
        caches = {stage: make_cache(self.model) for stage in self.stages}
        for leaf in (leaf for cache in caches.values() for leaf in leaves_of(cache)):
            if tokens:
                reserve(leaf, tokens)
        return caches

    def run(
        self,
        forwards: Sequence[Forward],
        finish: Callable[[mx.array], None],
        done: Callable[[Forward], None] = lambda forward: None,
    ) -> None:
        """Run forwards in order; every rank of the replica calls it with forwards of the same shapes.

        Stages work at the same time, each with another forward: what a rank sends depends on nothing that it receives later.

        Args:
            forwards: The forwards.
            finish: Called on the last stage with the logits `[1, vocab]` of each forward that needs them, in order; lazy.
            done: Called after each forward.
        """
        pending: list[Any] = []
        for forward in forwards:
            with text_length(self.model, forward.length) if forward.length else nullcontext():
                output = self._run(forward)
            if output is not None and forward.chooses:
                finish(main_output(output)[:, -1])
                pending.append(forward.text.evaluated())
            else:
                mx.eval(forward.text.evaluated())
            done(forward)
        mx.async_eval(pending)

    def _run(self, forward: Forward) -> Any:
        """The output of the model on the stage with the loss; None on the others."""
        ids = mx.array([forward.ids])
        made: Any = None
        for stage in self.stages:
            received, key = made, tuple(ids.shape)
            if stage > 0 and (source := self.plan.stage_rank(stage - 1)) != self._groups.pp.rank:
                received = self._links.receive(source, stage, key)
            cache = forward.text.caches[stage]
            made = run_stage(self.model, self.plan, stage, received, ids, cache, output=forward.chooses)
            if stage < self.plan.loss_stage:
                mx.eval(made.arrays, forward.text.evaluated())
                if (target := self.plan.stage_rank(stage + 1)) != self._groups.pp.rank:
                    self._links.send(target, stage, made, key)
                    made = None
        return None if isinstance(made, Message) else made
