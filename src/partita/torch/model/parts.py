"""The parts of a split model: its plan and groups, and where each tensor of the unsplit model is stored in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from partita.core.plan import Plan
from partita.errors import ModelError
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.layers.embedding import VocabParallelEmbedding
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear

WRAPPERS = ("linear", "embedding", "base_layer")
"""Names that split layers and adapters insert into a parameter's path."""


def plan_of(model: nn.Module) -> tuple[Plan, ParallelGroups]:
    """The plan and groups of a model that `load` or `shard` returned.

    Raises:
        ModelError: The model was not split by them.
    """
    plan, groups = getattr(model, "partita_plan", None), getattr(model, "partita_groups", None)
    if not isinstance(plan, Plan) or not isinstance(groups, ParallelGroups):
        raise ModelError("this model was not split by Partita. Use partita.torch.load() or partita.torch.shard().")
    return plan, groups


def is_split(model: object) -> bool:
    """Whether a model is split over several ranks by tp, pp or ep."""
    plan = getattr(model, "partita_plan", None)
    return isinstance(plan, Plan) and plan.mesh.tp * plan.mesh.pp * plan.mesh.ep > 1


def unsplit_name(name: str) -> str:
    """The unsplit name of a split model's parameter, for models whose own modules have no such names.

    `parameter_homes` recognizes split layers by their classes instead, which works for any model.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def parameter_homes(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where each tensor of the unsplit model is stored in the split one: maps its unsplit name to (module, attribute)."""
    homes: dict[str, tuple[nn.Module, str]] = {}

    def walk(module: nn.Module, path: str) -> None:
        saved = (b for b in module._buffers if b not in module._non_persistent_buffers_set)
        for attribute in (*module._parameters, *saved):
            if getattr(module, attribute) is not None:
                homes[path + attribute] = (module, attribute)
        for name, child in module._modules.items():
            if child is not None:
                walk(child, path if _is_inner(module, name) else f"{path}{name}.")

    walk(model, "")
    return homes


def unsplit_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a split model by their unsplit paths; a split layer or an adapter stands for the layer that it wraps."""
    modules: dict[str, nn.Module] = {}

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module._modules.items():
            if child is not None and _is_inner(module, name):
                walk(child, path)
            elif child is not None:
                modules[path + name] = child
                walk(child, f"{path}{name}.")

    walk(model, "")
    return modules


def inner_name(module: nn.Module) -> str | None:
    """The name under which a split layer holds its part of the layer; None for any other module."""
    if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
        return "linear"
    return "embedding" if isinstance(module, VocabParallelEmbedding) else None


def _is_inner(module: nn.Module, name: str) -> bool:
    """Whether a split layer or an adapter wraps this child, so that the unsplit model lacks its name."""
    return name == (inner_name(module) or "base_layer") or (
        name == "original_module" and hasattr(module, "modules_to_save")
    )


def local_tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """This rank's part of every tensor of the plan's model, by its name in the unsplit model; tied ones under both names."""
    homes = parameter_homes(model)
    return {name: getattr(*homes[name]) for name in plan.spec.tensors if name in homes}


def distributed_experts(model: nn.Module, plan: Plan) -> set[int]:
    """The `id` of each parameter of experts that the ranks hold together (ep)."""
    if plan.mesh.ep == 1:
        return set()
    return {id(tensor) for name, tensor in local_tensors(model, plan).items() if plan.tensor(name).axis == "ep"}


def tie(homes: Mapping[str, tuple[nn.Module, str]], plan: Plan) -> None:
    """Make tensors that share memory in the unsplit model share it in the split one."""
    for name, tensor in plan.spec.tensors.items():
        if tensor.tied_to is not None and name in homes and tensor.tied_to in homes:
            module, attribute = homes[name]
            module._parameters[attribute] = getattr(*homes[tensor.tied_to])


def main_output(output: Any) -> Tensor:
    """The main tensor of a model's output: logits, or the last hidden state."""
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    value = output[0] if isinstance(output, (tuple, list)) or hasattr(output, "keys") else output
    assert isinstance(value, Tensor)
    return value
