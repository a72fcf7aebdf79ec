"""Verification of the auxiliary loss before use: on a small model of the class, `Balance` must match the model's own loss."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from partita.core.plan import Plan
from partita.errors import ModelError, PartitaError
from partita.torch.model.balance import SWITCH, Balance, asks_for_balance, coefficient_of
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.transformers_models import spec_of
from partita.torch.proof.family import sample_inputs, small_model
from partita.torch.transformers_internals import router_recorders, text_config_of

TOLERANCE = 1e-5
"""Largest relative difference from what the model itself computes, which may be in float32."""

_verdicts: dict[tuple[str, str], str] = {}


def balance_of(model: nn.Module, plan: Plan, scope: str) -> Balance | None:
    """The auxiliary loss that the config of `model`, split by `plan`, requests.

    Returns:
        None if it requests none, or if only the model's own forward can compute it and the model has a single stage.

    Raises:
        ModelError: Its form differs from what `Balance` computes, but stages or sequences need it; or
            `scope` is `sequence` and the config requests none.
    """
    if not asks_for_balance(model):
        if scope == "sequence":
            raise ModelError(
                f"aux_loss_scope='sequence' needs a model whose config requests the auxiliary loss of its routers ({SWITCH}), "
                f"but that of {type(model).__name__} does not. Leave it out, or set {SWITCH} to True in the config."
            )
        return None
    reason = _verdict(model, plan)
    if not reason:
        return replace(_assumed(model, plan.spec.layers, plan.spec.num_layers), scope=scope)
    if scope == "microbatch" and plan.num_stages == 1 and plan.num_mtp == 0 and plan.mesh.cp == 1:
        return None
    where = (
        "of each sequence" if scope == "sequence" else "over stages" if plan.mesh.cp == 1 else "over parts of sequences"
    )
    raise ModelError(
        f"the config requests the auxiliary loss of the routers ({SWITCH}), which for {type(model).__name__} cannot be "
        f"computed {where}: {reason} Set {SWITCH} to False in the config, or use pp=1, cp=1 and aux_loss_scope='microbatch'."
    )


def _verdict(model: nn.Module, plan: Plan) -> str:
    """Why `Balance` does not compute the auxiliary loss of a model; empty if it does."""
    key = type(model).__name__, json.dumps(dict(plan.spec.config), sort_keys=True, default=str)
    if key not in _verdicts:
        try:
            _verdicts[key] = _difference(small_model(model, plan.spec.num_heads))
        except PartitaError as error:
            _verdicts[key] = str(error)
        except Exception as error:
            text = str(error).splitlines()[0][:200] if str(error) else ""
            _verdicts[key] = f"its small model fails: {type(error).__name__}: {text}."
    return _verdicts[key]


def _difference(small: Any) -> str:
    """Description of the difference between the auxiliary loss of a small model and that of `Balance`."""
    spec = spec_of(small)
    balance = _assumed(small, spec.layers, spec.num_layers)
    if not balance.routers:
        return "transformers does not define which of its modules are routers."
    inputs = sample_inputs(small)
    labels = inputs["input_ids"]
    with Float64Everywhere(), torch.no_grad():
        with balance.recorded() as logits:
            plain = small(**inputs, labels=labels, **{SWITCH: False})
        asked = small(**inputs, labels=labels, **{SWITCH: True})
        by_sequence = torch.stack(
            [
                small(**{name: value[row : row + 1] for name, value in inputs.items()}, **{SWITCH: True}).aux_loss
                for row in range(labels.shape[0])
            ]
        ).mean()
        found = balance.loss(*balance.sums(logits, inputs))
        sequences = replace(balance, scope="sequence")
        found_by_sequence = sequences.loss(*sequences.sums(logits, inputs))
    total = plain.loss + coefficient_of(small) * found
    for what, expected, got in (
        ("auxiliary loss", asked.aux_loss, found),
        ("auxiliary loss of a sequence", by_sequence, found_by_sequence),
        ("loss with the auxiliary loss", asked.loss, total),
    ):
        error = float((expected - got).abs() / expected.abs())
        if not error <= TOLERANCE:
            return f"its {what} differs from that of the usual form by {error:.1e}."
    return ""


def _assumed(model: nn.Module, layers: str, length: int) -> Balance:
    """The auxiliary loss derived from the attributes of `model`, with the routers of its first `length` layers."""
    config = text_config_of(getattr(model, "config", None))
    experts, top_k = (
        getattr(model, name, None) or getattr(config, name, None) for name in ("num_experts", "num_experts_per_tok")
    )
    if not isinstance(experts, int) or not isinstance(top_k, int):
        raise ModelError("its config does not define the number of experts and the experts per token.")
    routers = tuple(
        (module, place)
        for path, module in model.named_modules()
        if _layer_of(path, layers) < length
        for kind, place, part in router_recorders(model)
        if isinstance(module, kind) and (not part or f".{part.strip('.')}." in f".{path}.")
    )
    return Balance(experts, top_k, routers)


def _layer_of(path: str, layers: str) -> float:
    """The index of the layer that contains `path`, infinity for none."""
    number = path.removeprefix(f"{layers}.").partition(".")[0] if path.startswith(f"{layers}.") else ""
    return int(number) if number.isdigit() else float("inf")
