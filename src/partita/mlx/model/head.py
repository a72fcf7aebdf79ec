"""The head of a language model whose vocabulary is split: the unsplit logits are never gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.core.plan import Plan
from partita.core.sharding.split import Split
from partita.generation.sample import ALL_EXCLUDED, Array, Columns, no_token
from partita.mlx.collectives.comm import Communicator
from partita.mlx.layers.embedding import VocabParallelEmbedding
from partita.mlx.layers.linear import ColumnParallelLinear
from partita.mlx.model.parts import unsplit_modules


@contextmanager
def local_logits(model: nn.Module, plan: Plan) -> Iterator[Split | None]:
    """Make the model's head return each rank's own columns inside the context. Yields their split, None if they are not split.

    Models transform their logits elementwise (scaling, soft capping), so a part can be transformed by itself; the verification
    of a split tests this too.
    """
    head = _head(model, plan)
    if head is None:
        yield None
        return
    flag = "gather_output" if isinstance(head, ColumnParallelLinear) else "gather_logits"
    setattr(head, flag, False)
    try:
        yield head.split
    finally:
        setattr(head, flag, True)


def _head(model: nn.Module, plan: Plan) -> ColumnParallelLinear | VocabParallelEmbedding | None:
    """The split linear layer over the vocabulary, or without one the embedding that is a tied head."""
    modules = unsplit_modules(model)
    split = [modules[path] for path, module in plan.modules.items() if module.style == "vocab"]
    heads = [module for module in split if isinstance(module, ColumnParallelLinear)]
    heads = heads or [module for module in split if isinstance(module, VocabParallelEmbedding)]
    return heads[0] if len(heads) == 1 else None


def most_likely(logits: mx.array, split: Split | None, comm: Communicator) -> mx.array:
    """The first id of the largest logit of each row, as `argmax` of the unsplit logits gives it; lazy.

    Args:
        logits: `[rows, vocab_r]`, this rank's columns, or all of them if `split` is None or the logits are unsplit.
        split: Which rank holds which columns.
        comm: The tensor ranks; each sends one value and one id per row.

    Returns:
        int32 `[rows]`, the same on every rank. A row with non-finite logits has a code instead.
    """
    index, value = mx.argmax(logits, axis=-1), mx.max(logits, axis=-1)
    if split is None or comm.size == 1 or logits.shape[-1] == split.size:
        return _or_code(index, value, mx.zeros_like(index))
    # Logits and ids below 2 ** 24 are exact in float32 or wider, so one message carries both.
    wide = mx.float64 if logits.dtype == mx.float64 else mx.float32
    start = split.ranges(comm.rank)[0][0]
    best = comm.all_gather(mx.stack([value.astype(wide), (index + start).astype(wide)])[None], 0)
    value = mx.max(best[:, 0], axis=0)
    # NaN equals nothing, so it is detected separately.
    is_top = mx.where(mx.isnan(value), mx.isnan(best[:, 0]), best[:, 0] == value)
    rank = mx.argmax(is_top.astype(mx.int32), axis=0)
    return _or_code(mx.take_along_axis(best[:, 1], rank[None], axis=0)[0], value, rank)


def wide_rows(logits: mx.array) -> Array:
    """Logits in numpy, in float32 or float64."""
    return np.array(logits.astype(mx.float64 if logits.dtype == mx.float64 else mx.float32))


def columns_of(split: Split, comm: Communicator) -> Columns:
    """This rank's columns of the logits, for `choose`; every tensor rank must gather at the same time."""

    def gather(mine: Array) -> Array:
        # As bits: not every backend supports 64-bit numbers.
        bits = comm.all_gather(mx.array(np.ascontiguousarray(mine).view(np.uint32))[None], 0)
        return np.array(bits).view(np.float64)

    return Columns(split.ranges(comm.rank)[0][0], max(split.local_sizes), comm.rank, gather)


def _or_code(ids: mx.array, values: mx.array, ranks: mx.array) -> mx.array:
    """`ids`, or a code where the largest logits `values`, held by rank `ranks`, are not finite; int32."""
    codes = mx.where(values == -mx.inf, ALL_EXCLUDED, no_token(0) - ranks.astype(mx.int32))
    return mx.where(mx.isfinite(values), ids.astype(mx.int32), codes)
