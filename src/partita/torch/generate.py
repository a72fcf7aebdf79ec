"""Generating text with a split model: every rank returns the same tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from partita.errors import ModelError, PlanError
from partita.torch.apply import plan_of
from partita.torch.comm import Communicator
from partita.torch.head import likeliest, local_logits
from partita.torch.tokenizer import Tokenizer

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: After how many tokens a sequence ends at the latest.
        temperature: Divides the logits; 0 takes the likeliest token every time.
        top_k: Only so many of the likeliest; 0 for all.
        top_p: Only the likeliest that have this probability together (nucleus sampling: Holtzman et al. 2020, 1904.09751).
        min_p: Only those at least so likely as this fraction of the likeliest (2407.01082).
        repetition_penalty: Divides the logits of tokens that were there already (Keskar et al. 2019, 1909.05858); 1 for none.
        seed: Each sequence draws from its own generator of this seed and its place among the prompts.
        stop: A sequence ends before the first of these texts.
        ignore_eos: Whether a sequence goes on after an end token.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", type(self.max_new_tokens) is int and self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", type(self.top_k) is int and self.top_k >= 0, "at least 0 (0 for all)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0 (1 for none)"),
        )
        for name, ok, rule in rules:
            if not ok:
                raise PlanError(f"{name} must be {rule}, but is {getattr(self, name)!r}.")
        if "" in self.stop:
            raise PlanError("stop must hold texts of at least one character.")


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt: tokens and their text, and why it ended (`eos`, `stop` or `length`)."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass
class _Sequence:
    """One sequence under way."""

    place: int
    prompt: list[int]
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    shown: int = 0
    finish_reason: str = ""


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    tokenizer: Tokenizer | None = None,
    on_text: OnText | None = None,
) -> list[Generation]:
    """Continue every prompt; every rank of the run calls it with the same arguments and returns the same.

    Replicas (dp) share the prompts. A sequence's tokens do not depend on how the model is split, nor on the other prompts,
    beyond the rounding of the dtype.

    Args:
        model: A split causal language model.
        prompts: Ids of each prompt, at least one each; they may be of different lengths.
        sampling: How tokens are chosen.
        tokenizer: Makes the text; without one the text is empty.
        on_text: Told of new text as it comes, with the prompt's place; on the first rank of the run only, and not for
            prompts of other replicas.

    Raises:
        PlanError: A prompt is empty or holds an id that the model has not, or `stop` is given without a tokenizer.
        ModelError: The model does not generate.
    """
    plan, groups = plan_of(model)
    _check(model, prompts, sampling, tokenizer, plan.spec.vocab_size)
    replicas, replica = groups.dp.world_size, groups.dp.rank
    sequences = [
        _Sequence(place, list(prompt), torch.Generator().manual_seed(sampling.seed * 1_000_003 + place))
        for place, prompt in enumerate(prompts)
        if place % replicas == replica
    ]
    listener = on_text if groups.mp.rank == 0 and replica == 0 else None
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in _batches(model, sequences):
            _run(model, batch, sampling, tokenizer, groups.mp.comm, _eos_ids(model, tokenizer, sampling), listener)
    model.train(was_training)
    done = {s.place: Generation(tuple(s.tokens), s.text, s.finish_reason) for s in sequences}
    for other in groups.dp.comm.all_gather_object(done):
        done.update(other)  # type: ignore[call-overload]
    return [done[place] for place in range(len(prompts))]


def _check(
    model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, tokenizer: Tokenizer | None, vocab_size: int
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
        strange = [i for i in prompt if not 0 <= i < (vocab_size or 1 << 62)]
        if strange:
            raise PlanError(f"prompt {place} holds the id {strange[0]}, but the model has ids 0 to {vocab_size - 1}.")
    if sampling.stop and tokenizer is None:
        raise PlanError("stop needs a tokenizer to see the text.")


def _batches(model: nn.Module, sequences: list[_Sequence]) -> list[list[_Sequence]]:
    """All at once, padded on the left; one length at a time where the model cannot be told of padding."""
    if not sequences:
        return []
    takes = inspect.signature(model.forward).parameters
    if "attention_mask" in takes and not getattr(model, "_is_stateful", False):
        return [sequences]
    lengths: dict[int, list[_Sequence]] = {}
    for sequence in sequences:
        lengths.setdefault(len(sequence.prompt), []).append(sequence)
    return list(lengths.values())


def _run(
    model: nn.Module,
    batch: list[_Sequence],
    sampling: Sampling,
    tokenizer: Tokenizer | None,
    comm: Communicator,
    eos_ids: frozenset[int],
    on_text: OnText | None,
) -> None:
    device = next(model.parameters()).device
    takes = inspect.signature(model.forward).parameters
    longest = max(len(s.prompt) for s in batch)
    pads = torch.tensor([longest - len(s.prompt) for s in batch])
    ids = torch.tensor([[s.prompt[0]] * (longest - len(s.prompt)) + s.prompt for s in batch], device=device)
    columns = torch.arange(longest)
    mask = (columns >= pads.unsqueeze(1)).long().to(device)
    positions = (columns - pads.unsqueeze(1)).clamp(min=0).to(device)
    padded = bool(pads.any())
    processors = _processors(sampling)
    greedy = sampling.temperature == 0 and not processors
    cache: Any = None
    for step in range(sampling.max_new_tokens):
        given: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if padded:
            given["attention_mask"] = mask
        if "position_ids" in takes:
            given["position_ids"] = positions
        if "logits_to_keep" in takes:
            given["logits_to_keep"] = 1
        with local_logits(model) if greedy else nullcontext() as split:
            output = model(**given)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise ModelError(f"{type(model).__name__} gives back no cache, so it cannot generate token by token.")
        logits = output.logits[:, -1]
        chosen = likeliest(logits, split, comm) if greedy else _choose(logits, batch, sampling, processors, comm)
        tokens = chosen.tolist()
        for sequence, token in zip(batch, tokens, strict=True):
            if not sequence.finish_reason:
                _accept(sequence, token, sampling, tokenizer, eos_ids, last=step == sampling.max_new_tokens - 1)
                _show(sequence, on_text)
        if all(s.finish_reason for s in batch):
            return
        ids = chosen.view(-1, 1).to(device)
        positions = positions[:, -1:] + 1
        if padded:
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], 1)


def _processors(sampling: Sampling) -> list[Any]:
    """transformers' own logits processors, in its order."""
    from transformers.generation import logits_process as hf

    made: list[Any] = []
    if sampling.repetition_penalty != 1.0:
        made.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        if sampling.temperature != 1.0:
            made.append(hf.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            made.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            made.append(hf.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0.0:
            made.append(hf.MinPLogitsWarper(sampling.min_p))
    return made


def _choose(
    logits: Tensor, batch: list[_Sequence], sampling: Sampling, processors: list[Any], comm: Communicator
) -> Tensor:
    """The next token of each sequence, int64 `[batch]`.

    All ranks have the same logits, bit for bit, so the likeliest token needs no word between them. A draw is made by the
    first rank alone, for all.
    """
    greedy = sampling.temperature == 0
    if not greedy and comm.rank > 0:
        return comm.broadcast_(torch.empty(len(batch), dtype=torch.long, device=logits.device))
    chosen = []
    for row, sequence in zip(logits, batch, strict=True):
        seen = torch.tensor([sequence.prompt + sequence.tokens], device=logits.device)
        scores = row.float().unsqueeze(0) if row.dtype != torch.float64 else row.unsqueeze(0)
        for processor in processors:
            scores = processor(seen, scores)
        if greedy:
            chosen.append(scores.argmax(-1))
        else:
            probabilities = scores.softmax(-1).cpu()
            chosen.append(torch.multinomial(probabilities, 1, generator=sequence.generator).view(1).to(logits.device))
    picked = torch.cat(chosen)
    return picked if greedy else comm.broadcast_(picked)


def _accept(
    sequence: _Sequence,
    token: int,
    sampling: Sampling,
    tokenizer: Tokenizer | None,
    eos_ids: frozenset[int],
    *,
    last: bool,
) -> None:
    sequence.tokens.append(token)
    if tokenizer is not None:
        sequence.text = tokenizer.decode(sequence.tokens)
        ends = [sequence.text.find(stop) for stop in sampling.stop if stop in sequence.text]
        if ends:
            sequence.text, sequence.finish_reason = sequence.text[: min(ends)], "stop"
            return
    if token in eos_ids:
        sequence.finish_reason = "eos"
    elif last:
        sequence.finish_reason = "length"


def _show(sequence: _Sequence, on_text: OnText | None) -> None:
    """Pass on the text that is certain: all but a character whose bytes are not all there yet."""
    if on_text is None:
        return
    certain = sequence.text if sequence.finish_reason else sequence.text.rstrip("\ufffd")
    if len(certain) > sequence.shown:
        on_text(sequence.place, certain[sequence.shown :])
        sequence.shown = len(certain)


def _eos_ids(model: nn.Module, tokenizer: Tokenizer | None, sampling: Sampling) -> frozenset[int]:
    if sampling.ignore_eos:
        return frozenset()
    ids: set[int] = set(tokenizer.eos_ids) if tokenizer is not None else set()
    for config in (getattr(model, "generation_config", None), model.config):
        named = getattr(config, "eos_token_id", None)
        ids.update([named] if isinstance(named, int) else named or [])
    return frozenset(ids)
