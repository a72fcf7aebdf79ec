"""The MLX engine's part of a serving loop: forwards of rows, and the choice of their next tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.core.sharding.split import Split
from partita.errors import PlanError
from partita.generation import Tokenizer
from partita.generation.choice import Choice, settle
from partita.generation.generation_config import end_tokens
from partita.generation.prompts import check_ids
from partita.mlx.generate import generation_of
from partita.mlx.model.block_cache import Blocks, TextCache
from partita.mlx.model.head import columns_of, local_logits, most_likely, wide_rows
from partita.mlx.model.modes import mode_set
from partita.mlx.model.parts import plan_of
from partita.mlx.model.rotary import recomputed_beyond
from partita.mlx.model.sliding_window import refuse_beyond_window
from partita.mlx.proof.stages import refuse_undecodable
from partita.mlx.serving.forwards import Forward, Through, forwards_of
from partita.mlx.serving.measure import measure
from partita.serving import ServeRequest, ServeSettings
from partita.serving.blocks import CacheLayout
from partita.serving.choosing import Served, chosen, log_probabilities
from partita.serving.grammar import Grammars, Matcher
from partita.serving.message import Row, Step
from partita.serving.rows import Picked

MESSAGE_BYTES = 4096
"""The size of a step's broadcast; a longer message is followed by a second one."""


