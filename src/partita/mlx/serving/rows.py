"""The MLX engine's part of a serving loop: forwards of rows, and the choice of their next tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.core.sharding.split import Split
from partita.errors import PlanError
from partita.generation import Tokenizer
from partita.generation.choice import Choice
from partita.generation.sample import Array
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
from partita.serving.choosing import Served, chosen
from partita.serving.message import Row, Step
from partita.serving.rows import Picked
from partita.serving.texts import Texts, write_log_probabilities

MESSAGE_BYTES = 4096
"""The size of a step's broadcast; a longer message is followed by a second one."""


class MlxRows:
    """Runs rows of requests on this rank.

    Attributes:
        layout: The cache of a replica, the same on every rank.
        plan: The plan of the model.
        decides: Whether this is the first rank of its replica.
        replica: The index of the replica.
        tokenizer: The tokenizer.
    """

    def __init__(self, model: nn.Module, settings: ServeSettings, tokenizer: Tokenizer | None) -> None:
        """Measure the model's cache with a few short forwards."""
        self.plan, self.groups = plan_of(model)
        refuse_undecodable(model, self.plan)
        self.model, self.tokenizer = model, tokenizer
        self.decides = self.groups.is_first_of_replica
        self.replica = self.groups.dp.rank
        self._recomputed_beyond = recomputed_beyond(self.plan.spec.config)
        self._picker = self.plan.stage_rank(self.plan.loss_stage)
        self._texts = Texts(self.plan, generation_of(model), tokenizer)
        self._caches: dict[int, TextCache] = {}
        self._stages = Through(model)
        with mode_set(model, training=False):
            measured = measure(model, self._stages, settings)
        self.layout: CacheLayout = measured.layout
        self._blocks = Blocks(settings.block_tokens, forgets=measured.forgets) if self.layout.reused else None

    @property
    def no_images(self) -> str:
        """Why requests have no images; see `Rows`."""
        return "--engine mlx serves text only; serve the model with --engine torch"

    def settle(self, request: ServeRequest) -> Choice:
        """The request's settings; see `Rows`."""
        if request.adapter:
            raise PlanError(
                f"adapter must be empty on MLX, whose models have one set of adapters; got {request.adapter!r:.100}."
            )
        if request.inputs:
            raise PlanError(f"{request.inputs[0].name} is given, but {self.no_images}.")
        choice, length = self._texts.settle(request), len(request.prompt)
        new = choice.limit(length)
        refuse_beyond_window(self.plan.spec, length + new, f"a prompt of {length} tokens with {new} new ones")
        return choice

    def share(self, data: bytes | None) -> bytes:
        """The bytes of the replica's deciding rank, on each of its ranks: along each axis in turn they reach all."""
        data = data or b""
        if not self.groups.axes_of_replica:
            return data
        message = self._broadcast(len(data).to_bytes(8, "little") + data[: MESSAGE_BYTES - 8], MESSAGE_BYTES)
        size = int.from_bytes(message[:8], "little")
        return message[8 : 8 + size] if size <= MESSAGE_BYTES - 8 else self._broadcast(data, size)

    def _broadcast(self, data: bytes, size: int) -> bytes:
        """The first rank's `data`, padded to `size` bytes."""
        array = mx.array(np.frombuffer(data.ljust(size, b"\0"), np.uint8))
        for comm in self.groups.axes_of_replica:
            array = comm.broadcast(array)
        return np.array(array).tobytes()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Evaluate; see `Rows`."""
        with mode_set(self.model, training=False):
            yield

    def run(self, step: Step) -> list[Picked]:
        """Execute this rank's part of a step; see `Rows`."""
        for number in step.ended:
            self._end(number)
        for number, token in step.tokens:
            self._texts.append(number, token)
        for admission in step.admitted:
            self._admit(self._texts.admit(admission))
        rows = [row for batch in step.batches for row in batch]
        picked = self._texts.blank(step.choosing)
        if rows:
            self._forward(rows, picked)
        if len(picked) and self.groups.pp.size > 1:
            picked = _numbers(self.groups.pp.broadcast(_bits(picked), self._picker))
        return self._texts.unpacked(step.choosing, picked)

    def _end(self, number: int) -> None:
        cache = self._caches.pop(number)
        if self._blocks is not None:
            self._blocks.end(cache)
        self._texts.end(number)

    def _admit(self, served: Served) -> None:
        admission, size = served.admission, self.layout.block_tokens
        text_blocks, shared = len(admission.blocks) - self.layout.state_blocks, admission.cached // size
        caches = self._stages.new_caches((text_blocks - shared) * size)
        cache = TextCache(caches, admission.blocks[:text_blocks], shared)
        self._caches[admission.request.id] = cache
        if self._blocks is not None:
            self._blocks.start(cache)

    def _forward(self, rows: SequenceOf[Row], picked: Array) -> None:
        """Run rows through the stages, and write what the last one chooses to `picked`."""
        found: list[mx.array] = []
        with local_logits(self.model, self.plan) as split:
            forwards = [forward for row in rows for forward in self._forwards(row)]
            self._stages.run(forwards, found.append, self._keep)
            if found:
                self._pick(mx.concatenate(found), [self._texts[row.id] for row in rows if row.chooses], split, picked)

    def _keep(self, forward: Forward) -> None:
        if self._blocks is not None:
            self._blocks.extend(forward.text, len(forward.ids))

    def _forwards(self, row: Row) -> Iterable[Forward]:
        served, text = self._texts[row.id], self._caches[row.id]
        length = len(served.sequence.prompt)
        if row.start < length:
            return forwards_of(text, served.ids(row.start, row.count), chooses=row.chooses, length=length)
        if row.start == self._recomputed_beyond:
            text.caches = self._stages.new_caches(len(text.blocks) * self.layout.block_tokens)
            return forwards_of(text, served.ids(0, row.start + 1), chooses=True, length=row.start + 1)
        return forwards_of(text, served.ids(row.start, row.count), chooses=row.chooses)

    def _pick(self, logits: mx.array, served: list[Served], split: Split | None, picked: Array) -> None:
        """Choose the next token of each row, the same on every tensor rank, into `picked`."""
        plain = [i for i, one in enumerate(served) if one.is_plain]
        other = [i for i, one in enumerate(served) if not one.is_plain]
        if plain:
            picked[plain, 0] = np.array(most_likely(logits[mx.array(plain)], split, self.groups.tp))
        if not other and not any(one.admission.request.logprobs for one in served):
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
        write_log_probabilities(picked, wide, served, columns)


def _bits(numbers: Array) -> mx.array:
    """float64 numbers as bits: not every backend supports 64-bit numbers."""
    return mx.array(np.ascontiguousarray(numbers).view(np.uint32))


def _numbers(bits: mx.array) -> Array:
    """The float64 numbers of `_bits`."""
    return np.array(bits).view(np.float64)
