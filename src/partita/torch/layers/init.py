"""Initial weights of sharded layers, which do not depend on how they are sharded."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from partita.core.sharding.split import Split, check_sizes
from partita.errors import PlanError
from partita.torch.collectives.groups import parallel_group_info

InitType = Literal[
    "orthogonal", "normal", "biased_normal", "uniform", "kaiming_uniform", "kaiming_normal", "xavier_uniform",
    "xavier_normal", "trunc_normal", "dirac", "constant", "zeros", "ones",
]  # fmt: skip

STD = 0.02
"""Standard deviation of `normal`, `biased_normal` and `trunc_normal`."""
CONSTANT = 0.01
"""The value of `constant`."""
BLOCK_ELEMENTS = 1 << 24
"""Larger weights are sampled in blocks of complete rows of about this many elements, so that no rank holds them unsplit."""


def check_init_type(init_type: str) -> None:
    """Raise `PlanError` unless `init_type` is one of the 13 kinds."""
    if init_type not in get_args(InitType):
        raise PlanError(f"init_type must be one of {', '.join(get_args(InitType))}; got {init_type!r}.")


def initialize_model_parallel_affine_weight_(
    weight: Tensor,
    out_features: int,
    in_features: int,
    per_partition_size: int,
    partition_dim: int,
    init_type: InitType = "xavier_normal",
    stride: int = 1,
    *,
    rank: int | None = None,
    world_size: int | None = None,
) -> None:
    """Fill this rank's part of an affine weight; the unsplit weight does not depend on the mesh.

    Every rank samples the unsplit `[out_features, in_features]` weight from torch's default generator (block by block if it
    is large) and keeps its part: with the same seed on every rank the unsplit weight is the same for any number of ranks.

    Args:
        weight: This rank's part, changed in place: `[per_partition_size, in_features]` for `partition_dim` 0,
            `[out_features, per_partition_size]` for 1.
        out_features: Rows of the unsplit weight.
        in_features: Columns of the unsplit weight.
        per_partition_size: This rank's size of the dimension that is split.
        partition_dim: The dimension to split, 0 or 1.
        init_type: Distribution of the unsplit weight.
        stride: Number of segments of the split dimension; a rank has its part of each.
        rank: Rank in the model parallel group (default: that of `parallel_group_info().mp`).
        world_size: Number of ranks in the group (default: likewise).

    Raises:
        PlanError: A size does not fit the others, or `init_type` is unknown.

    Source: `ml.models.parallel.initialize_model_parallel_affine_weight_`.
    """
    if rank is None or world_size is None:
        group = parallel_group_info().mp
        rank, world_size = group.rank, group.world_size
    if partition_dim not in (0, 1):
        raise PlanError(f"partition_dim must be 0 or 1; got {partition_dim}.")
    check_sizes(out_features=out_features, in_features=in_features)
    split = strided_split((out_features, in_features)[partition_dim], world_size, stride)
    if split.local_size(rank) != per_partition_size:
        raise PlanError(
            f"per_partition_size must be {split.local_size(rank)} on rank {rank} of {world_size}; got {per_partition_size}."
        )
    shape = (per_partition_size, in_features) if partition_dim == 0 else (out_features, per_partition_size)
    if weight.shape != shape:
        raise PlanError(f"weight must be {shape} on rank {rank} of {world_size}; got {tuple(weight.shape)}.")
    init_affine_(weight, (out_features, in_features), partition_dim, split.ranges(rank), init_type)


def strided_split(size: int, parts: int, stride: int = 1) -> Split:
    """The split of `size` over `parts` ranks in `stride` equal segments; a rank has its part of each."""
    if stride < 1 or size % stride:
        raise PlanError(f"stride must divide the split dimension ({size}); got {stride}.")
    return Split.even(size, parts, segments=(size // stride,) * stride)


@torch.no_grad()
def init_affine_(
    weight: Tensor, shape: tuple[int, int], dim: int, ranges: tuple[tuple[int, int], ...], init_type: InitType
) -> None:
    """Fill `weight`, the part `ranges` along `dim` of an unsplit weight of `shape`, with `init_type`."""
    check_init_type(init_type)
    whole_kinds = ("orthogonal", "dirac")
    rows, columns = shape
    block_rows = rows if init_type in whole_kinds else max(1, BLOCK_ELEMENTS // max(1, columns))
    # torch cannot orthogonalize in half precision.
    dtype = torch.float32 if init_type == "orthogonal" and weight.dtype.itemsize < 4 else weight.dtype
    done = 0
    for start in range(0, rows, block_rows):
        stop = min(rows, start + block_rows)
        block = torch.empty(stop - start, columns, dtype=dtype, device=weight.device)
        _fill_(block, shape, init_type)
        if dim == 1:
            weight[start:stop] = torch.cat([block[:, a:b] for a, b in ranges], 1)
        else:
            # The ranges of a rank ascend, so its rows appear in local order.
            for a, b in ranges:
                mine = block[max(a, start) - start : max(0, min(b, stop) - start)]
                if a < stop and b > start:
                    weight[done : done + len(mine)] = mine
                    done += len(mine)


def init_bias_(bias: Tensor, init_type: InitType, size: int, ranges: tuple[tuple[int, int], ...]) -> None:
    """Fill this rank's `ranges` of a bias of `size`: zeros, or as the weight for `biased_normal`."""
    with torch.no_grad():
        if init_type == "biased_normal":
            whole = torch.empty(size, dtype=bias.dtype, device=bias.device).normal_(0.0, STD)
            bias.copy_(torch.cat([whole[a:b] for a, b in ranges]))
        else:
            bias.zero_()


def _fill_(block: Tensor, shape: tuple[int, int], init_type: InitType) -> None:
    out_features, in_features = shape
    fans = in_features + out_features
    if init_type in ("normal", "biased_normal"):
        block.normal_(0.0, STD)
    elif init_type == "uniform":
        block.uniform_(0.0, 1.0)
    elif init_type == "kaiming_uniform":
        bound = math.sqrt(6.0 / in_features)
        block.uniform_(-bound, bound)
    elif init_type == "kaiming_normal":
        block.normal_(0.0, math.sqrt(2.0 / in_features))
    elif init_type == "xavier_uniform":
        bound = math.sqrt(6.0 / fans)
        block.uniform_(-bound, bound)
    elif init_type == "xavier_normal":
        block.normal_(0.0, math.sqrt(2.0 / fans))
    elif init_type == "trunc_normal":
        nn.init.trunc_normal_(block, 0.0, STD, -2 * STD, 2 * STD)
    elif init_type == "orthogonal":
        nn.init.orthogonal_(block)
    elif init_type == "dirac":
        nn.init.dirac_(block.unsqueeze(-1))
    else:
        block.fill_({"constant": CONSTANT, "zeros": 0.0, "ones": 1.0}[init_type])
