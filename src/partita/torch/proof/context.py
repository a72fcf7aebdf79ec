"""Context parallelism before use: a small model of the family on parts of its sequences, against the same on whole ones."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.errors import ModelError, PartitaError
from partita.generation import Sequence
from partita.proof.differences import SMALL
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.threads import run_as_threads
from partita.torch.model.balance import SWITCH, asks_for_balance
from partita.torch.model.context import Context, context_of, split_context
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.sequences import SequenceGroup, arguments_of
from partita.torch.proof.compare import relative_error
from partita.torch.proof.family import describe_error, sample_inputs, small_model
from partita.torch.transformers_internals import attention_of, cache_of, fixed_positions, forget_lengths, is_stateful

TOLERANCE = 1e-11
"""Largest difference in float64, relative to the largest magnitude: far above rounding, far below any mistake."""

NEW_TOKENS = 5
"""Tokens after each prompt of the small model: more than its ranks, so that each keeps some."""

MOST_RANKS = 4
"""Ranks of the small model: more would need longer sequences and show nothing else."""


def prove_context(model: nn.Module, plan: Plan, *, packing: bool = False) -> None:
    """Measure on a small random model whether its family computes parts of sequences correctly.

    Raises:
        ModelError: It does not: something besides its attention mixes tokens, or its attention is not transformers' interface.
    """
    why = _reason(model, plan, _measured_packed if packing else _measured_plain)
    if why:
        raise ModelError(f"{type(model).__name__} cannot be trained with cp={plan.mesh.cp}: {why} Use cp=1.")


def prove_generation(model: nn.Module, plan: Plan) -> None:
    """Measure on a small random model whether its family continues texts correctly whose keys are distributed over ranks.

    Raises:
        ModelError: It does not.
    """
    if plan.mesh.cp == 1:
        return
    why = _reason(model, plan, _measured_generation)
    if why:
        why = why.removesuffix(" Use cp=1.")
        raise ModelError(f"{type(model).__name__} cannot generate with cp={plan.mesh.cp}: {why} Use cp=1.")


def refuse_length(model: nn.Module, length: int, comm: Communicator) -> None:
    """Raise `ModelError` for parts of sequences of `length` tokens whose rotary frequencies depend on the whole length."""
    fixed = fixed_positions(getattr(model, "config", None)) if comm.size > 1 else None
    if fixed is not None and length > fixed:
        raise ModelError(
            f"sequences of {length} tokens are longer than {fixed}: beyond that, the rotary frequencies of "
            f"{type(model).__name__} depend on the length, which a rank with a part of it (cp={comm.size}) does not see. Use "
            f"sequences of at most {fixed} tokens, or cp=1."
        )


def _reason(model: nn.Module, plan: Plan, measure: Callable[[nn.Module, int], str]) -> str:
    if plan.num_mtp:
        return "its multi-token prediction needs the next tokens of other ranks."
    if is_stateful(model):
        return "its layers keep a state that passes from token to token."
    ranks = min(plan.mesh.cp, MOST_RANKS)
    config = repr(sorted(map(repr, dict(plan.spec.config).items())))
    key = type(model).__name__, config, attention_of(model), ranks, measure.__name__
    if key not in _known:
        try:
            small: Any = small_model(model, plan.spec.num_heads, short_windows=True)
            if attention_of(small) != attention_of(model):
                small.set_attn_implementation(attention_of(model))
            _known[key] = measure(small, ranks)
        except PartitaError as error:
            _known[key] = str(error)
        except Exception as error:
            _known[key] = f"its forward fails on parts of sequences: {describe_error(error)}"
    return _known[key]


_known: dict[Any, str] = {}


def _measured_plain(small: nn.Module, ranks: int, *, packing: bool = False) -> str:
    cases = _cases(small, 4 * ranks + 3, packing=packing)
    return next((why for inputs in cases if (why := _difference(small, inputs, ranks))), "")


def _measured_packed(small: nn.Module, ranks: int) -> str:
    return _measured_plain(small, ranks, packing=True)


def _cases(model: nn.Module, length: int, *, packing: bool) -> list[dict[str, Any]]:
    padded: dict[str, Any] = {**sample_inputs(model, length=length), "use_cache": False}
    if asks_for_balance(model):
        padded[SWITCH] = False  # the auxiliary loss is that of `Balance`
    plain = {name: value for name, value in padded.items() if name != "attention_mask"}
    restarting = torch.cat([torch.arange(length - length // 3), torch.arange(length // 3)])[None].expand(2, -1)
    return [plain, padded, *([{**plain, "position_ids": restarting}] if packing else [])]


def _difference(model: nn.Module, inputs: dict[str, Any], ranks: int) -> str:
    """Description of the first difference between whole sequences and parts of them on `ranks` threads."""
    with Float64Everywhere():
        whole, gradients = _run(model, inputs)

    def one(comm: Communicator) -> str:
        part = copy.deepcopy(model)
        split_context(part, comm)
        context = Context.of(inputs, comm)
        with Float64Everywhere(), context_of(context.split(inputs)) as given:
            output, mine = _run(part, given, lambda weight: context.own(weight), whole.shape)
        errors = {"the logits of its parts": relative_error(context.own(whole), output, float(whole.abs().max()))}
        largest = max(float(grad.abs().max()) for grad in gradients.values())
        for name, grad in gradients.items():
            summed = comm.all_reduce_(mine.get(name, torch.zeros_like(grad)).clone())
            scale = max(float(grad.abs().max()), SMALL * largest)
            errors[f"the gradient of {name}"] = relative_error(grad, summed, scale)
        wrong = next((what for what, error in errors.items() if not error <= TOLERANCE), None)
        return f"{wrong} would differ from whole sequences' by {errors[wrong]:.1e} of the largest." if wrong else ""

    return next((why for why in run_as_threads(ranks, one) if why), "")


def _run(
    model: nn.Module, inputs: dict[str, Any], own: Any = None, shape: torch.Size | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradients of their sum with random weights."""
    model.zero_grad(set_to_none=True)
    logits: Tensor = model(**inputs).logits
    weight = torch.randn(shape or logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (logits * (weight if own is None else own(weight))).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def _measured_generation(small: nn.Module, ranks: int) -> str:
    """Description of the first difference in continuing texts: of the same length, of several lengths, and short ones."""
    long, short = min(4 * ranks + 3, fixed_positions(small.config) or sys.maxsize), 2 * ranks - 1
    ids = sample_inputs(small, length=long)["input_ids"].tolist()
    padded = [ids[0], ids[1][3:]] if "attention_mask" in arguments_of(small) else ids
    for prompts in (ids, padded, [one[:short] for one in ids]):
        with Float64Everywhere(), torch.inference_mode():
            whole = _continued(small, prompts, Communicator.single())

        def one(comm: Communicator, prompts: list[list[int]] = prompts, whole: list[Tensor] = whole) -> str:
            part = copy.deepcopy(small)
            split_context(part, comm)
            with Float64Everywhere(), torch.inference_mode():
                found = _continued(part, prompts, comm)
            for step, (expected, logits) in enumerate(zip(whole, found, strict=True)):
                error = relative_error(expected, logits)
                # Of a prompt's parts, that of the first rank has the last token.
                if not error <= TOLERANCE and (step or comm.rank == 0 or len(prompts[0]) <= short):
                    return f"the logits of new token {step + 1} would differ from cp=1's by {error:.1e} of the largest."
            return ""

        why = next((why for why in run_as_threads(ranks, one) if why), "")
        if why:
            return why
    return ""


def _continued(model: nn.Module, prompts: list[list[int]], comm: Communicator) -> list[Tensor]:
    """The logits of `NEW_TOKENS` tokens after each prompt, `[prompts, vocabulary]`."""
    group = SequenceGroup(
        model, [Sequence(i, one, NEW_TOKENS) for i, one in enumerate(prompts)], torch.device("cpu"), context=comm
    )
    forget_lengths(model)
    found = []
    for step in range(NEW_TOKENS):
        with context_of(group.inputs(0)) as given:
            output = model(**given)
        group.caches[0] = cache_of(output)
        found.append(output.logits[:, -1])
        group.go_on(torch.tensor([one[step % len(one)] for one in prompts]), output)
    return found