class MlxRows:
    """Runs rows of requests on this rank.

    Attributes:
        layout: The cache of a replica, the same on every rank.
        plan: The plan of the model.
        decides: Whether this is the first rank of the run.
        tokenizer: The tokenizer.
    """

    def __init__(self, model: nn.Module, settings: ServeSettings, tokenizer: Tokenizer | None) -> None:
        """Measure the model's cache with a few short forwards."""
        self.plan, self.groups = plan_of(model)
        refuse_undecodable(model, self.plan)
        self.model, self.tokenizer = model, tokenizer
        self.decides = self.groups.rank == 0
        self._generation = generation_of(model)
        self._recomputed_beyond = recomputed_beyond(self.plan.spec.config)
        self._picker = self.plan.stage_rank(self.plan.loss_stage)
        self._served: dict[int, Served] = {}
        self._texts: dict[int, TextCache] = {}
        self._wants: dict[int, int] = {}
        self._grammars: Grammars | None = None
        self._stages = Through(model)
        with mode_set(model, training=False):
            measured = measure(model, self._stages, settings)
        self.layout: CacheLayout = measured.layout
        self._blocks = Blocks(settings.block_tokens, forgets=measured.forgets) if self.layout.reused else None

    def settle(self, request: ServeRequest) -> Choice:
        """The request's settings; see `Rows`."""
        choice = self._choice(request)
        self._matcher(request)
        check_ids([request.prompt], choice, self.tokenizer, self.plan.spec.vocab_size)
        length, new = len(request.prompt), choice.limit(len(request.prompt))
        what = f"a prompt of {length} tokens with {new} new ones"
        self.plan.spec.refuse_beyond_positions(length + new - 1, what)
        refuse_beyond_window(self.plan.spec, length + new, what)
        return choice

    def _choice(self, request: ServeRequest) -> Choice:
        return settle(
            request.sampling, self._generation, self.tokenizer.eos_ids if self.tokenizer is not None else frozenset()
        )

    def _matcher(self, request: ServeRequest) -> Matcher | None:
        if not request.grammar:
            return None
        if self._grammars is None:
            if self.tokenizer is None:
                raise PlanError("grammar needs a tokenizer. Give serving_loop one (tokenizer=).")
            ends = end_tokens(self._generation) or self.tokenizer.eos_ids
            self._grammars = Grammars(self.tokenizer, ends, self.plan.spec.vocab_size)
        return self._grammars.matcher(request.grammar)

    def share(self, data: bytes | None) -> bytes:
        """The bytes of the deciding rank, on every rank: along each axis in turn they reach all."""
        data = data or b""
        if self.plan.mesh.size == 1:
            return data
        message = self._broadcast(len(data).to_bytes(8, "little") + data[: MESSAGE_BYTES - 8], MESSAGE_BYTES)
        size = int.from_bytes(message[:8], "little")
        return message[8 : 8 + size] if size <= MESSAGE_BYTES - 8 else self._broadcast(data, size)

    def _broadcast(self, data: bytes, size: int) -> bytes:
        """The first rank's `data`, padded to `size` bytes."""
        array = mx.array(np.frombuffer(data.ljust(size, b"\0"), np.uint8))
        for comm in self.groups.axes:
            array = comm.broadcast(array)
        return np.array(array).tobytes()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Evaluate; see `Rows`."""
        with mode_set(self.model, training=False):
            yield

    def run(self, steps: SequenceOf[Step]) -> list[list[Picked]]:
        """Execute the step of this rank's replica; see `Rows`."""
        for step in steps:
            for number in step.ended:
                self._end(number)
            for one in step.admitted:
                self._wants[one.request.id] = one.request.top_logprobs if one.request.logprobs else -1
        step = steps[self.groups.dp.rank]
        for admission in step.admitted:
            self._admit(Served(admission, self._choice(admission.request), self._matcher(admission.request)))
        counts = [sum(row.chooses for batch in one.batches for row in batch) for one in steps]
        tops = [self._wants[row.id] for one in steps for batch in one.batches for row in batch]
        picked = np.zeros((max(counts), 2 + 2 * max(0, *tops, 0)))
        rows = [row for batch in step.batches for row in batch]
        if rows:
            self._forward(rows, picked[: counts[self.groups.dp.rank]])
        if counts[self.groups.dp.rank] and self.groups.pp.size > 1:
            picked = _numbers(self.groups.pp.broadcast(_bits(picked), self._picker))
        self._take(rows, picked)
        if not any(counts):
            return [[] for _ in steps]
        gathered = _numbers(self.groups.dp.all_gather(_bits(picked)[None], 0))
        return [self._unpacked(*one) for one in zip(steps, gathered, counts, strict=True)]

    def _end(self, number: int) -> None:
        text = self._texts.pop(number, None)
        if text is not None and self._blocks is not None:
            self._blocks.end(text)
        self._wants.pop(number, None)
        self._served.pop(number, None)

    def _admit(self, served: Served) -> None:
        admission, size = served.admission, self.layout.block_tokens
        number, text_blocks = admission.request.id, len(admission.blocks) - self.layout.state_blocks
        shared = admission.cached // size
        caches = self._stages.new_caches((text_blocks - shared) * size)
        text = TextCache(caches, admission.blocks[:text_blocks], shared)
        self._served[number], self._texts[number] = served, text
        if self._blocks is not None:
            self._blocks.start(text)

    def _take(self, rows: SequenceOf[Row], picked: Any) -> None:
        """Append the chosen tokens, the same on every rank of the replica."""
        for row, token in zip(_choosing(rows), picked[:, 0].astype(int).tolist(), strict=False):
            if token >= 0:
                self._served[row.id].sequence.tokens.append(token)

    def _unpacked(self, step: Step, picked: Any, count: int) -> list[Picked]:
        found = []
        most = (picked.shape[1] - 2) // 2
        rows = _choosing(row for batch in step.batches for row in batch)
        for row, values in zip(rows, picked[:count].tolist(), strict=True):
            top = max(0, self._wants[row.id])
            names, scores = values[2 : 2 + top], values[2 + most : 2 + most + top]
            pairs = tuple((int(name), score) for name, score in zip(names, scores, strict=True) if name >= 0)
            found.append(Picked(int(values[0]), values[1], pairs))
        return found

    def _forward(self, rows: SequenceOf[Row], picked: Any) -> None:
        """Run rows through the stages, and write what the last one chooses to `picked`."""
        found: list[mx.array] = []
        with local_logits(self.model, self.plan) as split:
            forwards = [forward for row in rows for forward in self._forwards(row)]
            self._stages.run(forwards, found.append, self._keep)
            if found:
                self._pick(mx.concatenate(found), [self._served[row.id] for row in _choosing(rows)], split, picked)

    def _keep(self, forward: Forward) -> None:
        if self._blocks is not None:
            self._blocks.extend(forward.text, len(forward.ids))

    def _forwards(self, row: Row) -> Iterable[Forward]:
        served, text = self._served[row.id], self._texts[row.id]
        length = len(served.sequence.prompt)
        if row.start < length:
            return forwards_of(text, served.ids(row.start, row.count), chooses=row.chooses, length=length)
        if row.start == self._recomputed_beyond:
            text.caches = self._stages.new_caches(len(text.blocks) * self.layout.block_tokens)
            return forwards_of(text, served.ids(0, row.start + 1), chooses=True, length=row.start + 1)
        return forwards_of(text, served.ids(row.start, row.count), chooses=row.chooses)

    def _pick(self, logits: mx.array, served: list[Served], split: Split | None, picked: Any) -> None:
        """Choose the next token of each row, the same on every tensor rank, into `picked`."""
        plain = [i for i, one in enumerate(served) if one.is_plain]
        other = [i for i, one in enumerate(served) if not one.is_plain]
        if plain:
            picked[plain, 0] = np.array(most_likely(logits[mx.array(plain)], split, self.groups.tp))
        tops = [self._wants[one.admission.request.id] for one in served]
        wanting = [i for i, top in enumerate(tops) if top >= 0]
        if not other and not wanting:
            return
        wide = wide_rows(logits)
        columns = None
        if split is not None and logits.shape[-1] != split.size:
            columns = columns_of(split, self.groups.tp)
        if other:
            picked[other, 0] = chosen(wide[other], [served[i] for i in other], columns)
            if columns is None and self.groups.tp.size > 1:
                # All tensor ranks have the same logits; the first rank decides.
                picked[other, 0] = np.array(self.groups.tp.broadcast(mx.array(picked[other, 0].astype(np.int32))))
        if wanting:
            most = max(tops)
            found = log_probabilities(wide[wanting], picked[wanting, 0].astype(int).tolist(), most, columns)
            width = (picked.shape[1] - 2) // 2
            for i, (logprob, top) in zip(wanting, found, strict=True):
                names = [name for name, _ in top] + [-1] * (width - len(top))
                scores = [score for _, score in top] + [0.0] * (width - len(top))
                picked[i, 1:] = [logprob, *names, *scores]


def _bits(numbers: Any) -> mx.array:
    """float64 numbers as bits: not every backend supports 64-bit numbers."""
    return mx.array(np.ascontiguousarray(numbers).view(np.uint32))


def _numbers(bits: mx.array) -> Any:
    """The float64 numbers of `_bits`."""
    return np.array(bits).view(np.float64)


def _choosing(rows: Iterable[Row]) -> Iterable[Row]:
    return (row for row in rows if row.chooses)
