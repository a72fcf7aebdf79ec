"""Generating text with a split model: every rank returns the same tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from collections.abc import Set as SetOf
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.core.split import Split
from partita.errors import ModelError, PlanError
from partita.peers import doing
from partita.schedule import Action, Kind, Schedule
from partita.text import Generation, OnText, Sampling, Sequence, Tokenizer
from partita.text.choice import Choice, settle
from partita.text.choose import Columns, choose, generator_of
from partita.torch.apply import plan_of
from partita.torch.balance import SWITCH, asks_for_balance
from partita.torch.comm import Work
from partita.torch.few_rows import decoding
from partita.torch.head import likeliest, local_logits
from partita.torch.pipeline import Pipeline
from partita.torch.stage_probe import refuse_undecodable
from partita.torch.towers import refuse_forbidden
from partita.torch.transformers_internals import cache_argument, first_positions, is_plain_attention, is_stateful

_IDS = 1 << 20
"""Tags of messages with token ids begin here, one a group of sequences, apart from those with hidden states."""


@doing("generating")
def generate(
    model: nn.Module,
    prompts: SequenceOf[SequenceOf[int]],
    sampling: Sampling,
    *,
    inputs: SequenceOf[Mapping[str, Tensor] | None] | None = None,
    tokenizer: Tokenizer | None = None,
    on_text: OnText | None = None,
) -> list[Generation]:
    """Continue every prompt; every rank of the run calls it with the same arguments and returns the same.

    Replicas (dp) share the prompts. Where there are several stages the prompts go through them in as many groups, so that all
    stages work. A sequence's tokens do not depend on how the model is split, nor on the other prompts,
    beyond the rounding of the dtype.

    Args:
        model: A split causal language model.
        prompts: Ids of each prompt, at least one each; they may be of different lengths.
        sampling: How tokens are chosen; what it leaves open is taken from the model's generation config.
        inputs: For each prompt what else the model is called with, as a processor of transformers gives it for this prompt
            alone (`pixel_values`, `image_grid_thw`, `image_sizes`, `token_type_ids`, ...), or None. A prompt with inputs is
            computed by itself, not in a batch with others.
        tokenizer: Makes the text; without one the text is empty.
        on_text: Told of new text as it comes, with the prompt's place; on the first rank of the run only, and not for
            prompts of other replicas.

    Raises:
        PlanError: A prompt is empty or holds an id that the model has not, or `stop` is given without a tokenizer.
        ModelError: The model does not generate, does not take such inputs, or its generation config asks for what is not
            supported.
    """
    plan, groups = plan_of(model)
    refuse_undecodable(model, plan)
    choice = settle(sampling, generation_of(model), tokenizer.eos_ids if tokenizer is not None else frozenset())
    more = _more_inputs(model, prompts, inputs)
    _check(model, prompts, choice, tokenizer, plan.spec.vocab_size, more)
    for length in sorted({len(prompt) for prompt in prompts}, reverse=True):
        new = choice.limit(length)
        # What the last new token would lead to is not asked for.
        plan.spec.refuse_beyond_positions(length + new - 1, f"a prompt of {length} tokens with {new} new ones")
    replicas, replica = groups.dp.world_size, groups.dp.rank
    sequences = [
        Sequence(place, list(prompt), choice.limit(len(prompt)))
        for place, prompt in enumerate(prompts)
        if place % replicas == replica
    ]
    listener = on_text if groups.mp.rank == groups.pp.rank == replica == 0 else None
    was_training = model.training
    model.eval()
    plain = [s for s in sequences if not more[s.place]]
    special = [s for s in sequences if more[s.place]]
    alone = [special[i : i + plan.mesh.pp] for i in range(0, len(special), plan.mesh.pp)]
    for batch in _batches(model, plain) + alone:
        together = max(1, len(batch) // plan.mesh.pp)
        with decoding(model, together, max(s.limit for s in batch)), torch.inference_mode():
            _Run(model, batch, choice, tokenizer, listener, more).run()
    model.train(was_training)
    done = {s.place: s.generation for s in sequences}
    for other in groups.dp.comm.all_gather_object(done):
        done.update(other)  # type: ignore[call-overload]
    return [done[place] for place in range(len(prompts))]


def _check(
    model: nn.Module,
    prompts: SequenceOf[SequenceOf[int]],
    choice: Choice,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    more: SequenceOf[Mapping[str, Tensor]],
) -> None:
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ModelError(f"{type(model).__name__} has no language model head, so it cannot generate.")
    if getattr(model.config, "is_encoder_decoder", False) or "MaskedLM" in type(model).__name__:
        raise ModelError(f"{type(model).__name__} is no causal language model, so it cannot continue a prompt.")
    if not prompts:
        raise PlanError("prompts must hold at least one prompt.")
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise PlanError(f"prompt {place} is empty: it must have at least one token.")
        if not all(isinstance(i, int) for i in prompt):
            raise PlanError(f"prompt {place} must be ids, but is {prompt!r:.60}. tokenizer.encode(text) makes them.")
        strange = [i for i in prompt if not 0 <= i < (vocab_size or 1 << 62)]
        # An id that stands for an image may be none of the vocabulary's.
        if strange and not more[place]:
            raise PlanError(f"prompt {place} holds the id {strange[0]}, but the model has ids 0 to {vocab_size - 1}.")
    strange = [i for i, _ in choice.logit_bias if not 0 <= i < (vocab_size or 1 << 62)]
    if strange:
        raise PlanError(f"logit_bias names the id {strange[0]}, but the model has ids 0 to {vocab_size - 1}.")
    if choice.stop and tokenizer is None:
        raise PlanError("stop needs a tokenizer to see the text.")


def _more_inputs(
    model: nn.Module,
    prompts: SequenceOf[SequenceOf[int]],
    inputs: SequenceOf[Mapping[str, Tensor] | None] | None,
) -> list[Mapping[str, Tensor]]:
    """What each prompt gives the model beside its ids; nothing for most."""
    if inputs is None:
        return [{} for _ in prompts]
    if len(inputs) != len(prompts):
        raise PlanError(f"inputs must have one entry a prompt ({len(prompts)}), but has {len(inputs)}.")
    takes = _takes(model)
    more: list[Mapping[str, Tensor]] = []
    for place, given in enumerate(inputs):
        kept = {k: v for k, v in (given or {}).items() if k not in ("input_ids", "attention_mask")}
        strange = sorted(kept.keys() - takes)
        if strange:
            raise ModelError(
                f"prompt {place} comes with {strange[0]}, which {type(model).__name__} does not take. It takes "
                f"{', '.join(sorted(takes - {'self', 'kwargs'}))}."
            )
        refuse_forbidden(model, kept)
        more.append(kept)
    return more


def _batches(model: nn.Module, sequences: list[Sequence]) -> list[list[Sequence]]:
    """All at once, padded on the left; one length at a time where the model cannot be told of padding."""
    if not sequences:
        return []
    # The plain attention of transformers narrows a float64 mask to float32, where a padded row becomes not a number.
    wide = next((p.dtype for p in model.parameters()), None) == torch.float64
    overflows = wide and is_plain_attention(model)
    if "attention_mask" in _takes(model) and not is_stateful(model) and not overflows:
        return [sequences]
    lengths: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        lengths.setdefault(len(sequence.prompt), []).append(sequence)
    return list(lengths.values())


def _takes(model: nn.Module) -> SetOf[str]:
    return inspect.signature(type(model).forward).parameters.keys()


class _Group:
    """Sequences that go through the pipeline together, and what the model is called with next."""

    def __init__(
        self, model: nn.Module, sequences: list[Sequence], device: torch.device, more: Mapping[str, Tensor]
    ) -> None:
        self.sequences = sequences
        self.takes, self.cache_name = _takes(model), cache_argument(model)
        self.asks_for_balance = asks_for_balance(model)
        longest = max(len(s.prompt) for s in sequences)
        pads = torch.tensor([longest - len(s.prompt) for s in sequences])
        self.ids = torch.tensor(
            [[s.prompt[0]] * (longest - len(s.prompt)) + s.prompt for s in sequences], device=device
        )
        columns = torch.arange(longest)
        self.mask = (columns >= pads.unsqueeze(1)).long().to(device)
        self.positions = (columns - pads.unsqueeze(1)).clamp(min=0).to(device)
        self.is_padded = bool(pads.any())
        self.more = {name: value.to(device) for name, value in more.items()}
        if more:
            self.positions = first_positions(model, self.ids, self.mask, self.more, self.positions)
        self.caches: dict[int, Any] = {}
        self.taken = 0

    def inputs(self, stage: int) -> dict[str, Any]:
        """What the model is called with at `stage`."""
        given: dict[str, Any] = {
            "input_ids": self.ids, self.cache_name: self.caches.get(stage), "use_cache": True,
        }  # fmt: skip
        if self.is_padded:
            given["attention_mask"] = self.mask
        if self.asks_for_balance:
            given[SWITCH] = False
        if "position_ids" in self.takes:
            given["position_ids"] = self.positions
        if "logits_to_keep" in self.takes:
            given["logits_to_keep"] = 1
        return {**given, **self.more}

    def go_on(self, chosen: Tensor) -> None:
        """Take up the next token of each sequence, `[sequences]`."""
        self.taken += 1
        self.ids = chosen.view(-1, 1).to(self.ids.device)
        self.positions = self.positions[..., -1:] + 1
        self.more = {}
        if self.is_padded:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.sequences), 1)], 1)

    @property
    def is_done(self) -> bool:
        """Whether every sequence has ended."""
        return all(s.finish_reason for s in self.sequences)


class _Run:
    """Sequences under way on one rank. The stage with the loss picks tokens, all others are told of them."""

    def __init__(
        self,
        model: nn.Module,
        batch: list[Sequence],
        choice: Choice,
        tokenizer: Tokenizer | None,
        on_text: OnText | None,
        more: SequenceOf[Mapping[str, Tensor]],
    ) -> None:
        plan, groups = plan_of(model)
        self.model, self.choice, self.tokenizer, self.on_text = model, choice, tokenizer, on_text
        self.pp, self.tp = groups.pp.comm, groups.mp.comm
        self.picker = plan.stage_rank(plan.loss_stage)
        self.stages = {plan.stage_index(self.pp.rank, vpp): plan.stage(self.pp.rank, vpp) for vpp in range(plan.vpp)}
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        count = min(len(batch), plan.mesh.pp)
        edges = [i * len(batch) // count for i in range(count + 1)]
        self.groups = [_Group(model, batch[a:b], device, more[batch[a].place]) for a, b in pairwise(edges)]
        self.pipeline = Pipeline(model, _forward_only(plan, count))
        self.sent: list[tuple[Tensor, Work]] = []
        self.generators = {s.place: generator_of(choice, s.place) for s in batch}
        self.split: Split | None = None
        self.step = 0

    def run(self) -> None:
        """Continue every sequence to its end."""
        with local_logits(self.model) as self.split:
            for step in range(max(s.limit for group in self.groups for s in group.sequences)):
                self.step = step
                self.pipeline.run(
                    lambda stage, place: self.groups[place].inputs(stage),
                    self._pick,
                    key=lambda place: tuple(self.groups[place].ids.shape),
                    skips=self._is_done,
                    keep_cache=self._keep_cache,
                )
                if self.step == 0:
                    self._check_caches()
                if all(group.is_done for group in self.groups):
                    break
            for place, group in enumerate(self.groups):
                if not group.is_done:
                    self._hear(place)
        self.pipeline.flush()
        for _, work in self.sent:
            work.wait()

    def _keep_cache(self, stage: int, place: int, cache: Any) -> None:
        self.groups[place].caches[stage] = cache

    def _check_caches(self) -> None:
        for index, stage in self.stages.items():
            if stage.layers and index not in self.groups[0].caches:
                raise ModelError(
                    f"{type(self.model).__name__} gives back no cache, so it cannot generate token by token."
                )

    def _pick(self, output: Any, place: int) -> None:
        """Choose the next token of each sequence of a group, and tell the other stages."""
        group = self.groups[place]
        logits = output.logits[:, -1]
        if self.choice.is_plain:
            chosen = likeliest(logits, self.split, self.tp)
        else:
            chosen = self._choose(logits, group.sequences)
        ids = chosen.cpu()
        for rank in range(self.pp.size):
            if rank != self.pp.rank:
                self.sent.append((ids, self.pp.start_send(ids, rank, _IDS + place)))
        self._take(group, ids)

    def _choose(self, logits: Tensor, batch: list[Sequence]) -> Tensor:
        """The next token of each sequence, int64 `[batch]`, the same on every rank."""
        rows = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).cpu().numpy()
        generators = [self.generators[s.place] for s in batch]
        if self.split is not None:
            return torch.tensor(choose(rows, batch, self.choice, generators, self._columns(self.split)))
        # All tensor ranks have the same logits; the first one's word counts.
        chosen = torch.zeros(len(batch), dtype=torch.long)
        if self.tp.rank == 0:
            chosen = torch.tensor(choose(rows, batch, self.choice, generators))
        return self.tp.broadcast_(chosen)

    def _columns(self, split: Split) -> Columns:
        def gather(mine: Any) -> Any:
            return self.tp.all_gather(torch.from_numpy(mine)[None], 0).numpy()

        return Columns(split.ranges(self.tp.rank)[0][0], max(split.local_sizes), self.tp.rank, gather)

    def _is_done(self, place: int) -> bool:
        """Whether a group has ended, its tokens of the step before being known."""
        group = self.groups[place]
        if group.taken < self.step and not group.is_done:
            self._hear(place)
        return group.is_done

    def _hear(self, place: int) -> None:
        """Take up the tokens that the last stage picked for a group."""
        group = self.groups[place]
        ids = torch.empty(len(group.sequences), dtype=torch.long)
        self.pp.start_recv_(ids, self.picker, _IDS + place).wait()
        self._take(group, ids)

    def _take(self, group: _Group, ids: Tensor) -> None:
        group.go_on(ids)
        for sequence, token in zip(group.sequences, ids.tolist(), strict=True):
            if not sequence.finish_reason:
                sequence.accept(token, self.choice, self.tokenizer)
                sequence.show(self.on_text, self.choice.stop)


def _forward_only(plan: Plan, count: int) -> Schedule:
    """Each rank runs its stages in turn, each for all `count` groups."""
    pp, places = plan.mesh.pp, range(count)
    rows = ([Action(plan.stage_index(r, v), Kind.F, g) for v in range(plan.vpp) for g in places] for r in range(pp))
    return Schedule(tuple(map(tuple, rows)))


def generation_of(model: nn.Module) -> dict[str, Any]:
    """A model's generation settings by transformers' names, without those that are null."""
    config = getattr(model, "generation_config", None)
    return {name: value for name, value in config.to_dict().items() if value is not None} if config is not None else {}
