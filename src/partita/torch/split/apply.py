"""Splitting a model: each module that a plan names is replaced by its split form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.core.sharding.cuts import AttentionPlan, ModulePlan
from partita.core.sharding.split import Split
from partita.errors import DistributedError, ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.collectives.mappings import copy_to, reduce_from
from partita.torch.layers.dropout import RegionRandomness, has_dropout
from partita.torch.layers.embedding import VocabParallelEmbedding
from partita.torch.layers.experts import distribute_experts
from partita.torch.layers.grads import sum_gradient, sum_shared_gradient
from partita.torch.layers.inner import REPLACED, slice_parameter
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.layers.region import RegionInput
from partita.torch.model.parts import parameter_homes
from partita.torch.quantized.tensor import QuantizedTensor
from partita.torch.stages.cut import Absent, cut_stages
from partita.torch.transformers_internals import PLAIN_EXPERTS


def apply_plan(model: nn.Module, plan: Plan, groups: ParallelGroups) -> nn.Module:
    """Reduce an unsplit `model`, in place, to the part that `plan` assigns to this rank. Any device, including meta.

    Raises:
        DistributedError: `groups` do not match the plan's mesh.
        ModelError: The model does not match the plan, or has a layer that cannot be split.
    """
    comm = groups.tp
    experts = len(plan.mesh.expert_groups[0])
    if (comm.size, groups.pp.size, groups.ep.size) != (plan.mesh.tp, plan.mesh.pp, experts):
        raise DistributedError(
            f"the plan has tp={plan.mesh.tp}, pp={plan.mesh.pp} and ep x etp={experts}, but the groups have {comm.size}, "
            f"{groups.pp.size} and {groups.ep.size} ranks."
        )
    plan.check_shapes({name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()})
    cut_stages(model, plan, groups.pp.rank)
    if comm.size * groups.ep.size == 1:
        return model
    unsplit = list(model.parameters())
    here = {path for path, _ in model.named_modules()}
    randomness = RegionRandomness(comm) if has_dropout(getattr(model, "config", None)) else None
    entries = _shared_entries(plan, comm, randomness)
    for path, module_plan in plan.modules.items():
        if path in here and not isinstance(model.get_submodule(path), Absent):
            if module_plan.distributed:
                _distribute_experts(model.get_submodule(path), plan, module_plan, groups)
                continue
            _split_module(model, path, module_plan, groups, entries, randomness)
    for path, attention in plan.attention.items():
        if path in here:
            _localize_heads(model.get_submodule(path), attention, comm.rank)
    _split_bare_parameters(parameter_homes(model), plan, groups)
    kept = {id(parameter) for parameter in model.parameters()}
    for parameter in unsplit:
        if id(parameter) not in kept:
            setattr(parameter, REPLACED, True)
    return model


def _shared_entries(plan: Plan, comm: Communicator, randomness: RegionRandomness | None) -> dict[str, RegionInput]:
    """One shared entry for the column layers of a parent whose inputs have the same width."""
    siblings: dict[tuple[str, int], list[str]] = {}
    for path, module in plan.modules.items():
        if module.style == "column" and not module.gather_output:
            weight = plan.tensor(f"{path}.weight").shape
            siblings.setdefault((path.rpartition(".")[0], weight[0 if module.transposed else 1]), []).append(path)
    entries: dict[str, RegionInput] = {}
    for paths in siblings.values():
        entries.update(dict.fromkeys(paths, RegionInput(comm, len(paths), randomness)))
    return entries


def _split_module(
    model: nn.Module,
    path: str,
    plan: ModulePlan,
    groups: ParallelGroups,
    entries: Mapping[str, RegionInput],
    randomness: RegionRandomness | None,
) -> None:
    module, comm = model.get_submodule(path), groups.tp
    split: nn.Module
    if plan.style == "replicate":
        module.register_forward_hook(_copy_outputs(comm, plan.copy_output))
        return
    if plan.style == "experts":
        assert plan.split is not None
        _sum_experts(module, comm)
        _split_experts(module, plan.split, comm.rank)
        return
    try:
        if plan.style == "vocab" and isinstance(module, nn.Embedding):
            split = VocabParallelEmbedding(module, comm, plan.split)
        elif plan.style in ("column", "vocab"):
            index = plan.expand[comm.rank] if plan.expand else None
            split = ColumnParallelLinear.from_linear(
                module,
                comm,
                plan.split,
                gather_output=plan.gather_output or plan.style == "vocab",
                entry=entries.get(path),
                expand=None if index is None else _feature_index(index, plan.expand_width),
            )
        elif plan.style == "row":
            split = RowParallelLinear.from_linear(module, comm, plan.split, input_is_parallel=not plan.split_input)
            split.randomness = None if plan.split_input else randomness
        else:
            raise ModelError(f"torch models cannot be split with the style {plan.style!r}.")
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, split)


def _distribute_experts(module: nn.Module, plan: Plan, module_plan: ModulePlan, groups: ParallelGroups) -> None:
    """Make a module compute the experts of this rank, or with etp its part of each of them."""
    assert module_plan.split is not None
    sends = plan.mesh.experts_send_tokens
    distribute_experts(module, groups.ep, module_plan.split, groups.tp, sends=sends)
    if not sends:
        _sum_experts(module, groups.tp)
    if plan.mesh.expert_tp > 1:
        down = plan.tensor(f"{module_plan.path}.down_proj")
        assert down.inner is not None
        _split_experts(module, down.inner, groups.ep.rank % plan.mesh.expert_tp)


def _split_experts(module: nn.Module, inner: Split, rank: int) -> None:
    """Make a module compute with a part of the inner width of its experts; the sum over the ranks follows."""
    if inner.local_size(rank) % 8 and hasattr(module, "config"):
        # The grouped kernels require rows of a multiple of 16 bytes.
        module.config = LocalConfig(module.config, PLAIN_EXPERTS)  # type: ignore[assignment]
    if module._parameters.get("down_proj_bias") is not None:
        module.register_forward_pre_hook(partial(_scale_bias, scale=0.0 if rank else 1.0))
        module.register_forward_hook(_show_bias, always_call=True)


def _feature_index(blocks: tuple[int, ...], width: int) -> Tensor:
    return torch.cat([torch.arange(block * width, (block + 1) * width, device="cpu") for block in blocks])


def _copy_outputs(comm: Communicator, count: int) -> Any:
    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        rest = output.shape[-1] - count
        return torch.cat([output[..., :rest], copy_to(output[..., rest:], comm)], -1)

    return hook


def _sum_experts(module: nn.Module, comm: Communicator) -> None:
    """Hooks of fused experts of which each rank computes a part: inputs with gradients enter the region, outputs are summed."""

    def enter(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        floats = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        # A router often computes in float32 in a model of another dtype. Each value enters in its own dtype, as it does
        # unsplit, and the ranks' gradients are summed in the widest.
        widest = floats[0].dtype
        for value in floats[1:]:
            widest = value.dtype if value.dtype.itemsize > widest.itemsize else widest

        def entered(value: Any) -> Any:
            return copy_to(value.to(widest), comm).to(value.dtype) if any(value is v for v in floats) else value

        return tuple(entered(a) for a in args), {key: entered(value) for key, value in kwargs.items()}

    def leave(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return reduce_from(output, comm)

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


def _scale_bias(module: nn.Module, args: object, scale: float) -> None:
    """Multiply the bias of experts' outputs while they compute: the outputs of the ranks are summed, so one rank adds it."""
    bias = module._parameters["down_proj_bias"]
    assert bias is not None
    vars(module)["_partita_bias"] = bias
    # The product keeps the bias in the graph, so that every rank takes part in the sum of its gradient; and at the same place
    # of the graph on each, so that this sum and other collectives are in one order.
    module._parameters["down_proj_bias"] = bias * scale  # type: ignore[assignment]


