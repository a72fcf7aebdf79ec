"""Gradients over the ranks: summed over those with copies, and clipped by the norm of the unsplit model's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.parts import distributed_experts, plan_of
from partita.torch.training.norms import expert_part, owned_parts, unsplit_norm

BUCKET_BYTES = 25 << 20
"""Approximate size of the buffers in which replicas exchange gradients."""


def by_copies(model: nn.Module) -> list[tuple[list[Tensor], Communicator]]:
    """The trainable parameters of a split model, with the ranks that hold copies of them: replicas, or ranks with the same
    experts.

    The loss is a sum over all replicas, and the experts of a rank see the tokens of several. So in both cases the gradient of
    the loss is the sum over the copies, without another factor.
    """
    plan, groups = plan_of(model)
    experts = distributed_experts(model, plan)
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    kinds = [([p for p in trained if id(p) not in experts], groups.replicas)]
    return [*kinds, ([p for p in trained if id(p) in experts], groups.edp)] if plan.mesh.ep > 1 else kinds


@torch.no_grad()
def start_alike(parameters: Sequence[Tensor], comm: Communicator) -> None:
    """Copy parameters that differ between replicas, such as another library's adapters, from the first replica."""
    if comm.size == 1 or not parameters:
        return
    # Compare sums instead of the values, which may be large.
    sums = torch.stack(
        [torch.stack((p.sum(dtype=torch.float64), p.abs().sum(dtype=torch.float64))).cpu() for p in parameters]
    ).to(parameters[0].device)
    differs = (sums != comm.broadcast_(sums.clone())).any(1).int()
    for parameter, one in zip(parameters, comm.all_reduce_(differs).tolist(), strict=True):
        if one:
            parameter.copy_(comm.broadcast_(parameter.detach().clone(memory_format=torch.contiguous_format)))


def sum_gradients(parameters: Sequence[Tensor], comm: Communicator) -> None:
    """Sum the parameters' gradients over the replicas.

    A gradient that a replica lacks because it skipped a layer counts as zero if another replica has it.
    """
    if comm.size == 1 or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    for parameter, anywhere in zip(parameters, comm.all_reduce_(has).tolist(), strict=True):
        if anywhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_over_replicas([parameter.grad for parameter in parameters], comm)


def sum_over_replicas(grads: Iterable[Tensor | None], comm: Communicator) -> None:
    """Sum gradients over the data parallel ranks in place, bucketed, in float32 or wider."""
    if comm.size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        if grad is not None:
            by_dtype.setdefault(grad.dtype, []).append(grad)
    for dtype, same in by_dtype.items():
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        for bucket in _buckets(same):
            flat = comm.all_reduce_(torch.cat([grad.reshape(-1) for grad in bucket]).to(wide))
            for grad, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(summed.view_as(grad))


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        bucket.append(grad)
        size += grad.numel() * grad.itemsize
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@torch.no_grad()
def clip_gradients(model: nn.Module, plan: Plan, groups: ParallelGroups, clip_norm: float) -> float:
    """Scale the gradients so that the norm of the unsplit model's gradient is at most `clip_norm`; returns the norm before
    clipping.

    Each element counts once: on the rank that owns it.
    """
    owned, experts = owned_parts(model, plan, groups), distributed_experts(model, plan)
    found = [(p.grad, owned[id(p)], id(p) in experts) for p in model.parameters() if p.grad is not None]
    dense, sent = ([(grad, places) for grad, places, is_expert in found if is_expert is kind] for kind in (False, True))
    norm = float(unsplit_norm(dense, 2.0, (groups.tp, groups.pp), *expert_part(sent, groups))[0])
    if clip_norm and norm > clip_norm:
        scale = clip_norm / (norm + 1e-6)
        for grad, *_ in found:
            grad.mul_(scale)
    return norm
