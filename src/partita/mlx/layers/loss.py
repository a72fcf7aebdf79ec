"""Cross-entropy over a vocabulary that is split over the tensor ranks, without the unsplit logits on any rank."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from partita.core.sharding.split import Split
from partita.errors import PlanError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.mappings import reduce_from

Reduction = Literal["none", "mean", "sum"]


def vocab_parallel_cross_entropy(
    logits: mx.array,
    targets: mx.array,
    comm: Communicator,
    split: Split | None = None,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> mx.array:
    """`mlx.nn.losses.cross_entropy` of the unsplit logits, the same on every rank.

    Rank r holds `logits [..., vocab_r]`. Forward reduces a maximum and a few sums per row over the ranks, and sends nothing of
    vocabulary size; backward, `softmax - target` of this rank's columns, needs no communication. Computed in float32 or wider.

    Args:
        logits: This rank's columns, `[..., vocab_r]`.
        targets: Ids in the unsplit vocabulary, `[...]`, the same on every rank. One outside the vocabulary gives NaN.
        comm: The ranks.
        split: Assignment of ids to ranks, one range per rank (default: consecutive, as many as each rank holds).
        reduction: `mean` over the rows that are not ignored, `sum`, or `none` for `[...]`.
        ignore_index: Rows with this target have no loss and no gradient.
        label_smoothing: Fraction of the target spread evenly over the unsplit vocabulary, in [0, 1].

    Raises:
        PlanError: An argument does not fit.

    Source: Megatron-LM's `vocab_parallel_cross_entropy`.
    """
    split = split if split is not None else _of_parts(logits.shape[-1], comm)
    _check(logits, targets, comm, split, reduction, label_smoothing)
    ((start, stop),) = split.ranges(comm.rank)
    wide = logits if logits.dtype == mx.float64 else logits.astype(mx.float32)
    shifted = wide - mx.stop_gradient(comm.all_max(mx.stop_gradient(wide).max(axis=-1)))[..., None]

    targets = targets.astype(mx.int64)
    here = (targets >= start) & (targets < stop)
    column = mx.where(here, targets - start, 0)
    picked = mx.take_along_axis(shifted, column[..., None], axis=-1).squeeze(-1)
    parts = [mx.exp(shifted).sum(axis=-1), mx.where(here, picked, 0)]
    if label_smoothing:
        parts.append(shifted.sum(axis=-1))
    total, target_logit, *rest = reduce_from(mx.stack(parts), comm)

    loss = mx.log(total) - target_logit
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (mx.log(total) - rest[0] / split.size)
    loss = mx.where((targets >= 0) & (targets < split.size), loss, float("nan"))
    keep = targets != ignore_index
    loss = mx.where(keep, loss, 0)
    if reduction == "none":
        return loss
    return loss.sum() / keep.sum().astype(loss.dtype) if reduction == "mean" else loss.sum()


def _of_parts(columns: int, comm: Communicator) -> Split:
    sizes = [int(n) for n in comm.all_gather_object(columns)]
    starts = [sum(sizes[:rank]) for rank in range(comm.size)]
    return Split(sum(sizes), tuple(((start, start + n),) for start, n in zip(starts, sizes, strict=True)))


def _check(
    logits: mx.array, targets: mx.array, comm: Communicator, split: Split, reduction: str, label_smoothing: float
) -> None:
    if split.parts != comm.size or not split.is_partition or any(len(ranges) != 1 for ranges in split.by_rank):
        raise PlanError(f"each of {comm.size} ranks must hold one exclusive range of logits; got the split {split}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise PlanError(f"label_smoothing must be in [0, 1]; got {label_smoothing}.")
    if reduction not in ("none", "mean", "sum"):
        raise PlanError(f"reduction must be none, mean or sum; got {reduction!r}.")
    expected = (*targets.shape, split.local_size(comm.rank))
    if logits.shape != expected:
        raise PlanError(f"logits must be {expected} on rank {comm.rank}; got {logits.shape}.")
