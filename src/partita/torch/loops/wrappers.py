"""Classes of torch that wrap a model or its tensors: exact on a split model, or refused."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import convert_parameters, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from partita.errors import ModelError
from partita.torch.loops.members import model_of, only_groups, split_names
from partita.torch.model.parts import plan_of


def install() -> None:
    """Wrap the classes once; each behaves as before with anything but a split model."""
    _before(DistributedDataParallel, "__init__", _replicas_only)
    _before(nn.DataParallel, "__init__", functools.partial(_refuse_to_shard, "module"))
    _before(parametrize.ParametrizationList, "__init__", _refuse_parametrization)
    for owner in (WeightNorm, SpectralNorm, BasePruningMethod):
        _before(owner, "apply", _refuse_hook)
    _before(convert_parameters, "_check_param_device", _refuse_vector)
    _share_found_infinities()


_FSDP = (
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "module"),
    ("torch.distributed.fsdp._fully_shard._fsdp_param_group", "FSDPParamGroup", "params"),
)


def refuse_fsdp() -> None:
    """Wrap FSDP's classes if the program has imported them, which takes two seconds. `watch` finds later ones in forward."""
    for module, name, argument in _FSDP:
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and not hasattr(cls.__init__, "__wrapped__"):
            _before(cls, "__init__", functools.partial(_refuse_to_shard, argument))


def _before(owner: Any, name: str, check: Callable[[dict[str, Any]], None]) -> None:
    """Call `check` with the arguments of `owner.name` by name, which it may change, before it runs."""
    found = inspect.getattr_static(owner, name)
    kind = type(found) if isinstance(found, (staticmethod, classmethod)) else None
    original = found.__func__ if kind is not None else found
    signature = inspect.signature(original)

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        check(bound.arguments)
        return original(*bound.args, **bound.kwargs)

    setattr(owner, name, kind(checked) if kind is not None else checked)


def _replicas_only(given: dict[str, Any]) -> None:
    """Reduce gradients over the replicas: the ranks of dp hold the same part, all others hold another one."""
    model = model_of(given["module"].parameters())
    if model is None:
        return
    groups = plan_of(model)[1]
    if groups.mesh.experts_join_replicas:
        raise ModelError(
            f"DistributedDataParallel would make the replicas equal, but with ep={groups.mesh.ep} they hold different experts. "
            "Use partita.torch.train, or no ep."
        )
    mesh = given.get("device_mesh")
    group = mesh.get_group(0) if mesh is not None else given.get("process_group")
    if group is None:
        given["process_group"] = groups.dp.group
    elif set(dist.get_process_group_ranks(group)) != set(groups.dp.global_ranks):
        raise ModelError(
            f"process_group has the ranks {dist.get_process_group_ranks(group)}, but the replicas of this part are on "
            f"the ranks {list(groups.dp.global_ranks)}. Leave it out, or pass partita.torch.plan_of(model)[1].dp.group."
        )


def _refuse_to_shard(name: str, given: dict[str, Any]) -> None:
    module = given[name]
    if model_of(module.parameters() if isinstance(module, nn.Module) else module) is not None:
        raise ModelError(
            "FSDP and DataParallel replace a split model's parameters, and would drop the sums of their gradients over the "
            "tensor ranks. Use DistributedDataParallel over dp, partita.torch.train(..., TrainSettings(zero=3)), or more tp "
            "or pp ranks."
        )


def _refuse_parametrization(given: dict[str, Any]) -> None:
    _refuse_if_split([given["original"]], "A parametrization")


def _refuse_hook(given: dict[str, Any]) -> None:
    module, name = given["module"], given.get("name", "weight")
    _refuse_if_split([getattr(module, name, None)], "A weight norm, spectral norm or pruning")


def _refuse_vector(given: dict[str, Any]) -> None:
    parameter = given["param"]
    model = model_of([parameter])
    if model is not None:
        raise ModelError(
            "parameters_to_vector and vector_to_parameters would see this rank's part of the model only. Use "
            "torch.nn.utils.get_total_norm or partita.torch.clip_grad_norm_ for norms, and partita.torch.save for all values."
        )


def _refuse_if_split(tensors: list[Any], what: str) -> None:
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    model = model_of(found)
    names = split_names(model, found) if model is not None else []
    if names:
        raise ModelError(
            f"{what} of {names[0]} would be computed from this rank's part of it. Apply it to the unsplit model and remove it "
            "(so that plain weights are left) before you split the model."
        )


def _share_found_infinities() -> None:
    """Skip a step of a scaled loss on all ranks if any rank's gradient is infinite or NaN."""
    original = GradScaler._unscale_grads_

    @functools.wraps(original)
    def unscale(
        self: GradScaler, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found = original(self, optimizer, inv_scale, found_inf, allow_fp16)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        model = model_of(parameters)
        groups = plan_of(model)[1] if model is not None else only_groups() if not parameters else None
        if groups is None:
            return found
        found = found or {found_inf.device: found_inf}
        worst = torch.stack([one.to(found_inf.device) for one in found.values()]).max().reshape(1)
        for comm in (groups.tp, groups.pp):
            worst = comm.all_gather(worst, 0).max().reshape(1)
        for one in found.values():
            one.copy_(worst.view_as(one))
        return found

    GradScaler._unscale_grads_ = unscale  # type: ignore[method-assign]
