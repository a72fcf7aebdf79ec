"""Generating text with a split model: every rank returns the same tokens."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.sharding.split import Split
from partita.errors import ModelError, PlanError
from partita.generation import Generation, GenerationReport, OnText, Sampling, Sequence, Tokenizer
from partita.generation.choice import Choice, settle
from partita.generation.prompts import Prompts, check_ids, encoded
from partita.generation.report import Batch, report_of
from partita.generation.sample import Columns, choose, failure_of, generator_of
from partita.ranks.liveness import doing
from partita.schedule.fit import forward_only
from partita.torch.collectives.comm import Communicator, Work
from partita.torch.layers.compiled import compiled_parts
from partita.torch.layers.decode_matmul import decoding
from partita.torch.model.cache_buffers import reserve
from partita.torch.model.head import local_logits, most_likely
from partita.torch.model.modes import attributes_at_hand, mode_set
from partita.torch.model.parts import plan_of
from partita.torch.model.sequences import SequenceGroup, arguments_of
from partita.torch.model.towers import refuse_forbidden
from partita.torch.proof.context import prove_generation, refuse_length
from partita.torch.proof.stages import refuse_undecodable
from partita.torch.stages.pipeline import Pipeline
from partita.torch.training.local_step import peak_bytes
from partita.torch.transformers_internals import (
    fixed_positions,
    forget_lengths,
    is_plain_attention,
    is_stateful,
    misplaces_padding,
)

_IDS = 1 << 20
"""First tag of messages with token ids, one per group of sequences; messages with hidden states use lower tags."""


@doing("generating")
def generate(
    model: nn.Module,
    prompts: Prompts,
    sampling: Sampling | None = None,
    *,
    inputs: SequenceOf[Mapping[str, Tensor] | None] | None = None,
    tokenizer: Tokenizer | None = None,
    on_text: OnText | None = None,
    on_report: Callable[[GenerationReport], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; every rank of the run calls it with the same arguments and returns the same.

    Replicas (dp) share the prompts. Where they hold the experts of a layer together (ep), they compute each step together,
    those without prompts too. Context parallel ranks (cp) split each prompt, and each keeps the keys and values of its
    own tokens. With several stages the prompts pass through them in as many groups, so that all stages are busy. A sequence's
    tokens do not depend on how the model is split, nor on the other prompts, beyond the rounding of the dtype.

    Args:
        model: A split causal language model.
        prompts: Texts, or the ids of each, at least one each; lengths may differ.
        sampling: Sampling settings; unset ones come from the model's generation config.
        inputs: For each prompt the model's other inputs, as a transformers processor returns them for this prompt
            alone (`pixel_values`, `image_grid_thw`, `image_sizes`, `token_type_ids`, ...), or None. A prompt with inputs is
            not batched with others.
        tokenizer: Encodes and decodes text (default for prompts that are texts: the one in the folder that the model was loaded
            from; for ids: none, and the text is empty).
        on_text: Called with the prompt's index and new text as it is generated; on the first rank of the run only, and not for
            prompts of other replicas.
        on_report: Called on every rank with the times, the tokens and the peak memory of this call.

    Raises:
        PlanError: A prompt is empty or has an id outside the vocabulary, or texts or `stop` are given without a tokenizer.
        ModelError: The model does not generate, does not accept such inputs, its generation config requests what is not
            supported, or its logits are not finite; the message names the step and the rank.

    Examples:
        >>> model = pt.load("./model", tp=2)
        >>> (generation,) = pt.generate(model, [[7, 8, 9]], pt.Sampling(max_new_tokens=4, ignore_eos=True))
        >>> len(generation.tokens), generation.finish_reason
        (4, 'length')
        >>> (generation,) = pt.generate(model, ["Once"])  # with the tokenizer of the folder
    """
    start_s = time.perf_counter()
    plan, groups = plan_of(model)
    refuse_undecodable(model, plan)
    _check(model)
    prove_generation(model, plan)
    ids, tokenizer = encoded(prompts, tokenizer, getattr(model.config, "_name_or_path", None) or None)
    choice = settle(
        sampling or Sampling(), generation_of(model), tokenizer.eos_ids if tokenizer is not None else frozenset()
    )
    more = _more_inputs(model, ids, inputs)
    if groups.cp.size > 1 and compiled_parts(model):
        raise ModelError(f"compiled layers do not generate with cp={groups.cp.size}. Use cp=1, or do not compile them.")
    if groups.cp.size > 1 and any(more):
        raise ModelError(
            f"prompts with other inputs than text cannot be split over ranks (cp={groups.cp.size}). Use cp=1 for them."
        )
    check_ids(ids, choice, tokenizer, plan.spec.vocab_size, [place for place, one in enumerate(more) if one])
    for length in sorted({len(prompt) for prompt in ids}, reverse=True):
        new = choice.limit(length)
        refuse_length(model, length, groups.cp)
        # The last new token is not fed back to the model.
        plan.spec.refuse_beyond_positions(length + new - 1, f"a prompt of {length} tokens with {new} new ones")
    replicas, replica = groups.dp.size, groups.dp.rank
    listener = on_text if groups.is_first_of_replica and replica == 0 else None
    sequences = [
        Sequence(place, list(prompt), choice.limit(len(prompt)), is_streamed=listener is not None)
        for place, prompt in enumerate(ids)
    ]
    peers = groups.dp if plan.mesh.experts_join_replicas else Communicator.single()
    # Replicas that compute together run as many batches, of as many groups, for as many steps.
    firsts = range(replicas) if peers.size > 1 else [replica]
    shares = [_batches(model, sequences[first::replicas], more, plan.mesh.pp) for first in firsts]
    sequences = sequences[replica::replicas]
    timed: list[Batch] = []
    with mode_set(model, training=False):
        for batches in zip_longest(*shares, fillvalue=[]):
            batch = batches[peers.rank]
            count = max(min(len(one), plan.mesh.pp) for one in batches)
            steps = max(s.limit for one in batches for s in one)
            together = max(1, len(batch) // plan.mesh.pp)
            forget_lengths(model)
            if batch:
                timed.append((time.perf_counter(), batch))
            with decoding(model, together, steps), attributes_at_hand(model), torch.inference_mode():
                _Run(model, batch, choice, tokenizer, listener, more, peers, count, steps).run()
            if any(peers.all_gather_object(any(s.failure for s in batch))):
                break
    mine = {s.place: s.generation(tokenizer) for s in sequences}, failure_of(sequences, plan, replica)
    replies: list[Any] = groups.dp.all_gather_object(mine)
    if failures := [failure for _, failure in replies if failure]:
        raise ModelError(failures[0])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    report = report_of(start_s, timed, peak_bytes(device), groups)
    if on_report is not None:
        on_report(report)
    done = {place: generation for part, _ in replies for place, generation in part.items()}
    return [done[place] for place in range(len(ids))]


def _check(model: nn.Module) -> None:
    """Raise `ModelError` for a model that is no causal language model."""
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ModelError(f"{type(model).__name__} has no language model head, so it cannot generate.")
    if getattr(model.config, "is_encoder_decoder", False) or "MaskedLM" in type(model).__name__:
        raise ModelError(f"{type(model).__name__} is not a causal language model, so it cannot continue a prompt.")


def _more_inputs(
    model: nn.Module,
    prompts: SequenceOf[SequenceOf[int]],
    inputs: SequenceOf[Mapping[str, Tensor] | None] | None,
) -> list[Mapping[str, Tensor]]:
    """The model's inputs beside the ids, for each prompt; usually empty."""
    if inputs is None:
        return [{} for _ in prompts]
    if len(inputs) != len(prompts):
        raise PlanError(f"inputs must have one entry per prompt ({len(prompts)}); got {len(inputs)}.")
    takes = arguments_of(model)
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


def _batches(
    model: nn.Module, sequences: list[Sequence], more: SequenceOf[Mapping[str, Tensor]], pp: int
) -> list[list[Sequence]]:
    """The batches of a replica, of which each passes through `pp` stages in as many groups.

    Prompts with other inputs than text are groups of their own.
    """
    special = [s for s in sequences if more[s.place]]
    plain = _plain_batches(model, [s for s in sequences if not more[s.place]])
    return plain + [special[i : i + pp] for i in range(0, len(special), pp)]


def _plain_batches(model: nn.Module, sequences: list[Sequence]) -> list[list[Sequence]]:
    """Batch all prompts, padded on the left, or one length at a time if padding would change the results."""
    if not sequences:
        return []
    longest = max(len(s.prompt) + s.limit for s in sequences)
    if _can_pad(model, longest):
        return [sequences]
    lengths: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        lengths.setdefault(len(sequence.prompt), []).append(sequence)
    return list(lengths.values())


def _can_pad(model: nn.Module, longest: int) -> bool:
    """Whether padded texts, the longest of `longest` tokens, give the same results in a batch as alone."""
    if "attention_mask" not in arguments_of(model) or is_stateful(model) or misplaces_padding(model):
        return False
    # transformers' plain attention narrows a float64 mask to float32, where a padded row becomes NaN.
    wide = next((p.dtype for p in model.parameters()), None) == torch.float64
    if wide and is_plain_attention(model):
        return False
    # All rows use the rotary frequencies of the longest.
    fixed = fixed_positions(model.config)
    if fixed is not None and longest > fixed:
        return False
    padded = SequenceGroup(model, [Sequence(0, [0], 1), Sequence(1, [0, 0], 1)], torch.device("cpu"), {})
    return {"attention_mask", "position_ids"} <= padded.inputs(0).keys()


class _Run:
    """Generation on one rank. The stage with the loss chooses tokens and sends them to all others.

    Replicas that hold experts together (`peers`) compute every group of every step together. A replica whose group has ended,
    or that has none, computes one token in its place, since the others wait for its experts.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: list[Sequence],
        choice: Choice,
        tokenizer: Tokenizer | None,
        on_text: OnText | None,
        more: SequenceOf[Mapping[str, Tensor]],
        peers: Communicator,
        count: int,
        steps: int,
    ) -> None:
        plan, groups = plan_of(model)
        self.peers, self.count, self.steps = peers, count, steps
        self.model, self.choice, self.tokenizer, self.on_text = model, choice, tokenizer, on_text
        self.pp, self.tp, self.cp = groups.pp, groups.tp, groups.cp
        self.picker = plan.stage_rank(plan.loss_stage)
        self.first = plan.stage_index(self.pp.rank, 0)
        self.has_outputs = plan.num_stages == 1
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        own = min(len(batch), plan.mesh.pp)
        edges = [i * len(batch) // own for i in range(own + 1)] if own else []
        self.groups = [
            SequenceGroup(model, batch[a:b], self.device, more[batch[a].place], groups.cp) for a, b in pairwise(edges)
        ]
        self.substitutes: dict[int, SequenceGroup] = {}
        self.skipped: dict[int, bool] = {}
        self.failed: set[int] = set()
        self.pipeline = Pipeline(model, forward_only(plan, count))
        self.sent: list[tuple[Tensor, Work]] = []
        self.generators = {s.place: generator_of(choice, s.place) for s in batch}
        self.split: Split | None = None
        self.step = 0
        self.failed_step = sys.maxsize

    def run(self) -> None:
        """Continue every sequence to its end."""
        with local_logits(self.model) as self.split:
            for step in range(self.steps):
                self.step = step
                self.substitutes.clear()
                self.skipped.clear()
                self.pipeline.run(
                    lambda stage, place: self._group(place).inputs(stage),
                    self._pick,
                    key=lambda place: tuple(self._group(place).inputs(self.first)["input_ids"].shape),
                    skips=self._is_skipped,
                    keep_cache=self._keep_cache,
                )
                if self.peers.size > 1:
                    if all(self._is_skipped(place) for place in range(self.count)):
                        break
                # All ranks know by now whether the previous step failed.
                elif all(group.is_done for group in self.groups) or self.failed_step < step:
                    break
            for place, group in enumerate(self.groups):
                if group.taken <= self.step and not group.is_done and place not in self.substitutes:
                    self._receive_tokens(place)
        self.pipeline.flush()
        for _, work in self.sent:
            work.wait()

    def _group(self, place: int) -> SequenceGroup:
        """What is computed at `place` in this step."""
        return self.substitutes.get(place) or self.groups[place]

    def _is_skipped(self, place: int) -> bool:
        """Whether nothing is computed at `place` in this step, as the group there has ended on every replica of `peers`."""
        if self.peers.size == 1:
            return self._is_done(place)
        if place not in self.skipped:
            ended = place >= len(self.groups) or self._is_done(place) or place in self.failed
            self.skipped[place] = int(self.peers.all_reduce_(torch.tensor(int(ended)))) == self.peers.size
            if ended:
                self.substitutes[place] = SequenceGroup(
                    self.model, [Sequence(place, [0], 1)], self.device, context=self.cp
                )
        return self.skipped[place]

    def _keep_cache(self, stage: int, place: int, cache: Any) -> None:
        if place in self.substitutes:
            return
        caches = self.groups[place].caches
        if stage not in caches:
            reserve(cache)
        caches[stage] = cache

    def _pick(self, output: Any, place: int) -> None:
        """Choose the next token of each sequence of a group, and send it to the other stages."""
        if place in self.substitutes:
            return
        group = self.groups[place]
        ids = torch.empty(len(group.sequences), dtype=torch.long)
        if self.cp.rank == 0:
            # Of a prompt's parts, that of the first rank has the last token.
            logits = output.logits[:, -1]
            if self.choice.is_plain:
                ids = most_likely(logits, self.split, self.tp).cpu()
            else:
                ids = self._choose(logits, group.sequences).cpu()
        self.cp.broadcast_(ids)
        for rank in range(self.pp.size):
            if rank != self.pp.rank:
                self.sent.append((ids, self.pp.start_send(ids, rank, _IDS + place)))
        self._take(place, ids, output if self.has_outputs else None)

    def _choose(self, logits: Tensor, batch: list[Sequence]) -> Tensor:
        """The next token of each sequence, int64 `[batch]`, the same on every rank."""
        rows = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).cpu().numpy()
        generators = [self.generators[s.place] for s in batch]
        if self.split is not None:
            return torch.tensor(choose(rows, batch, self.choice, generators, self._columns(self.split)))
        # All tensor ranks have the same logits; the first rank decides.
        chosen = torch.zeros(len(batch), dtype=torch.long)
        if self.tp.rank == 0:
            chosen = torch.tensor(choose(rows, batch, self.choice, generators))
        return self.tp.broadcast_(chosen)

    def _columns(self, split: Split) -> Columns:
        def gather(mine: Any) -> Any:
            return self.tp.all_gather(torch.from_numpy(mine)[None], 0).numpy()

        return Columns(split.ranges(self.tp.rank)[0][0], max(split.local_sizes), self.tp.rank, gather)

    def _is_done(self, place: int) -> bool:
        """Whether a group has ended, once the previous step's tokens are known."""
        group = self.groups[place]
        if group.taken < self.step and not group.is_done and place not in self.failed:
            self._receive_tokens(place)
        return group.is_done

    def _receive_tokens(self, place: int) -> None:
        """Receive the tokens that the last stage chose for a group."""
        group = self.groups[place]
        ids = torch.empty(len(group.sequences), dtype=torch.long)
        self.pp.start_recv_(ids, self.picker, _IDS + place).wait()
        self._take(place, ids)

    def _take(self, place: int, ids: Tensor, output: Any = None) -> None:
        group = self.groups[place]
        group.go_on(ids, output)
        if bool((ids < 0).any()):
            self.failed.add(place)
            self.failed_step = min(self.failed_step, group.taken - 1)
        for sequence, token in zip(group.sequences, ids.tolist(), strict=True):
            if not sequence.finish_reason:
                sequence.accept(token, self.choice, self.tokenizer)
                sequence.show(self.on_text, self.choice.stop)


def generation_of(model: nn.Module) -> dict[str, Any]:
    """A model's generation settings by transformers' names, without those that are null."""
    config = getattr(model, "generation_config", None)
    return {name: value for name, value in config.to_dict().items() if value is not None} if config is not None else {}
