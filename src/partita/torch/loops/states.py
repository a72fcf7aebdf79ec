"""State dicts of a split model: a rank's own part, or the unsplit model's, of which each rank loads its part."""

from __future__ import annotations

from typing import Any

from torch import nn

from partita.core.plan import Plan
from partita.errors import ModelError
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.layers.inner import take_ranges
from partita.torch.model.parts import parameter_homes, plan_of

PART = "partita_part"
"""The key in a state dict's metadata that says which part of which mesh it is."""


def watch_states(model: nn.Module) -> None:
    """Mark the state dicts of a split model, and check or split those that it loads."""
    model.register_state_dict_post_hook(_mark)
    model.register_load_state_dict_pre_hook(_fit)


def _part(model: nn.Module) -> dict[str, int | str]:
    plan, groups = plan_of(model)
    experts: dict[str, int | str] = {"ep": plan.mesh.ep, "ep_rank": groups.ep.rank} if plan.mesh.ep > 1 else {}
    return experts | {
        "tp": plan.mesh.tp,
        "pp": plan.mesh.pp,
        "tp_rank": groups.tp.rank,
        "pp_rank": groups.pp.rank,
        "layout": str(plan.layout),
    }


def _mark(model: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    metadata[PART] = _part(model)


def _fit(
    model: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool, *rest: Any
) -> None:
    """Refuse the state of another rank or mesh, and take this rank's part of the unsplit model's state."""
    plan, groups = plan_of(model)
    part = metadata.get(PART)
    if part is not None:
        if part != _part(model):
            raise ModelError(
                f"this state dict is of tp rank {part['tp_rank']} of {part['tp']}, pp rank {part['pp_rank']} of {part['pp']}, "
                f"but this rank is tp rank {groups.tp.rank} of {plan.mesh.tp}, pp rank {groups.pp.rank} of {plan.mesh.pp}. "
                "Load each rank's own file, or write the unsplit model with partita.torch.save() and load that."
            )
        return
    names = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if names and names <= plan.spec.tensors.keys():
        _take_part(model, plan, groups, state, prefix)


def _take_part(model: nn.Module, plan: Plan, groups: ParallelGroups, state: dict[str, Any], prefix: str) -> None:
    """Replace the unsplit tensors in `state` by this rank's parts, under the names of the split model."""
    homes = parameter_homes(model)
    paths = {id(module): path for path, module in model.named_modules()}
    for name, cut in plan.cuts.items():
        value = state.get(prefix + name)
        if value is None:
            continue
        if tuple(value.shape) == cut.shape:
            value = take_ranges(value, cut.ranges(groups.part(cut)))
        elif name in homes and value.shape != getattr(*homes[name]).shape:
            continue  # load_state_dict reports the sizes
        del state[prefix + name]
        if name in homes:
            module, attribute = homes[name]
            state[f"{prefix}{paths[id(module)]}.{attribute}".replace("..", ".")] = value
