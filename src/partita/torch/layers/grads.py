"""Gradients of parameters that several ranks hold, where each rank computes only a part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from partita.core.sharding.split import Split
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.mappings import reduce_from


def sum_gradient(parameter: nn.Parameter, comm: Communicator) -> None:
    """Sum every gradient of `parameter`, which is replicated on all ranks, over the ranks."""
    if comm.size > 1:
        _register(parameter, lambda grad: reduce_from(grad, comm))
        parameter._partita_owned = () if comm.rank else None  # type: ignore[attr-defined]


def sum_shared_gradient(parameter: nn.Parameter, comm: Communicator, dim: int, split: Split) -> None:
    """Sum the gradient of the ranges of `parameter` along `dim` that several ranks hold over those ranks.

    One buffer carries the shared ranges; every rank fills its own and leaves the others zero.
    """
    shared = split.shared_ranges
    if comm.size == 1 or not shared:
        return
    places, held = _shared_places(split, comm.rank)

    def hook(grad: Tensor) -> Tensor:
        shape = list(grad.shape)
        shape[dim] = sum(stop - start for start, stop in shared)
        mine = held.to(grad.device)
        there = places.to(grad.device)
        buffer = grad.new_zeros(shape).index_copy(dim, there, grad.index_select(dim, mine))
        total = reduce_from(buffer, comm)
        return grad.index_copy(dim, mine, total.index_select(dim, there))

    _register(parameter, hook)
    parameter._partita_owned = owned_places(split, comm.rank, dim)  # type: ignore[attr-defined]


def owned_places(split: Split, rank: int, dim: int) -> tuple[tuple[int, int, int], ...]:
    """The part of its local tensor that `rank` owns, as arguments of `narrow`: dim, start, length."""
    spans = split.owned_ranges(rank)
    return tuple((dim, split.to_local(rank, start) or 0, stop - start) for start, stop in spans)


def _register(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor]) -> None:
    """Register `hook` on a parameter, even a frozen one, which may be trained later. Deep copies keep the hook."""
    trained = parameter.requires_grad
    parameter.requires_grad_(True).register_hook(hook)
    parameter.requires_grad_(trained)

    def copy(memo: dict[int, object]) -> nn.Parameter:
        twin = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        memo[id(parameter)] = twin
        _register(twin, hook)
        twin._partita_owned = getattr(parameter, "_partita_owned", None)  # type: ignore[attr-defined]
        return twin

    parameter.__deepcopy__ = copy  # type: ignore[method-assign]


def _shared_places(split: Split, rank: int) -> tuple[Tensor, Tensor]:
    """The shared elements that `rank` holds: their indices in the buffer of all shared elements, and in its local tensor."""
    places, held, offset = [], [], 0
    for start, stop in split.shared_ranges:
        for index in range(start, stop):
            local = split.to_local(rank, index)
            if local is not None:
                places.append(offset + index - start)
                held.append(local)
        offset += stop - start
    return torch.tensor(places, dtype=torch.long), torch.tensor(held, dtype=torch.long)
