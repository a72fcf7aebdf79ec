"""Parameters that several pipeline stages hold, such as a head tied to the embedding. Their gradients are summed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.parts import local_tensors


def copies_of(model: nn.Module, plan: Plan, groups: ParallelGroups) -> dict[str, Tensor]:
    """This rank's copies of tensors that several pipeline ranks hold, by the name of the tensor that the others are tied to."""
    local = local_tensors(model, plan)
    found = {}
    for name, holders in plan.copies.items():
        if groups.pp.rank in holders:
            twins = (name, *(n for n, t in plan.spec.tensors.items() if t.tied_to == name))
            found[name] = next(local[n] for n in twins if n in local)
    return found


@contextmanager
def summed_copies(model: nn.Module, plan: Plan, groups: ParallelGroups) -> Iterator[None]:
    """Sum the gradients that backward inside the context adds to copies over the stages, on every stage."""
    if not plan.copies:
        yield
        return
    copies = {name: p for name, p in copies_of(model, plan, groups).items() if p.requires_grad}
    for name, parameter in copies.items():
        # Earlier gradients are equal on all stages. The first one keeps them, so that what reduces gradients over the replicas
        # in backward (DistributedDataParallel) sees them.
        if plan.copies[name][0] != groups.pp.rank:
            parameter.grad = None
    yield
    with torch.no_grad():
        for name, parameter in copies.items():
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            wide = own.clone() if own.dtype.itemsize >= 4 else own.float()
            total = _sum(wide, plan.copies[name], groups).to(own.dtype)
            parameter.grad = total if parameter.grad is None else parameter.grad.copy_(total)


def _sum(own: Tensor, holders: tuple[int, ...], groups: ParallelGroups) -> Tensor:
    """The sum over the pipeline ranks `holders`, in their order, on each of them."""
    comm, rank = groups.pp, groups.pp.rank
    owner, *others = holders
    if rank != owner:
        comm.send(own, owner)
        return comm.recv_(own, owner)
    for other in others:
        own += comm.recv_(torch.empty_like(own), other)
    for other in others:
        comm.send(own, other)
    return own
