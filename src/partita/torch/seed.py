"""The functions of `ml.models.parallel`: the mappings on the default model parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from partita.errors import DistributedError
from partita.torch.collectives import mappings
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import parallel_group_info


def mp_copy(x: Tensor, op: Any = dist.ReduceOp.SUM, *, group: Communicator | None = None) -> Tensor:
    """Copy into the model parallel region: forward as it is, backward reduces the gradient over the ranks.

    Args:
        x: `(*)`, the same on every rank.
        op: How gradients are reduced: SUM, AVG, MAX or MIN.
        group: The ranks (default: `parallel_group_info().mp`).

    Returns:
        `(*)`.
    """
    mappings.check_op(op)
    return mappings.copy_to(x, _group(group), op)


def mp_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, *, group: Communicator | None = None) -> Tensor:
    """Reduce from the model parallel region: forward reduces over the ranks, backward is the gradient as it is.

    With AVG the gradient is divided by the ranks; with MAX and MIN it goes to the ranks that hold the extremum.

    Args:
        x: `(*)`, different on each rank; not modified.
        op: SUM, AVG, MAX or MIN.
        group: The ranks (default: `parallel_group_info().mp`).

    Returns:
        `(*)`, the same on every rank.
    """
    mappings.check_op(op)
    return mappings.reduce_from(x, _group(group), op)


def mp_scatter(
    x: Tensor, dim: int = -1, *, sizes: Sequence[int] | None = None, group: Communicator | None = None
) -> Tensor:
    """Scatter over the model parallel ranks: forward takes this rank's part, backward gathers.

    Args:
        x: `(..., N, ...)`, the same on every rank.
        dim: The dimension to distribute.
        sizes: Size of each rank's part (default: `N / world_size`, which must be an integer).
        group: The ranks (default: `parallel_group_info().mp`).

    Returns:
        `(..., N / world_size, ...)`, or `(..., sizes[rank], ...)`.
    """
    _check_dim(x, dim)
    comm = _group(group)
    mappings.whole_sizes(x, comm, dim, sizes)
    return mappings.scatter_to(x, comm, dim, sizes)


def mp_gather(
    x: Tensor, dim: int = -1, *, sizes: Sequence[int] | None = None, group: Communicator | None = None
) -> Tensor:
    """Gather from the model parallel ranks: forward concatenates the parts, backward takes this rank's part.

    Args:
        x: `(..., N, ...)`, different on each rank.
        dim: The dimension of concatenation.
        sizes: Each rank's `N` if they differ.
        group: The ranks (default: `parallel_group_info().mp`).

    Returns:
        `(..., N * world_size, ...)`, or `(..., sum(sizes), ...)`.
    """
    _check_dim(x, dim)
    comm = _group(group)
    mappings.part_sizes(x, comm, dim, sizes)
    return mappings.gather_from(x, comm, dim, sizes)


def _check_dim(x: Tensor, dim: int) -> None:
    if not -x.dim() <= dim < x.dim():
        raise DistributedError(f"dim must be in [{-x.dim()}, {x.dim()}) for x of shape {tuple(x.shape)}; got {dim}.")


def _group(group: Communicator | None) -> Communicator:
    return group if group is not None else parallel_group_info().mp.comm
