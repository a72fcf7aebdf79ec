"""A stage of any model: the model's own forward, run with a subset of its layers.

A pipeline rank keeps the modules whose tensors its plan assigns to it. The list of layers keeps its length and indices: in
place of another rank's layer, a stand-in passes its input on. While stage i of the pipeline runs:

    [1] the embedding runs on its stage; on other stages zeros of its shape replace it
    [2] the message of the previous stage replaces the input of the stage's first layer
    [3] the forward ends with what would enter the first layer of the next stage

So the family's own code computes everything else from ids, positions and masks on every stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from partita.core.plan import Plan
from partita.torch.collectives.mappings import reduce_from
from partita.torch.model.balance import SWITCH, Balance
from partita.torch.model.cache import advance_cache, counting_cache, find_cache
from partita.torch.model.context import context_of, current_context, own_rows
from partita.torch.stages.cut import is_cut, stage_layers
from partita.torch.stages.layers import Message, run_part
from partita.torch.stages.mtp import run_predicting
from partita.torch.transformers_internals import cache_of


def run_stage(
    model: nn.Module,
    plan: Plan,
    index: int,
    received: Message | None,
    inputs: Mapping[str, Any],
    balance: Balance | None = None,
) -> tuple[Any, Any]:
    """Run stage `index` of the pipeline, one of this rank's stages.

    Args:
        model: The result of `cut_stages`.
        plan: The plan of its partition.
        index: Index of the stage in the pipeline.
        received: The message of the previous stage; None for the first.
        inputs: The inputs of the unsplit model.
        balance: The auxiliary loss, unless the model's forward computes it. Messages end with its sums, and the
            output's `aux_loss` covers all stages.

    Returns:
        A `Message` for the next stage, or the model's own output on the last; and the cache that the layers used.
    """
    with context_of(inputs) as given:
        if balance is None:
            return _run_stage(model, plan, index, received, given)
        sums: tuple[Tensor, ...] = ()
        if received is not None and received.tensors:
            received, sums = replace(received, tensors=received.tensors[:-2]), received.tensors[-2:]
        with balance.recorded() as logits:
            output, cache = _run_stage(model, plan, index, received, {**given, SWITCH: False})
        sums = balance.sums(logits, own_rows(given), sums)
        if isinstance(output, Message):
            return replace(output, tensors=(*output.tensors, *sums)), cache
        context = current_context()
        if context is not None:
            sums = tuple(reduce_from(one, context.comm) for one in sums)
        output.aux_loss = balance.loss(*sums)
        return output, cache


def _run_stage(
    model: nn.Module, plan: Plan, index: int, received: Message | None, inputs: Mapping[str, Any]
) -> tuple[Any, Any]:
    if not is_cut(plan):
        output = type(model).forward(model, **inputs)
        return output, cache_of(output)
    layers = stage_layers(model, plan)
    stage = layers.stages[index]
    if stage.embedding:
        # Earlier stages, if any, are empty and sent nothing.
        received = None
    if stage.mtp_layers or (stage.loss and plan.num_mtp):
        return run_predicting(model, plan, layers, stage, received, inputs)
    if not (stage.layers or stage.embedding or stage.loss):
        cache = find_cache((), inputs)
        if cache is not None:
            advance_cache(cache, (), inputs)
        elif inputs.get("use_cache"):
            cache = counting_cache(model, inputs)
        return received if received is not None else Message(()), cache
    return run_part(model, layers, stage, received, inputs)
