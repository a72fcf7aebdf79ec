"""Splitting a model: each module that a plan names is replaced by its split form. Nothing is evaluated."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.nn as nn

from partita.core.plan import Plan
from partita.core.sharding.cuts import AttentionPlan, ModulePlan
from partita.errors import DistributedError, ModelError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.layers.embedding import VocabParallelEmbedding
from partita.mlx.layers.inner import slice_module
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.mlx.layers.region import RegionInput
from partita.mlx.layers.region_parts import EntersRegion, InsideRegion, SplitExperts
from partita.mlx.mlx_lm_internals import STACKS
from partita.mlx.model.mlx_lm_models import spec_of
from partita.mlx.model.parts import local_ranges, parameter_homes, take
from partita.mlx.model.tree import get_module, set_module
from partita.mlx.stages.cut import cut_stages, present_modules
from partita.mlx.stages.whole_call import call_as_whole


def apply_plan(model: nn.Module, plan: Plan, comm: Communicator, pp_rank: int = 0) -> nn.Module:
    """Reduce an unsplit `model`, in place, to the part that `plan` assigns to tensor rank `comm.rank` of pipeline rank
    `pp_rank`.

    Raises:
        DistributedError: `comm` does not match the plan's tensor axis.
        ModelError: The model does not match the plan, or has a layer that cannot be split.
        PlanError: The split divides a quantization group.
    """
    if comm.size != plan.mesh.tp:
        raise DistributedError(f"the plan has tp={plan.mesh.tp}, but the tensor group has {comm.size} ranks.")
    plan.check_shapes({name: tensor.shape for name, tensor in spec_of(model).tensors.items()})
    cut_stages(model, plan, pp_rank)
    if comm.size == 1:
        return model
    here = present_modules(model)
    entries = _shared_entries(plan, comm)
    for path, module_plan in plan.modules.items():
        if path in here:
            _split_module(model, path, module_plan, plan, comm, entries)
    for path, attention in plan.attention.items():
        if path in here:
            _localize_heads(get_module(model, path), attention, comm.rank)
    _cut_bare_arrays(model, plan, comm)
    _sum_partial_gradients(model, plan, comm)
    return model


def finish(model: nn.Module, plan: Plan, groups: ParallelGroups) -> nn.Module:
    """Attach the plan and groups to a split model, and make one with stages callable like the unsplit model."""
    model.partita_plan = plan
    model.partita_groups = groups
    call_as_whole(model, plan, groups)
    return model


def _shared_entries(plan: Plan, comm: Communicator) -> dict[str, RegionInput]:
    """One shared entry for the column layers of a parent whose inputs have the same width."""
    siblings: dict[tuple[str, int], list[str]] = {}
    for path, module in plan.modules.items():
        weight = plan.tensor(f"{path}.weight").shape if module.style == "column" else ()
        if module.style == "column" and not module.gather_output and len(weight) == 2:
            siblings.setdefault((path.rpartition(".")[0], weight[1]), []).append(path)
    entries: dict[str, RegionInput] = {}
    for paths in siblings.values():
        entries.update(dict.fromkeys(paths, RegionInput(comm, len(paths))))
    return entries


def _split_module(
    model: nn.Module,
    path: str,
    module_plan: ModulePlan,
    plan: Plan,
    comm: Communicator,
    entries: Mapping[str, RegionInput],
) -> None:
    module = get_module(model, path)
    try:
        split = _split_form(module, module_plan, comm, entries.get(path))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    set_module(model, path, split)
    if module_plan.style == "row" and len(plan.tensor(f"{path}.weight").shape) == 3:
        parent = path.rpartition(".")[0]
        stack = get_module(model, parent)
        if type(stack).__name__ not in STACKS:
            raise ModelError(
                f"{path}: stacked layers in a {type(stack).__name__} are not supported, so they cannot be split."
            )
        set_module(model, parent, SplitExperts(stack, comm))


def _split_form(module: nn.Module, plan: ModulePlan, comm: Communicator, entry: RegionInput | None) -> nn.Module:
    if plan.style == "replicate":
        return EntersRegion(module, comm, plan.copy_output)
    assert plan.split is not None
    if module["weight"].ndim == 3 and plan.style in ("column", "row"):
        column = plan.style == "column"
        return slice_module(module, "outputs" if column else "inputs", plan.split.ranges(comm.rank), bias=True)
    if plan.style == "vocab" and isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        return VocabParallelEmbedding.from_embedding(module, comm, plan.split)
    if plan.style in ("column", "vocab"):
        return ColumnParallelLinear.from_linear(
            module,
            comm,
            plan.split,
            gather_output=plan.gather_output or plan.style == "vocab",
            expand=_feature_index(plan, comm.rank),
            entry=entry,
        )
    if plan.style == "row":
        return RowParallelLinear.from_linear(module, comm, plan.split, input_is_parallel=not plan.split_input)
    raise ModelError(f"MLX models cannot be split with the style {plan.style!r}.")


def _feature_index(plan: ModulePlan, rank: int) -> Sequence[int] | None:
    """The order of the local outputs. If one rank needs one, all have one, since all must build the same graph."""
    if not any(plan.expand):
        return None
    assert plan.split is not None
    width = plan.expand_width
    blocks = plan.expand[rank]
    blocks = blocks if blocks is not None else tuple(range(plan.split.local_size(rank) // width))
    return [feature for block in blocks for feature in range(block * width, (block + 1) * width)]


_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "q_num_heads")
_KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "k_num_heads", "v_num_heads")
_GROUP_COUNTS = ("num_key_value_groups", "n_rep", "num_kv_groups", "n_kv_groups", "repeats")


def _localize_heads(module: nn.Module, plan: AttentionPlan, rank: int) -> None:
    """Make an attention module use its rank's head counts everywhere."""
    heads, kv_heads = plan.local_heads(rank), plan.local_kv_heads(rank)
    for names, whole, local in (
        (_HEAD_COUNTS, plan.num_heads, heads),
        (_KV_HEAD_COUNTS, plan.num_kv_heads, kv_heads),
        (_GROUP_COUNTS, plan.num_heads // plan.num_kv_heads, heads // kv_heads),
    ):
        for holder in _holders(module):
            for name in names:
                if type(value := getattr(holder, name, None)) is int and value == whole:
                    setattr(holder, name, local)


def _holders(module: nn.Module) -> list[Any]:
    """Objects that may hold head counts: an attention module, and a copy of the arguments that it stores."""
    holders: list[Any] = [module]
    for name in ("args", "config"):
        arguments = vars(module).get(name)
        if arguments is not None:
            setattr(module, name, copy.copy(arguments))
            holders.append(getattr(module, name))
    return holders


def _cut_bare_arrays(model: nn.Module, plan: Plan, comm: Communicator) -> None:
    """Split the arrays of modules that are not replaced: arrays with one row or one matrix per head."""
    for name, (home, attribute) in parameter_homes(model).items():
        ranges = local_ranges(home, attribute, name, plan, comm.rank)
        if ranges is None:
            continue
        array = home[attribute]
        local = tuple(sum(b - a for a, b in one) for one in ranges)
        if array.shape != local:
            home[attribute] = take(array, ranges)


def _sum_partial_gradients(model: nn.Module, plan: Plan, comm: Communicator) -> None:
    """Sum the gradients of unsplit modules whose inputs are split."""
    paths = {n.rpartition(".")[0] for n, cut in plan.cuts.items() if cut.partial_grad and cut.split is None}
    here = present_modules(model)
    for path in sorted(path for path in paths if path in here):
        set_module(model, path, InsideRegion(get_module(model, path), comm))
