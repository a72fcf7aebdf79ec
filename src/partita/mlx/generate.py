"""Generating text with a split model: every rank returns the same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.errors import ModelError
from partita.generation.choice import settle
from partita.generation.generation_config import generation_of_config
from partita.generation.prompts import Prompts, check_ids, encoded
from partita.generation.report import Batch, GenerationReport, report_of
from partita.generation.sample import failure_of
from partita.generation.settings import Generation, OnText, Sampling, Sequence
from partita.generation.tokenizer import Tokenizer
from partita.mlx.model.modes import mode_set
from partita.mlx.model.parts import plan_of
from partita.mlx.model.sliding_window import refuse_beyond_window
from partita.mlx.proof.stages import refuse_undecodable
from partita.mlx.stages.batches import Batches
from partita.mlx.stages.flow import Flow
from partita.ranks.liveness import doing
from partita.ranks.memory import peak_resident_bytes


@doing("generating")
def generate(
    model: nn.Module,
    prompts: Prompts,
    sampling: Sampling | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    on_text: OnText | None = None,
    on_report: Callable[[GenerationReport], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; every rank of the run calls it with the same arguments and returns the same.

    Replicas (dp) share the prompts. With several stages, prompts of one length pass through them in as many groups,
    so that all stages are busy, and a long prompt passes in consecutive parts. A sequence's tokens do not depend on how the
    model is split, nor on the other prompts, beyond the rounding of the dtype: prompts of one length are batched, other
    lengths follow.

    Args:
        model: A split causal language model.
        prompts: Texts, or the ids of each, at least one each; lengths may differ.
        sampling: Sampling settings; unset ones come from the model's generation config.
        tokenizer: Encodes and decodes text (default for prompts that are texts: the one in the folder that the model was loaded
            from; for ids: none, and the text is empty).
        on_text: Called with the prompt's index and new text as it is generated; on the first rank of the run only, and not for
            prompts of other replicas.
        on_report: Called on every rank with the times, the tokens and the peak memory of this call.

    Raises:
        PlanError: A prompt is empty or has an id outside the vocabulary, or texts or `stop` are given without a tokenizer.
        ModelError: The model was not split by Partita, or has no cache; or a prompt with its new tokens is longer than a
            sliding window that mlx-lm ignores; or logits are not finite: the message names the step and the rank.

    Examples:
        >>> model = pm.load("./model", tp=2)
        >>> (generation,) = pm.generate(model, [[7, 8, 9]], pm.Sampling(max_new_tokens=4, ignore_eos=True))
        >>> len(generation.tokens), generation.finish_reason
        (4, 'length')
        >>> (generation,) = pm.generate(model, ["Once"])  # with the tokenizer of the folder
    """
    start_s = time.perf_counter()
    plan, groups = plan_of(model)
    refuse_undecodable(model, plan)
    ids, tokenizer = encoded(prompts, tokenizer, model.partita_origin.folder)
    choice = settle(
        sampling or Sampling(), generation_of(model), tokenizer.eos_ids if tokenizer is not None else frozenset()
    )
    check_ids(ids, choice, tokenizer, plan.spec.vocab_size)
    for length in sorted({len(prompt) for prompt in ids}, reverse=True):
        new = choice.limit(length)
        # The last new token is not fed back to the model.
        plan.spec.refuse_beyond_positions(length + new - 1, f"a prompt of {length} tokens with {new} new ones")
        refuse_beyond_window(plan.spec, length + new, f"a prompt of {length} with {new} new ones")
    listener = on_text if groups.rank == 0 else None
    sequences = [
        Sequence(place, list(prompt), choice.limit(len(prompt)), is_streamed=listener is not None)
        for place, prompt in enumerate(ids)
        if place % groups.dp.size == groups.dp.rank
    ]
    lengths: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        lengths.setdefault(len(sequence.prompt), []).append(sequence)
    kind = Batches if plan.num_stages == 1 else Flow
    run = kind(model, plan, groups, choice, tokenizer, listener)
    timed: list[Batch] = []
    with mode_set(model, training=False):
        for batch in lengths.values():
            timed.append((time.perf_counter(), batch))
            run.batch(batch)
            if any(s.failure for s in batch):
                break
    made = [(s.place, s.generation(tokenizer)) for s in sequences]
    done = [[place, list(one.tokens), one.text, one.finish_reason] for place, one in made]
    replies: list[Any] = groups.dp.all_gather_object([done, failure_of(sequences, plan, groups.dp.rank)])
    if failures := [failure for _, failure in replies if failure]:
        raise ModelError(failures[0])
    # On a CPU MLX counts only its own arrays.
    peak_bytes = peak_resident_bytes() if mx.default_device() == mx.cpu else mx.get_peak_memory()
    report = report_of(start_s, timed, peak_bytes, groups)
    if on_report is not None:
        on_report(report)
    found = {
        place: Generation(tuple(tokens), text, reason) for part, _ in replies for place, tokens, text, reason in part
    }
    return [found[place] for place in range(len(ids))]


def generation_of(model: nn.Module) -> Mapping[str, Any]:
    """A model's generation settings by transformers' names: its checkpoint's, else its config's."""
    read = model.partita_origin.generation
    return generation_of_config(plan_of(model)[0].spec.config) if read is None else read
