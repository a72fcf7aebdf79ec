"""The optimizer of a run over this rank's trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.optimizers import is_hidden_matrix
from partita.core.sharding.cuts import TensorPlan
from partita.errors import ModelError, PlanError
from partita.notes import note
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.layers.inner import take_ranges
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.training.momentum import Gather, MasterSGD, SplitMuon
from partita.torch.training.optimizer import MasterAdamW, state_dtype
from partita.torch.training.sharded import ShardedOptimizer
from partita.training.settings import TrainSettings


def make_optimizer(
    model: nn.Module, settings: TrainSettings, groups: ParallelGroups
) -> torch.optim.Optimizer | ShardedOptimizer | None:
    """The optimizer of `settings` over this rank's trainable parameters, None if there are none; norms and biases do not decay.

    Parameters narrower than float32 have float32 master weights and moments, unless `settings.master_dtype` is `model`. With
    `settings.zero` and several replicas it steps this replica's shards.

    Raises:
        ModelError: No rank has trainable parameters, or the model's parameters cannot be gathered layer by layer.
        PlanError: The optimizer's state cannot be distributed over the replicas.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "muon" and settings.zero:
        raise PlanError(
            "zero distributes the elements of each parameter over the replicas, but muon orthogonalizes unsplit matrices. Use "
            "optimizer adamw or sgd with zero, or leave zero out."
        )
    if not any(groups.pp.all_gather_object(bool(parameters))):
        raise ModelError("no parameter of the model is trainable: all have requires_grad=False.")
    if not parameters:
        return None
    kind, given = _kind_of(parameters, settings)
    if settings.optimizer == "muon":
        return _muon(model, parameters, settings, given)
    split = _by_decay(parameters, settings, master_dtype=settings.master_dtype)
    if settings.zero and groups.replicas.size == 1 and groups.rank == 0:
        note(
            f"zero={settings.zero} has no effect: it distributes states over replicas (dp and cp), but the mesh {groups.mesh} "
            "has one."
        )
    if not settings.zero or groups.replicas.size == 1:
        optimizer: torch.optim.Optimizer = kind(split, **given)
        return optimizer
    return ShardedOptimizer(model, settings.zero, partial(kind, **given), split)


def _by_decay(parameters: Sequence[Tensor], settings: TrainSettings, **more: Any) -> list[dict[str, Any]]:
    decay = {True: settings.weight_decay, False: 0.0}
    split = [
        {"params": [p for p in parameters if (p.dim() >= 2) is has], "weight_decay": decay[has], **more}
        for has in (True, False)
    ]
    return [group for group in split if group["params"]]


def _kind_of(parameters: Sequence[Tensor], settings: TrainSettings) -> tuple[Any, dict[str, Any]]:
    """The class of the optimizer, and its arguments."""
    if settings.optimizer == "sgd":
        return MasterSGD, {"lr": settings.learning_rate, "momentum": settings.momentum}
    given = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
    has_masters = any(state_dtype(p.dtype, settings.master_dtype) != p.dtype for p in parameters)
    return MasterAdamW if has_masters else torch.optim.AdamW, given


def _muon(
    model: nn.Module, parameters: Sequence[Tensor], settings: TrainSettings, given: dict[str, Any]
) -> torch.optim.Optimizer:
    plan, groups = plan_of(model)
    local = local_tensors(model, plan)
    matrices = {id(t): plan.tensor(n) for n, t in local.items() if is_hidden_matrix(n, plan.spec)}
    gather = {
        place: _gather_of(cut, groups)
        for place, cut in matrices.items()
        if cut.split is not None and groups.along(cut).size > 1
    }
    split = [
        {
            "params": [p for p in parameters if id(p) in matrices], "weight_decay": settings.weight_decay,
            "momentum": settings.momentum, "matrix": True,
        },
        *_by_decay([p for p in parameters if id(p) not in matrices], settings, matrix=False),
    ]  # fmt: skip
    split = [{**group, "master_dtype": settings.master_dtype} for group in split if group["params"]]
    return SplitMuon(split, gather, **given)


def _gather_of(cut: TensorPlan, groups: ParallelGroups) -> Gather:
    def gather(part: Tensor) -> tuple[Tensor, Any]:
        dim, split = cut.dim, cut.split
        assert dim is not None
        assert split is not None

        def own(unsplit: Tensor) -> Tensor:
            return take_ranges(unsplit, [split.ranges(groups.part(cut))], dim)

        return groups.along(cut).gather_split(part.contiguous(), dim, split), own

    def gather_both(part: Tensor) -> tuple[Tensor, Any]:
        ranges = cut.ranges(groups.part(cut))
        places = [torch.cat([torch.arange(*one, device=part.device) for one in held]) for held in ranges]
        unsplit = part.new_zeros(cut.shape)
        unsplit[torch.meshgrid(*places, indexing="ij")] = part
        return groups.along(cut).all_reduce_(unsplit), lambda whole: take_ranges(whole, ranges)

    return gather if cut.inner is None else gather_both
