"""Attention of rows that every rank has to keys that are distributed over the ranks.

Each rank computes the attention to its own keys, and the parts are gathered and merged by their log-sum-exps, in rank order: so
all ranks have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partita.torch.collectives.comm import Communicator
from partita.torch.layers.block_attention import Result, kernel_of, wide


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    comm: Communicator,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """The attention of all rows to the keys of all ranks.

    Args:
        query: `[n, heads, rows, width]`, the same on every rank.
        key: `[n, kv heads, own keys, width]`; a rank may have none.
        value: `[n, kv heads, own keys, value width]`.
        mask: Which of its own keys a row sees, or what is added to their scores, `[n or 1, 1, rows, own keys]` (default: all).
        scale: By which the products of queries and keys are multiplied.
        comm: The ranks; each sends its output and log-sum-exp.
        softcap: The largest magnitude that scores approach (default: none).
        sinks: `[heads]`, scores of a key without a value for each head (default: none).
        sizes: How many of the rows, in their order, each rank wants (default: every rank all).

    Returns:
        `[n, rows, heads, value width]` of the rows that this rank wants.
    """
    output, lse = _part(query, key, value, mask, scale, softcap)
    dtype = wide(query.dtype)
    own = torch.cat([output.to(dtype), lse.to(dtype)[..., None]], -1)
    if sizes is None:
        parts = comm.all_gather(own[None].contiguous(), 0)
    else:
        count = sizes[comm.rank]
        found = comm.all_to_all(own.movedim(2, 0).contiguous(), sizes, [count] * comm.size)
        parts = found.unflatten(0, (comm.size, count)).movedim(1, 3)
    sums = parts[..., -1]
    total = sums.logsumexp(0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(dtype)[:, None])
    merged = (parts[..., :-1] * (sums - total).exp()[..., None]).sum(0)
    return merged.transpose(1, 2).to(query.dtype).contiguous()


def _part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Result:
    """The attention to this rank's keys, and its log-sum-exp."""
    if key.shape[2] == 0:
        shape = query.shape[:-1]
        return query.new_zeros((*shape, value.shape[-1])), query.new_full(shape, -torch.inf)
    if softcap is None and (mask is None or mask.dtype == torch.bool):
        return kernel_of(query, key, value).forward(query, key, value, False, mask, scale)
    dtype = wide(query.dtype)
    grouped = query.to(dtype).unflatten(1, (key.shape[1], -1)) * scale
    scores = grouped @ key.to(dtype)[:, :, None].mT
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -1e30) if mask.dtype == torch.bool else scores + mask[:, :, None]
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ value.to(dtype)[:, :, None]).flatten(1, 2), lse.flatten(1, 2)
