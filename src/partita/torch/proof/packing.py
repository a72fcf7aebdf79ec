"""Packing before use: a small model of the family must give each document of a packed row what it gives the document alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.errors import ModelError, PartitaError
from partita.torch.model.balance import SWITCH, asks_for_balance
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.proof.family import sample_inputs, small_model
from partita.torch.transformers_internals import attention_of

TOLERANCE = 1e-11
"""Largest difference of logits in float64, as a fraction of the largest: far above rounding, far below any mistake."""

LENGTHS = (7, 1, 5, 3)
"""Lengths of the documents of the row. The last stands for the padding behind the others."""


def prove_packing(model: nn.Module, plan: Plan) -> None:
    """Measure on a small random model whether documents of one row, told apart by positions that restart, are independent.

    transformers' models mask attention between documents where positions restart and no other mask is given.

    Raises:
        ModelError: They are not, or the model has a loss that is not a sum over documents.
    """
    why = _reason(model, plan)
    if why:
        raise ModelError(
            f"{type(model).__name__} cannot be trained with packing (--packing): {why} Leave it out, so that each document "
            "has a row of its own."
        )


def _reason(model: nn.Module, plan: Plan) -> str:
    if plan.num_mtp:
        return "its multi-token prediction would predict tokens of the next document."
    if asks_for_balance(model):
        return f"the auxiliary loss of its routers would count padding ({SWITCH} in its config)."
    key = (type(model).__name__, repr(sorted(map(repr, dict(plan.spec.config).items()))), attention_of(model))
    if key not in _known:
        _known[key] = _measured(model, plan)
    return _known[key]


_known: dict[Any, str] = {}


def _measured(model: nn.Module, plan: Plan) -> str:
    try:
        small: Any = small_model(model, plan.spec.num_heads)
        if attention_of(small) != attention_of(model):
            small.set_attn_implementation(attention_of(model))
        rows = sample_inputs(small, batch=1, length=sum(LENGTHS))["input_ids"]
        documents = rows.split(LENGTHS, dim=1)
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        with torch.no_grad(), Float64Everywhere():
            packed: Tensor = small(input_ids=rows, position_ids=positions, use_cache=False).logits
            alone = [small(input_ids=one, use_cache=False).logits for one in documents]
    except PartitaError as error:
        return str(error)
    except Exception as error:
        why = str(error).splitlines()[0][:200] if str(error) else ""
        return f"its forward fails on a packed row: {type(error).__name__}: {why}."
    largest = float(torch.cat(alone, dim=1).abs().max())
    for number, (one, mine) in enumerate(zip(alone, packed.split(LENGTHS, dim=1), strict=True), 1):
        difference = float((one - mine).abs().max()) / largest
        if not difference <= TOLERANCE:
            return (
                f"the logits of document {number} of a row differ from those of the document alone by {difference:.1e} of the "
                "largest."
            )
    return ""
