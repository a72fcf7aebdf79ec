"""The torch engine's part of a serving loop: forwards of rows, and the choice of their next tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from partita.errors import PlanError
from partita.generation import Tokenizer
from partita.generation.choice import Choice, settle
from partita.generation.generation_config import end_tokens
from partita.generation.prompts import check_ids
from partita.generation.sample import Columns
from partita.notes import note
from partita.serving import ServeRequest, ServeSettings
from partita.serving.blocks import CacheLayout
from partita.serving.choosing import Served, chosen, log_probabilities
from partita.serving.grammar import Grammars, Matcher
from partita.serving.message import Row, Step
from partita.serving.rows import Picked
from partita.torch.collectives.comm import Work
from partita.torch.generate import _check, generation_of
from partita.torch.layers.decode_matmul import PAYS_AFTER_TOKENS, decoding
from partita.torch.model.block_cache import Pools
from partita.torch.model.head import local_logits, most_likely
from partita.torch.model.modes import mode_set
from partita.torch.model.parts import plan_of
from partita.torch.proof.stages import refuse_undecodable
from partita.torch.serving.adapters import ServedAdapters
from partita.torch.serving.forwards import Alone, BlockForward, Forward, Through
from partita.torch.serving.measure import measure
from partita.torch.transformers_internals import attending_by_row, fixed_positions

MESSAGE_BYTES = 4096
"""The size of a step's message; a longer one is followed by a second message."""

_STEPS, _PICKED = 1 << 21, 1 << 22
"""Tags of messages between stages: steps, and what was chosen. Those with hidden states have lower tags."""


