"""Cross-entropy over a vocabulary that is split over the tensor ranks, without the unsplit logits on any rank."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from partita.core.sharding.split import Split
from partita.errors import PlanError
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import parallel_group_info


class _VocabParallelCrossEntropy(Function):
    """Loss of each row of `logits [n, vocab_r]`: log of the sum of exponentials minus the target's logit."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, keep: Tensor, comm: Communicator, split: Split, smoothing: float
    ) -> Tensor:
        start, stop = split.ranges(comm.rank)[0]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        peak = comm.all_reduce_(wide.amax(-1), dist.ReduceOp.MAX)
        shifted = wide - peak.unsqueeze(-1)
        here = (target >= start) & (target < stop) & keep
        column = torch.where(here, target - start, 0)
        picked = shifted.gather(-1, column.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0)
        exp = shifted.exp()
        parts = [exp.sum(-1), picked]
        if smoothing:
            parts.append(shifted.sum(-1))
        total, target_logit, *rest = comm.all_reduce_(torch.stack(parts)).unbind()
        loss = total.log() - target_logit
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (total.log() - rest[0] / split.size)
        ctx.save_for_backward(exp.div_(total.unsqueeze(-1)), column, here, keep)
        ctx.smoothing, ctx.vocabulary, ctx.dtype = smoothing, split.size, logits.dtype
        return loss.masked_fill(~keep, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        result = _VocabParallelCrossEntropy.gradient(ctx, grad.detach())
        # Under create_graph the gradient must not be treated as a constant.
        return _Once.apply(result.requires_grad_()) if torch.is_grad_enabled() else result, None, None, None, None, None

    @staticmethod
    @torch.no_grad()
    def gradient(ctx: Any, grad: Tensor) -> Tensor:
        """`softmax - target` of this rank's columns, times the gradient of each row's loss."""
        softmax, column, here, keep = ctx.saved_tensors
        scale = grad.masked_fill(~keep, 0).unsqueeze(-1)
        result = softmax - ctx.smoothing / ctx.vocabulary if ctx.smoothing else softmax.clone()
        result.scatter_add_(-1, column.unsqueeze(-1), (-(1 - ctx.smoothing) * here.to(result.dtype)).unsqueeze(-1))
        scaled: Tensor = (result * scale).to(ctx.dtype)
        return scaled


class _Once(Function):
    """A gradient without second derivative. torch's `once_differentiable` raises only for non-constant gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "vocab_parallel_cross_entropy has no second derivative. Use torch.nn.functional.cross_entropy on unsplit logits."
        )


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Communicator | None = None,
    split: Split | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> Tensor:
    """`torch.nn.functional.cross_entropy` of the unsplit logits, the same on every rank.

    Rank r holds `logits [..., vocab_r]`. Forward reduces a maximum and a sum per row over the ranks, and sends nothing of
    vocabulary size; backward, `softmax - target` of this rank's columns, needs no communication. Computed in float32 or wider.

    Args:
        logits: This rank's columns, `[..., vocab_r]`.
        target: Ids in the unsplit vocabulary, `[...]`, the same on every rank.
        group: The ranks (default: `parallel_group_info().mp`).
        split: Assignment of ids to ranks (default: even, over as many ids as the ranks hold in total).
        ignore_index: Rows with this target have no loss and no gradient.
        label_smoothing: Fraction of the target spread evenly over the unsplit vocabulary, in [0, 1].
        reduction: `mean` over the rows that are not ignored, `sum`, or `none` for `[...]`.

    Raises:
        PlanError: A target is outside the vocabulary, or an argument outside its range.

    Source: Megatron-LM's `vocab_parallel_cross_entropy`.
    """
    comm = group if group is not None else parallel_group_info().mp.comm
    if split is None:
        sizes = comm.all_gather(torch.tensor([logits.shape[-1]], device=logits.device)).tolist()
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        split = Split(bounds[-1], tuple(((bounds[r], bounds[r + 1]),) for r in range(comm.size)))
    if not split.is_partition or any(len(ranges) != 1 for ranges in split.by_rank):
        raise PlanError(f"each rank must hold one exclusive range of logits; got the split {split}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise PlanError(f"label_smoothing must be in [0, 1]; got {label_smoothing}.")
    if reduction not in ("none", "mean", "sum"):
        raise PlanError(f"reduction must be none, mean or sum; got {reduction!r}.")
    if logits.shape[:-1] != target.shape or logits.shape[-1] != split.local_size(comm.rank):
        raise PlanError(
            f"logits must be {(*target.shape, split.local_size(comm.rank))} on rank {comm.rank}; got {tuple(logits.shape)}."
        )
    flat = target.reshape(-1)
    keep = flat != ignore_index
    outside = keep & ((flat < 0) | (flat >= split.size))
    if torch.compiler.is_compiling():
        torch._assert_async(
            ~outside.any(), f"a target is outside the vocabulary of {split.size} and not {ignore_index}."
        )
    elif bool(outside.any()):
        raise PlanError(
            f"target {int(flat[outside][0])} is outside the vocabulary of {split.size} and not ignore_index ({ignore_index})."
        )
    loss: Tensor = _VocabParallelCrossEntropy.apply(
        logits.reshape(-1, logits.shape[-1]), flat, keep, comm, split, label_smoothing
    )
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() / keep.sum() if reduction == "mean" else loss.sum()
