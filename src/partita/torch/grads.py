"""Gradients of parameters that several ranks hold, each of which sees only a part of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partita.core.split import Split
from partita.torch.comm import Communicator
from partita.torch.mappings import reduce_from


def sum_gradient(parameter: nn.Parameter, comm: Communicator) -> None:
    """Let every gradient of `parameter`, which all ranks hold whole, be the sum of what the ranks see of it."""
    if comm.size > 1:
        parameter.register_hook(lambda grad: reduce_from(grad, comm))
        parameter._partita_summed = True  # type: ignore[attr-defined]


def sum_shared_gradient(parameter: nn.Parameter, comm: Communicator, dim: int, split: Split) -> None:
    """Let the gradient of what more than one rank holds of `parameter` along `dim` be the sum over those ranks.

    The shared ranges travel in one buffer in which every rank fills its own and leaves the others zero.
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

    parameter.register_hook(hook)
    parameter._partita_summed = True  # type: ignore[attr-defined]


def _shared_places(split: Split, rank: int) -> tuple[Tensor, Tensor]:
    """Of the shared elements that `rank` holds: their places in the buffer of all shared ones, and in its local tensor."""
    places, held, offset = [], [], 0
    for start, stop in split.shared_ranges:
        for index in range(start, stop):
            local = split.to_local(rank, index)
            if local is not None:
                places.append(offset + index - start)
                held.append(local)
        offset += stop - start
    return torch.tensor(places, dtype=torch.long), torch.tensor(held, dtype=torch.long)
