"""The head of a language model whose vocabulary is split: its logits need not be put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from partita.core.split import Split
from partita.torch.comm import Communicator
from partita.torch.linear import ColumnParallelLinear


@contextmanager
def local_logits(model: nn.Module) -> Iterator[Split | None]:
    """While it lasts the model's head gives each rank its own columns. Yields their split, None where they
    are not split.

    What a model does with its logits (scaling, soft capping) it does to each by itself, so it may do it to a part.
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


def likeliest(logits: Tensor, split: Split | None, comm: Communicator) -> Tensor:
    """The first id of the largest logit of each row, as `argmax` of the unsplit logits gives it.

    Args:
        logits: `[rows, vocab_r]`, this rank's columns, or all of them where `split` is None.
        split: Who has which.
        comm: The tensor ranks; each gives one value and one id a row.

    Returns:
        int64 `[rows]`, the same on every rank.
    """
    if split is None:
        return logits.argmax(-1)
    value, index = logits.max(-1)
    start = split.ranges(comm.rank)[0][0]
    # Logits and ids are exact in float64, so that one message carries both.
    best = comm.all_gather(torch.stack([value.double(), (index + start).double()]).unsqueeze(0), 0)
    rank = best[:, 0].argmax(0)
    return best[:, 1].gather(0, rank.unsqueeze(0)).squeeze(0).long()
