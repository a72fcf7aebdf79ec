"""The last step of splitting: tie shared tensors, sum partial gradients, and keep the model's calling convention."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from partita.core.plan import Plan
from partita.core.sharding.experts import why_not_alone
from partita.errors import ModelError
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.attentions import gather_attentions
from partita.torch.model.context import split_context
from partita.torch.model.parts import is_split, parameter_homes, tie
from partita.torch.split.apply import sum_partial_gradients
from partita.torch.stages.cut import wire_stages
from partita.torch.stages.whole_call import call_as_whole


def finish(model: nn.Module, plan: Plan, groups: ParallelGroups) -> nn.Module:
    """Tie shared tensors, and sum the gradients of parameters that several ranks hold."""
    homes = parameter_homes(model)
    tie(homes, plan)
    sum_partial_gradients(homes, plan, groups)
    wire_stages(model, plan, groups.pp.rank)
    split_context(model, groups.cp)
    model.partita_plan = plan  # type: ignore[assignment]
    model.partita_groups = groups  # type: ignore[assignment]
    call_as_whole(model, plan, groups)
    gather_attentions(model, plan, groups.tp)
    if is_split(model) and hasattr(type(model), "generate"):
        model.generate = MethodType(_generate_alike, model)  # type: ignore[assignment]
    return model


def _generate_alike(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' own `generate` with equal samples on all ranks of a replica: each starts from the first rank's generator
    state.

    Raises:
        ModelError: A rank has no tensor, and transformers reads the device from one; or replicas hold experts together. Raised
            on every rank.
    """
    if why := why_not_alone(model.partita_plan.mesh):
        raise ModelError(why)
    empty = [rank for rank in range(model.partita_plan.mesh.size) if not model.partita_plan.held_by(rank)]
    if empty:
        raise ModelError(
            f"rank {empty[0]} holds no tensor of the model, but transformers' generate needs one on every rank. Call "
            "partita.torch.generate(), or give each rank a layer."
        )
    state = torch.get_rng_state()
    for comm in model.partita_groups.axes_of_replica:
        state = comm.broadcast_(state)
    torch.set_rng_state(state)
    return type(model).generate(model, *args, **kwargs)
