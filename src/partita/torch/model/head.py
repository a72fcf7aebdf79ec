"""The head of a language model whose vocabulary is split: the unsplit logits are never gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from partita.core.sharding.split import Split
from partita.generation.sample import ALL_EXCLUDED, no_token
from partita.torch.collectives.comm import Communicator
from partita.torch.layers.linear import ColumnParallelLinear


@contextmanager
def local_logits(model: nn.Module) -> Iterator[Split | None]:
    """Make the model's head return each rank's own columns inside the context. Yields their split, None if they
    are not split.

    Models transform their logits elementwise (scaling, soft capping), so a part can be transformed by itself.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(head, ColumnParallelLinear) or not head.gather_output:
        yield None
        return
    head.gather_output = False
    try:
        yield head.split
    finally:
        head.gather_output = True


def most_likely(logits: Tensor, split: Split | None, comm: Communicator) -> Tensor:
    """The first id of the largest logit of each row, as `argmax` of the unsplit logits gives it; negative if there is none.

    Args:
        logits: `[rows, vocab_r]`, this rank's columns, or all of them where `split` is None.
        split: Which rank holds which columns.
        comm: The tensor ranks; each sends one value and one id per row.

    Returns:
        int64 `[rows]`, the same on every rank. A row with non-finite logits has a code instead.
    """
    value, index = logits.max(-1)
    if split is None:
        return _or_code(index, value, torch.zeros_like(index))
    start = split.ranges(comm.rank)[0][0]
    # Logits and ids are exact in float64, so that one message carries both.
    best = comm.all_gather(torch.stack([value.double(), (index + start).double()]).unsqueeze(0), 0)
    # NaN counts as the largest.
    value, rank = best[:, 0].max(0)
    return _or_code(best[:, 1].gather(0, rank.unsqueeze(0)).squeeze(0).long(), value, rank)


def _or_code(ids: Tensor, values: Tensor, ranks: Tensor) -> Tensor:
    """`ids`, or a code where the largest logits `values`, held by rank `ranks`, are not finite."""
    codes = torch.where(values == -torch.inf, ALL_EXCLUDED, no_token(0) - ranks)
    return torch.where(values.isfinite(), ids, codes)
