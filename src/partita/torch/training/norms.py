"""Norms of the unsplit model from the ranks' parts: each element counts once, on the rank that owns it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.layers.embedding import VocabParallelEmbedding
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.model.parts import local_tensors, unsplit_name
from partita.torch.stages.copies import copies_of

Places = tuple[tuple[int, int, int], ...] | None
"""The part of a local tensor that a rank owns, as arguments of `narrow`: dim, start, length. None for all of it."""


def owned_parts(model: nn.Module, plan: Plan, groups: ParallelGroups) -> dict[int, Places]:
    """The part of each parameter of a split model that this rank owns, by the parameter's `id`.

    A replicated parameter is owned by the first tensor rank, a copy of another stage's by the first stage that holds it. An
    adapter is split with its layer (see `layers.lora`). A parameter that was added to the model later, outside of its
    layers, is on every rank.
    """
    local = local_tensors(model, plan)
    split = {id(t) for name, t in local.items() if plan.tensor(name).split is not None}
    known = {id(t) for t in local.values()}
    copies = {id(t) for name, t in copies_of(model, plan, groups).items() if plan.copies[name][0] != groups.pp.rank}
    wrapped = {
        id(p)
        for module in model.modules()
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding))
        for p in module.parameters()
    }
    owned: dict[int, Places] = {}
    for name, parameter in model.named_parameters():
        places: Places = getattr(parameter, "_partita_owned", None)
        key = id(parameter)
        if groups.tp.rank > 0 and places is None and key not in split and (key in known or key not in wrapped):
            places = ()
        if key in copies or (groups.pp.rank > 0 and key not in known and not _is_of_plan(name, plan)):
            places = ()
        owned[key] = places
    return owned


def _is_of_plan(name: str, plan: Plan) -> bool:
    """Whether a parameter that the plan does not name belongs to a module of the plan, as an adapter does."""
    parts = unsplit_name(name).split(".")
    return any(".".join(parts[:n]) in plan.spec.modules for n in range(1, len(parts)))


Parts = tuple[Iterable[tuple[Tensor, Places]], Iterable[Communicator]]
"""This rank's parts of tensors, with what it owns of each, and the groups over which these tensors are split."""


def expert_part(
    tensors: Iterable[tuple[Tensor, Places]], groups: ParallelGroups, *shards: Communicator
) -> tuple[Parts, ...]:
    """Parts of distributed experts for `unsplit_norm`; none if experts are not distributed."""
    return ((tensors, (*shards, groups.ep, groups.pp)),) if groups.mesh.ep > 1 else ()


def unsplit_norm(
    tensors: Iterable[tuple[Tensor, Places]], norm_type: float, axes: Iterable[Communicator], *more: Parts
) -> tuple[Tensor, torch.dtype]:
    """The norm of the unsplit tensors as one vector, the same on every rank. Every rank of `axes` must call it.

    Args:
        tensors: This rank's parts, with what it owns of each.
        norm_type: The order of the norm: any number but 0, also inf and -inf.
        axes: The tensor and the pipeline group.
        more: Tensors that are split over other groups.

    Returns:
        A scalar in float64, and the dtype to show it in: float64 if any rank has a float64 tensor, else float32.

    Raises:
        ModelError: `norm_type` is 0 or NaN.
    """
    order = float(norm_type)
    if order == 0 or math.isnan(order):
        raise ModelError(
            f"norm_type is {order:g}, for which torch counts tensors; a split model needs another number, such as 2."
        )
    every = [(list(some), groups) for some, groups in ((tensors, axes), *more)]
    device = next((tensor.device for some, _ in every for tensor, _ in some), torch.device("cpu"))
    rows = torch.cat([_rows(some, order, groups, device) for some, groups in every])
    return _combined(rows[:, 0], order), torch.float64 if bool((rows[:, 1] == 8).any()) else torch.float32


def _rows(
    found: list[tuple[Tensor, Places]], order: float, axes: Iterable[Communicator], device: torch.device
) -> Tensor:
    """For each rank of `axes` the norm of its parts, and the bytes of their widest dtype."""
    norms = [torch.linalg.vector_norm(part, order, dtype=torch.float64).to(device) for part in _owned(found)]
    nothing = torch.tensor(math.inf if order < 0 else 0.0, dtype=torch.float64, device=device)
    total = _combined(torch.stack(norms), order) if norms else nothing
    width = max((tensor.dtype.itemsize for tensor, _ in found), default=0)
    # Not a reduction by MAX, which may lose NaN.
    rows = torch.stack((total, torch.full_like(total, width))).unsqueeze(0)
    for comm in axes:
        rows = comm.all_gather(rows, 0)
    return rows


def _combined(norms: Tensor, order: float) -> Tensor:
    """The norm of order `order` of the vectors that have the norms `norms`, all of which are at least 0."""
    if order == math.inf:
        return norms.max()
    if order == -math.inf:
        return norms.min()
    total: Tensor = torch.linalg.vector_norm(norms, order)
    return total


def _owned(tensors: Iterable[tuple[Tensor, Places]]) -> Iterator[Tensor]:
    for tensor, places in tensors:
        if places is None:
            yield tensor
        else:
            yield from (tensor.narrow(*place) for place in places if place[2])