def _show_bias(module: nn.Module, args: object, output: object) -> None:
    module._parameters["down_proj_bias"] = vars(module).pop("_partita_bias")


def loop_over_quantized_experts(model: nn.Module) -> None:
    """Make modules with quantized experts compute one expert at a time: grouped kernels need the values of all."""
    for module in model.modules():
        held: list[Any] = list(module._parameters.values())
        if any(isinstance(one, QuantizedTensor) and one.dim() == 3 for one in held) and hasattr(module, "config"):
            module.config = LocalConfig(module.config, PLAIN_EXPERTS)  # type: ignore[assignment]


_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
_KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
_GROUP_COUNTS = ("num_key_value_groups", "n_rep", "num_kv_groups")
_HEAD_WIDTHS = ("split_size", "all_head_size")


class LocalConfig:
    """A view of a model's config with the head counts of one tensor rank; all other values are the config's own."""

    def __init__(self, config: Any, counts: Mapping[str, Any]) -> None:
        """Wrap a config and override its head counts with `counts`."""
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_counts", dict(counts))

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_counts"):
            raise AttributeError(name)
        return self._counts[name] if name in self._counts else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def _localize_heads(module: nn.Module, plan: AttentionPlan, rank: int) -> None:
    """Make an attention module use its rank's head counts everywhere."""
    heads, kv_heads = plan.local_heads(rank), plan.local_kv_heads(rank)
    for names, whole, local in (
        (_HEAD_COUNTS, plan.num_heads, heads),
        (_KV_HEAD_COUNTS, plan.num_kv_heads, kv_heads),
        (_GROUP_COUNTS, plan.num_heads // plan.num_kv_heads, heads // kv_heads),
    ):
        for name in names:
            if getattr(module, name, None) == whole:
                setattr(module, name, local)
    for name in _HEAD_WIDTHS:
        width = getattr(module, name, None)
        if isinstance(width, int) and width % plan.num_heads == 0:
            setattr(module, name, width // plan.num_heads * heads)
    config = getattr(module, "config", None)
    if config is not None and not isinstance(config, LocalConfig):
        counts = {name: heads for name in _HEAD_COUNTS if getattr(config, name, None) == plan.num_heads}
        counts |= {name: kv_heads for name in _KV_HEAD_COUNTS if getattr(config, name, None) == plan.num_kv_heads}
        module.config = LocalConfig(config, counts)  # type: ignore[assignment]


def _split_bare_parameters(homes: Mapping[str, tuple[nn.Module, str]], plan: Plan, groups: ParallelGroups) -> None:
    """Split the tensors of modules that are not replaced: fused experts, and tensors with one row per head."""
    for name, cut in plan.cuts.items():
        if cut.split is None or cut.dim is None or name not in homes:
            continue
        module, attribute = homes[name]
        tensor: Tensor = getattr(module, attribute)
        if tuple(tensor.shape) != cut.local_shape(groups.part(cut)):
            for dim, split, place in cut.split_dims(groups.part(cut)):
                tensor = slice_parameter(tensor, dim, split.ranges(place))
            module._parameters[attribute] = tensor  # type: ignore[assignment]


def sum_partial_gradients(homes: Mapping[str, tuple[nn.Module, str]], plan: Plan, groups: ParallelGroups) -> None:
    """Sum the gradients of parameters for which each rank computes only a part."""
    for name, cut in plan.cuts.items():
        if not cut.partial_grad or name not in homes or plan.spec.tensors[name].tied_to in homes:
            continue
        parameter = getattr(*homes[name])
        if isinstance(parameter, QuantizedTensor):
            continue
        if cut.split is None or cut.dim is None:
            sum_gradient(parameter, groups.along(cut))
        else:
            sum_shared_gradient(parameter, groups.along(cut), cut.dim, cut.split)
