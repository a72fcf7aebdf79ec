"""The torch engine's part of a serving loop: forwards of rows, and the choice of their next tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partita.core.sharding.experts import why_not_alone
from partita.errors import ModelError, PlanError
from partita.generation import Tokenizer
from partita.generation.choice import Choice
from partita.generation.sample import Array, Columns
from partita.notes import note
from partita.serving import ServeRequest, ServeSettings
from partita.serving.blocks import CacheLayout
from partita.serving.choosing import Served, chosen
from partita.serving.message import Row, Step
from partita.serving.requests import Input
from partita.serving.rows import Picked
from partita.serving.texts import Texts, write_log_probabilities
from partita.torch.generate import _check, _more_inputs, generation_of
from partita.torch.model.block_cache import Pools
from partita.torch.model.head import local_logits, most_likely
from partita.torch.model.modes import mode_set
from partita.torch.model.parts import plan_of
from partita.torch.model.towers import MEDIA, forbidden_media, media_of
from partita.torch.proof.stages import refuse_undecodable
from partita.torch.serving.adapters import ServedAdapters
from partita.torch.serving.context import refuse_context
from partita.torch.serving.forwards import Alone, BlockForward, Forward, Through
from partita.torch.serving.measure import measure
from partita.torch.serving.sharing import shared
from partita.torch.transformers_internals import attending_by_row, fixed_positions


class TorchRows:
    """Runs rows of requests on this rank.

    Attributes:
        layout: The cache of a replica, the same on every rank.
        plan: The plan of the model.
        decides: Whether this is the first rank of its replica.
        replica: The index of the replica.
        tokenizer: The tokenizer.
        adapters: The adapters that requests choose.
    """

    def __init__(
        self, model: nn.Module, settings: ServeSettings, tokenizer: Tokenizer | None, adapters: ServedAdapters
    ) -> None:
        """Measure the model's cache with a few short forwards, and allocate blocks."""
        self.plan, self.groups = plan_of(model)
        if why := why_not_alone(self.plan.mesh):
            raise ModelError(why)
        refuse_undecodable(model, self.plan)
        _check(model)
        refuse_context(model, self.plan, settings)
        self.model, self.tokenizer, self.adapters = model, tokenizer, adapters
        self.decides = self.groups.is_first_of_replica
        self.replica = self.groups.dp.rank
        self._fixed = fixed_positions(model.config)
        self._picker = self.plan.stage_rank(self.plan.loss_stage)
        self._texts = Texts(self.plan, generation_of(model), tokenizer)
        self._slots: dict[int, Tensor] = {}
        self._alone: dict[int, Alone] = {}
        self._stages = Through(model)
        self._is_exact = settings.exact_rows
        with adapters.decoding(), mode_set(model, training=False), torch.inference_mode():
            measured = measure(model, self._stages, settings, adapters)
        self.layout: CacheLayout = measured.layout
        self._pools: Pools | None = measured.pools
        rows = self.layout.exact_rows
        if 0 < rows < settings.max_sequences and self.groups.rank == 0:
            note(
                f"at most {rows} requests share a forward, because more would change the rounding of each other's answers."
            )

    def settle(self, request: ServeRequest) -> Choice:
        """The request's settings; see `Rows`."""
        self.adapters.check(request.adapter)
        if request.inputs and self.groups.cp.size > 1:
            raise PlanError(f"a prompt with {request.inputs[0].name} is not served: {self.no_images}.")
        if request.inputs:
            _more_inputs(self.model, [request.prompt], [_tensors(request.inputs)])
        choice, length = self._texts.settle(request), len(request.prompt)
        new = choice.limit(length)
        if self._fixed is not None and length + new > self._fixed:
            raise PlanError(
                f"a prompt of {length} tokens with {new} new ones is longer than {self._fixed} tokens, from where the model's "
                "rotary frequencies depend on the length of the text, so that it cannot be served beside others. Shorten "
                "it, or use `partita generate`."
            )
        return choice

    @property
    def no_images(self) -> str:
        """Why requests have no images; see `Rows`."""
        if self.groups.cp.size > 1:
            return f"prompts with other inputs than text are not split over ranks (cp={self.groups.cp.size})"
        image = MEDIA[0]
        if image in media_of(self.model):
            return forbidden_media(self.model).get(image.name, "")
        return "this model takes text only"

    def share(self, data: bytes | None) -> bytes:
        """The bytes of the replica's deciding rank; see `Rows`."""
        return shared(self.groups, data)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Evaluate, without gradients; see `Rows`."""
        by_row = attending_by_row(lambda: self._pools.lengths if self._pools is not None else [])
        exact = by_row if self._is_exact else nullcontext()
        with self.adapters.decoding(), exact, mode_set(self.model, training=False), torch.inference_mode():
            try:
                yield
            finally:
                self.adapters.choose("")

    def run(self, step: Step) -> list[Picked]:
        """Execute this rank's part of a step; see `Rows`."""
        for number in step.ended:
            self._texts.end(number)
            self._slots.pop(number, None)
            self._alone.pop(number, None)
        for number, token in step.tokens:
            self._texts.append(number, token)
            if number in self._alone:
                self._alone[number].advance(token)
        for admission in step.admitted:
            self._admit(self._texts.admit(admission))
        rows = step.choosing
        picked = self._texts.blank(rows)
        if step.batches:
            self._forward(step, picked)
        if rows and self.groups.pp.size > 1:
            self.groups.pp.broadcast_(torch.from_numpy(picked), self._picker)
        return self._texts.unpacked(rows, picked)

    def _admit(self, served: Served) -> None:
        number, inputs = served.admission.request.id, served.admission.request.inputs
        if self.layout.batched and not inputs:
            blocks = torch.tensor(served.admission.blocks, dtype=torch.int64)
            size = self.layout.block_tokens // self.groups.cp.size
            self._slots[number] = (blocks[:, None] * size + torch.arange(size)).view(-1)
        else:
            self._alone[number] = Alone(self.model, served.sequence, _tensors(inputs), self._pools)

    def _forward(self, step: Step, picked: Array) -> None:
        """Run the step's batches through the stages, and write what the last one chooses to `picked`."""
        starts = [0]
        for batch in step.batches:
            starts.append(starts[-1] + sum(row.chooses for row in batch))
        sets: dict[str, list[int]] = {}
        for place, batch in enumerate(step.batches):
            sets.setdefault(self._texts[batch[0].id].admission.request.adapter, []).append(place)
        for name, places in sets.items():
            self.adapters.choose(name)
            batches = [step.batches[place] for place in places]
            self._run(batches, [picked[starts[place] : starts[place + 1]] for place in places])

    def _run(self, batches: list[tuple[Row, ...]], picked: list[Array]) -> None:
        """Run batches of the same adapters through the stages, and write what is chosen in each to its part of `picked`."""
        forwards = [self._batch(batch) for batch in batches]
        with local_logits(self.model) as split:

            def pick(output: Any, place: int) -> None:
                forwards[place].keep_output(output if self.plan.num_stages == 1 else None)
                if any(row.chooses for row in batches[place]):
                    logits = self._last_logits(output, forwards[place])
                    if self.groups.cp.rank == 0:
                        self._pick(logits, batches[place], split, picked[place])

            self._stages.run(forwards, pick)

    def _last_logits(self, output: Any, forward: Forward) -> Tensor:
        """The logits of the last token of each row, on the first context parallel rank, which chooses."""
        logits: Tensor = output.logits[:, -1]
        if isinstance(forward, BlockForward) and forward.last:
            return self.groups.cp.broadcast_(logits.contiguous(), forward.last)
        return logits

    def _batch(self, rows: tuple[Row, ...]) -> Forward:
        if rows[0].id in self._alone:
            return self._alone[rows[0].id]
        ids = [self._texts[row.id].ids(row.start, row.count) for row in rows]
        assert self._pools is not None
        return BlockForward(self.model, self._pools, ids, [(self._slots[row.id], row.start) for row in rows])

    def _pick(self, logits: Tensor, rows: tuple[Row, ...], split: Any, picked: Array) -> None:
        """Choose the next token of each row that wants one, the same on every tensor rank, into `picked`."""
        places = [place for place, row in enumerate(rows) if row.chooses]
        served = [self._texts[rows[place].id] for place in places]
        logits = logits[places] if len(places) < len(rows) else logits
        plain = [i for i, one in enumerate(served) if one.is_plain]
        other = [i for i, one in enumerate(served) if not one.is_plain]
        if plain:
            picked[plain, 0] = most_likely(logits[plain] if other else logits, split, self.groups.tp).cpu().numpy()
        if not other and not any(one.admission.request.logprobs for one in served):
            return
        wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).cpu().numpy()
        columns = None if split is None else self._columns(split)
        if other:
            picked[other, 0] = self._chosen(wide[other], [served[i] for i in other], columns)
        write_log_probabilities(picked, wide, served, columns)

    def _chosen(self, wide: Array, served: list[Served], columns: Columns | None) -> list[int]:
        if columns is not None or self.groups.tp.size == 1:
            return chosen(wide, served, columns)
        # All tensor ranks have the same logits; the first rank decides.
        ids = torch.zeros(len(served), dtype=torch.int64)
        if self.groups.tp.rank == 0:
            ids = torch.tensor(chosen(wide, served, None))
        return self.groups.tp.broadcast_(ids).tolist()

    def _columns(self, split: Any) -> Columns:
        def gather(mine: Any) -> Any:
            return self.groups.tp.all_gather(torch.from_numpy(mine)[None], 0).numpy()

        rank = self.groups.tp.rank
        return Columns(split.ranges(rank)[0][0], max(split.local_sizes), rank, gather)


def _tensors(inputs: Sequence[Input]) -> dict[str, Tensor]:
    """Arrays as tensors, by their names."""
    return {one.name: torch.from_numpy(np.frombuffer(one.data, one.dtype).reshape(one.shape).copy()) for one in inputs}
