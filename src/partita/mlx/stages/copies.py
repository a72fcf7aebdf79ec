"""Parameters that several pipeline stages hold, such as an embedding that is also the head. Their gradients are summed."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from partita.core.plan import Plan
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.stages.cut import stages_of


def elsewhere(model: nn.Module, plan: Plan, groups: ParallelGroups) -> set[str]:
    """Names of arrays that this rank holds and another pipeline rank owns."""
    if plan.num_stages == 1:
        return set()
    rank = groups.pp.rank
    return {name for name, holders in stages_of(model).copies.items() if rank in holders and holders[0] != rank}


def sum_copies(gradients: dict[str, mx.array], model: nn.Module, plan: Plan, groups: ParallelGroups) -> None:
    """Let the gradients of copies be the sum over the stages on each, in place; every rank of the pipeline calls it."""
    if plan.num_stages == 1:
        return
    for name, holders in sorted(stages_of(model).copies.items()):
        if name in gradients and len(holders) > 1:
            own = gradients[name]
            wide = own if own.dtype.size >= 4 else own.astype(mx.float32)
            gradients[name] = _sum(wide, holders, groups.pp).astype(own.dtype)


def _sum(own: mx.array, holders: tuple[int, ...], pp: Communicator) -> mx.array:
    """The sum over the pipeline ranks `holders`, in their order, on each of them."""
    owner, *others = holders
    if pp.rank != owner:
        pp.send(own, owner)
        return pp.recv(own.shape, own.dtype, owner)
    for other in others:
        own = own + pp.recv(own.shape, own.dtype, other)
    for other in others:
        pp.send(own, other)
    return own