class TorchRows:
    """Runs rows of requests on this rank.

    Attributes:
        layout: The cache of a replica, the same on every rank.
        plan: The plan of the model.
        decides: Whether this is the first rank of its replica.
        replica: The index of the replica.
        depth: The number of steps in flight: one for each stage, if each rank has one.
        tokenizer: The tokenizer.
        adapters: The adapters that requests choose.
    """

    def __init__(
        self, model: nn.Module, settings: ServeSettings, tokenizer: Tokenizer | None, adapters: ServedAdapters
    ) -> None:
        """Measure the model's cache with a few short forwards, and allocate blocks."""
        self.plan, self.groups = plan_of(model)
        refuse_undecodable(model, self.plan)
        _check(model)
        self.model, self.tokenizer, self.adapters = model, tokenizer, adapters
        self.decides = self.groups.tp.rank == self.groups.pp.rank == 0
        self.replica = self.groups.dp.rank
        pp = self.plan.mesh.pp
        is_in_line = [self.plan.stage_rank(stage) for stage in range(self.plan.num_stages)] == list(range(pp))
        self.depth = pp if is_in_line else 1
        self._sent: list[tuple[Tensor, Work]] = []
        self._generation = generation_of(model)
        self._fixed = fixed_positions(model.config)
        self._picker = self.plan.stage_rank(self.plan.loss_stage)
        self._served: dict[int, Served] = {}
        self._slots: dict[int, Tensor] = {}
        self._alone: dict[int, Alone] = {}
        self._wants: dict[int, int] = {}
        self._grammars: Grammars | None = None
        with decoding(model, 1, PAYS_AFTER_TOKENS):
            pass
        self._stages = Through(model)
        self._is_exact = settings.exact_rows
        with self._faster(), mode_set(model, training=False), torch.inference_mode():
            measured = measure(model, self._stages, settings)
        self.layout: CacheLayout = measured.layout
        self._pools: Pools | None = measured.pools
        rows = self.layout.exact_rows
        if 0 < rows < settings.max_sequences and self.decides:
            note(
                f"at most {rows} requests share a forward, because more would change the rounding of each other's answers."
            )

    def settle(self, request: ServeRequest) -> Choice:
        """The request's settings; see `Rows`."""
        choice = self._choice(request)
        self.adapters.check(request.adapter)
        self._matcher(request)
        check_ids([request.prompt], choice, self.tokenizer, self.plan.spec.vocab_size)
        length, new = len(request.prompt), choice.limit(len(request.prompt))
        self.plan.spec.refuse_beyond_positions(length + new - 1, f"a prompt of {length} tokens with {new} new ones")
        if self._fixed is not None and length + new > self._fixed:
            raise PlanError(
                f"a prompt of {length} tokens with {new} new ones is longer than {self._fixed} tokens, from where the model's "
                "rotary frequencies depend on the length of the text, so that it cannot be served beside others. Shorten "
                "it, or use `partita generate`."
            )
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
        """The bytes of the replica's deciding rank; see `Rows`.

        They reach the tensor ranks of the first stage together, and from each its rank of every other stage when that is done
        with the steps before.
        """
        if self.groups.tp.size == self.groups.pp.size == 1:
            return data or b""
        message = self._relay(_words(data or b"", MESSAGE_BYTES))
        size = int(message[0])
        if size > MESSAGE_BYTES - 8:
            message = self._relay(_words(data or b"", 8 + size))
        return message[1:].numpy().tobytes()[:size]

    def _relay(self, words: Tensor) -> Tensor:
        if self.groups.pp.rank:
            self.groups.pp.start_recv_(words, 0, _STEPS).wait()
            return words
        self.groups.tp.broadcast_(words)
        for rank in range(1, self.groups.pp.size):
            self._send(words, rank, _STEPS)
        return words

    def _send(self, tensor: Tensor, to: int, tag: int) -> None:
        """Start sending to another stage, and keep what has not arrived."""
        self._sent = [(kept, work) for kept, work in self._sent if not work.is_completed()]  # type: ignore[attr-defined]
        self._sent.append((tensor, self.groups.pp.start_send(tensor, to, tag)))

    @contextmanager
    def session(self) -> Iterator[None]:
        """Evaluate, without gradients; see `Rows`."""
        by_row = attending_by_row(lambda: self._pools.lengths if self._pools is not None else [])
        exact = by_row if self._is_exact else nullcontext()
        with self._faster(), exact, mode_set(self.model, training=False), torch.inference_mode():
            try:
                yield
            finally:
                self.adapters.choose("")
        for _, work in self._sent:
            work.wait()
        self._sent.clear()

    def _faster(self) -> AbstractContextManager[None]:
        """The products of `generate` for one text, where each row must have its bits."""
        return decoding(self.model, 1, PAYS_AFTER_TOKENS) if self._is_exact else nullcontext()

    def run(self, step: Step) -> Callable[[], list[Picked]]:
        """Execute this rank's part of a step; see `Rows`."""
        for number in step.ended:
            for known in (self._wants, self._served, self._slots, self._alone):
                known.pop(number, None)
        for number, token in step.tokens:
            self._served[number].sequence.tokens.append(token)
            if number in self._alone:
                self._alone[number].advance(token)
        for admission in step.admitted:
            self._admit(Served(admission, self._choice(admission.request), self._matcher(admission.request)))
        rows = list(_choosing(step.batches))
        wants = [self._wants[row.id] for row in rows]
        picked = torch.zeros(len(rows), 2 + 2 * max(0, *wants, 0), dtype=torch.float64)
        arriving: Work | None = None
        is_remote = self.groups.pp.rank != self._picker
        if rows and self.decides and is_remote:
            arriving = self.groups.pp.start_recv_(picked, self._picker, _PICKED)
        if step.batches:
            self._forward(step, picked)
        if rows and not is_remote and self.groups.tp.rank == 0 and self._picker:
            self._send(picked, 0, _PICKED)

        def wait() -> list[Picked]:
            if arriving is not None:
                arriving.wait()
            return _unpacked(picked, wants)

        return wait

    def _admit(self, served: Served) -> None:
        request = served.admission.request
        number = request.id
        self._wants[number] = request.top_logprobs if request.logprobs else -1
        self._served[number] = served
        if self.layout.batched:
            blocks, size = torch.tensor(served.admission.blocks, dtype=torch.int64), self.layout.block_tokens
            self._slots[number] = (blocks[:, None] * size + torch.arange(size)).view(-1)
        else:
            self._alone[number] = Alone(self.model, served.sequence)

    def _forward(self, step: Step, picked: Tensor) -> None:
        """Run the step's batches through the stages, and write what the last one chooses to `picked`."""
        starts = [0]
        for batch in step.batches:
            starts.append(starts[-1] + sum(row.chooses for row in batch))
        sets: dict[str, list[int]] = {}
        for place, batch in enumerate(step.batches):
            sets.setdefault(self._served[batch[0].id].admission.request.adapter, []).append(place)
        for name, places in sets.items():
            self.adapters.choose(name)
            batches = [step.batches[place] for place in places]
            self._run(batches, [picked[starts[place] : starts[place + 1]] for place in places])

    def _run(self, batches: list[tuple[Row, ...]], picked: list[Tensor]) -> None:
        """Run batches of the same adapters through the stages, and write what is chosen in each to its part of `picked`."""
        forwards = [self._batch(batch) for batch in batches]
        with local_logits(self.model) as split:

            def pick(output: Any, place: int) -> None:
                forwards[place].keep_output(output if self.plan.num_stages == 1 else None)
                if any(row.chooses for row in batches[place]):
                    self._pick(output.logits[:, -1], batches[place], split, picked[place])

            self._stages.run(forwards, pick)

    def _batch(self, rows: tuple[Row, ...]) -> Forward:
        if not self.layout.batched:
            return self._alone[rows[0].id]
        ids = [self._served[row.id].ids(row.start, row.count) for row in rows]
        assert self._pools is not None
        return BlockForward(self.model, self._pools, ids, [(self._slots[row.id], row.start) for row in rows])

    def _pick(self, logits: Tensor, rows: tuple[Row, ...], split: Any, picked: Tensor) -> None:
        """Choose the next token of each row that wants one, the same on every tensor rank, into `picked`."""
        places = [place for place, row in enumerate(rows) if row.chooses]
        served = [self._served[rows[place].id] for place in places]
        logits = logits[places] if len(places) < len(rows) else logits
        plain = [i for i, one in enumerate(served) if one.is_plain]
        other = [i for i, one in enumerate(served) if not one.is_plain]
        if plain:
            picked[plain, 0] = most_likely(logits[plain] if other else logits, split, self.groups.tp).cpu().double()
        tops = [self._wants[one.admission.request.id] for one in served]
        if not other and max(tops) < 0:
            return
        wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).cpu().numpy()
        columns = None if split is None else self._columns(split)
        if other:
            picked[other, 0] = self._chosen(wide[other], [served[i] for i in other], columns)
        wanting = [i for i, top in enumerate(tops) if top >= 0]
        if wanting:
            most = max(tops)
            found = log_probabilities(wide[wanting], picked[wanting, 0].long().tolist(), most, columns)
            width = (picked.shape[1] - 2) // 2
            for i, (logprob, top) in zip(wanting, found, strict=True):
                names = [name for name, _ in top] + [-1] * (width - len(top))
                scores = [score for _, score in top] + [0.0] * (width - len(top))
                picked[i, 1:] = torch.tensor([logprob, *names, *scores], dtype=torch.float64)

    def _chosen(self, wide: Any, served: list[Served], columns: Columns | None) -> Tensor:
        if columns is not None or self.groups.tp.size == 1:
            return torch.tensor(chosen(wide, served, columns), dtype=torch.float64)
        # All tensor ranks have the same logits; the first rank decides.
        ids = torch.zeros(len(served), dtype=torch.float64)
        if self.groups.tp.rank == 0:
            ids = torch.tensor(chosen(wide, served, None), dtype=torch.float64)
        return self.groups.tp.broadcast_(ids)

    def _columns(self, split: Any) -> Columns:
        def gather(mine: Any) -> Any:
            return self.groups.tp.all_gather(torch.from_numpy(mine)[None], 0).numpy()

        rank = self.groups.tp.rank
        return Columns(split.ranges(rank)[0][0], max(split.local_sizes), rank, gather)


def _words(data: bytes, size: int) -> Tensor:
    """`data` as int64 words after its length, with room for `size` bytes in all."""
    room = -(-max(size, 8) // 8)
    words = torch.zeros(room, dtype=torch.int64)
    words[0] = len(data)
    part = data[: 8 * (room - 1)]
    words[1:].numpy().view("u1")[: len(part)] = memoryview(part)
    return words


def _unpacked(picked: Tensor, wants: SequenceOf[int]) -> list[Picked]:
    """What each row of `picked` says: the token, its log probability, then the ids and the log probabilities of the top."""
    found = []
    most = (picked.shape[1] - 2) // 2
    for wanted, values in zip(wants, picked.tolist(), strict=True):
        top = max(0, wanted)
        names, scores = values[2 : 2 + top], values[2 + most : 2 + most + top]
        pairs = tuple((int(name), score) for name, score in zip(names, scores, strict=True) if name >= 0)
        found.append(Picked(int(values[0]), values[1], pairs))
    return found


def _choosing(batches: SequenceOf[tuple[Row, ...]]) -> Iterable[Row]:
    return (row for batch in batches for row in batch if row.chooses)
