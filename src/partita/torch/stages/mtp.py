"""Multi-token prediction on any family of decoder layers: DeepSeek-V3's module, in training.

Module k, counted from 1, predicts at position i the token i + k + 1. Letters: h the main model's hidden states behind its last
norm, x the ids of a row of length n, y_k the output of module k to the next; y_0 = h.

        u_k = eh_proj [enorm embedding(x[k:n]), hnorm y_(k-1)[: n-k]]
        y_k = decoder layer (u_k)
        logits_k = head (shared_head.norm y_k)          targets x[k+1 : n+1]

Embedding and head are the main model's. Source: 2412.19437, section 2.2; the names on disk are those of its files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.model.mtp import NORMS, PROJECTION, final_norm
from partita.core.plan import Plan, Stage
from partita.torch.stages.layers import Message, StageLayers, run_part


def attach_mtp(model: nn.Module, plan: Plan) -> None:
    """Append the plan's prediction layers to the layers of an unsplit model, which may be on the meta device.

    They are copies of its last layer, whose weights must be read or initialized afterwards.
    """
    if plan.num_mtp == 0:
        return
    layers = model.get_submodule(plan.spec.layers)
    assert isinstance(layers, nn.ModuleList)
    norm = model.get_submodule(final_norm(plan.spec))
    for index in range(len(layers), plan.spec.num_layers + plan.num_mtp):
        layer = copy.deepcopy(layers[plan.spec.num_layers - 1])
        for module in layer.modules():
            if getattr(module, "layer_idx", None) == plan.spec.num_layers - 1:
                module.layer_idx = index  # type: ignore[assignment]
        hidden = norm.weight
        assert isinstance(hidden, Tensor)
        for name in NORMS[:2]:
            layer.add_module(name, copy.deepcopy(norm))
        width = hidden.shape[0]
        projection = nn.Linear(2 * width, width, bias=False, device=hidden.device, dtype=hidden.dtype)
        layer.add_module(PROJECTION, projection)
        head = nn.Module()
        head.add_module("norm", copy.deepcopy(norm))
        layer.add_module("shared_head", head)
        layers.append(layer)
    config: Any = model.config
    config.num_nextn_predict_layers = plan.num_mtp


def run_predicting(
    model: Any, plan: Plan, layers: StageLayers, stage: Stage, received: Message | None, inputs: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Run a stage that has prediction layers, or the loss after some; see `stage.run_stage`."""
    if not model.training:
        if not (stage.layers or stage.embedding or stage.loss):
            return received, None
        return run_part(model, layers, replace(stage, mtp_layers=()), received, inputs)
    if stage.layers or stage.embedding:
        main, _ = run_part(model, layers, replace(stage, mtp_layers=(), loss=False), received, inputs)
        hidden, predicted = main.tensors[0], []
        arity = main.arity
    else:
        assert received is not None
        hidden, *predicted = received.tensors
        arity = received.arity
    before = stage.mtp_layers[0] if stage.mtp_layers else plan.num_mtp
    chain = predicted.pop() if 0 < before < plan.num_mtp else None
    for k in stage.mtp_layers:
        if k == 0:
            chain = model.get_submodule(final_norm(plan.spec))(hidden)
        assert chain is not None
        chain = _predict(model, plan, layers, k, chain, inputs)
        predicted.append(_layer(layers, plan, k).get_submodule(NORMS[2])(chain))
    if not stage.loss:
        done = stage.mtp_layers[-1] + 1 if stage.mtp_layers else before
        rest = (chain,) if chain is not None and 0 < done < plan.num_mtp else ()
        return Message((hidden, *predicted, *rest), arity), None
    end = Stage((), (), False, True)
    output, _ = run_part(model, layers, end, Message((hidden,), arity), inputs)
    output.mtp_logits = [
        run_part(model, layers, end, Message((y,), arity), _shortened(inputs, y.shape[1]), normed=True)[0].logits
        for y in predicted
    ]
    return output, None


def _predict(model: Any, plan: Plan, layers: StageLayers, k: int, before: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Compute y_(k+1) from y_k."""
    layer = _layer(layers, plan, k)
    ids = inputs["input_ids"]
    length = ids.shape[1] - (k + 1)
    with layers.embedding():
        embedded = model.get_input_embeddings()(ids[:, k + 1 :])
    enorm, hnorm = (layer.get_submodule(name) for name in NORMS[:2])
    entering = layer.get_submodule(PROJECTION)(torch.cat([enorm(embedded), hnorm(before[:, :length])], -1))
    part = Stage((plan.spec.num_layers + k,), (), False, False)
    message, _ = run_part(model, layers, part, Message((entering,)), _shortened(inputs, length))
    made: Tensor = message.tensors[0]
    return made


def _layer(layers: StageLayers, plan: Plan, k: int) -> nn.Module:
    return layers.get_submodule(str(plan.spec.num_layers + k))


def _shortened(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The inputs of the first `length` positions."""
    return {
        name: value[:, :length] if isinstance(value, Tensor) and value.dim() >= 2 else value
        for name, value in inputs.items()
    }
