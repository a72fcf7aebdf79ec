"""Context parallelism before use: a small model of the family on parts of its sequences, against the same on whole ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.errors import ModelError, PartitaError
from partita.proof.differences import SMALL
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.threads import run_as_threads
from partita.torch.model.balance import SWITCH, asks_for_balance
from partita.torch.model.context import Context, context_of, split_context
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.proof.compare import relative_error
from partita.torch.proof.family import describe_error, sample_inputs, small_model
from partita.torch.transformers_internals import attention_of, fixed_positions, is_stateful

TOLERANCE = 1e-11
"""Largest difference in float64, relative to the largest magnitude: far above rounding, far below any mistake."""

MOST_RANKS = 4
"""Ranks of the small model: more would need longer sequences and show nothing else."""


def prove_context(model: nn.Module, plan: Plan, *, packing: bool = False) -> None:
    """Measure on a small random model whether its family computes parts of sequences correctly.

    Raises:
        ModelError: It does not: something besides its attention mixes tokens, or its attention is not transformers' interface.
    """
    why = _reason(model, plan, packing=packing)
    if why:
        raise ModelError(f"{type(model).__name__} cannot be trained with cp={plan.mesh.cp}: {why} Use cp=1.")


def refuse_length(model: nn.Module, length: int, comm: Communicator) -> None:
    """Raise `ModelError` for parts of sequences of `length` tokens whose rotary frequencies depend on the whole length."""
    fixed = fixed_positions(getattr(model, "config", None)) if comm.size > 1 else None
    if fixed is not None and length > fixed:
        raise ModelError(
            f"sequences of {length} tokens are longer than {fixed}: beyond that, the rotary frequencies of "
            f"{type(model).__name__} depend on the length, which a rank with a part of it (cp={comm.size}) does not see. Use "
            f"sequences of at most {fixed} tokens, or cp=1."
        )


def _reason(model: nn.Module, plan: Plan, *, packing: bool) -> str:
    if plan.num_mtp:
        return "its multi-token prediction needs the next tokens of other ranks."
    if is_stateful(model):
        return "its layers keep a state that passes from token to token."
    config = repr(sorted(map(repr, dict(plan.spec.config).items())))
    key = type(model).__name__, config, attention_of(model), min(plan.mesh.cp, MOST_RANKS), packing
    if key not in _known:
        _known[key] = _measured(model, plan, packing=packing)
    return _known[key]


_known: dict[Any, str] = {}


def _measured(model: nn.Module, plan: Plan, *, packing: bool) -> str:
    try:
        small: Any = small_model(model, plan.spec.num_heads)
        if attention_of(small) != attention_of(model):
            small.set_attn_implementation(attention_of(model))
        for inputs in _cases(small, 4 * min(plan.mesh.cp, MOST_RANKS) + 3, packing=packing):
            why = _difference(small, inputs, min(plan.mesh.cp, MOST_RANKS))
            if why:
                return why
    except PartitaError as error:
        return str(error)
    except Exception as error:
        return f"its forward fails on parts of sequences: {describe_error(error)}"
    return ""


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
