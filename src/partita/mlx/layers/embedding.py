"""An embedding split over the tensor ranks by vocabulary, plain or quantized, which may also be a tied head."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.sharding.split import Split
from partita.errors import ModelError, PlanError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.mappings import copy_to, gather_from, reduce_from
from partita.mlx.layers.inner import base_layer, slice_module
from partita.mlx.layers.lora import adopt, is_adapter, summed

_OF_INNER = ("weight", "scales", "biases", "group_size", "bits", "mode")


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows are split over the ranks, around an inner embedding.

    Rank r of R holds `weight [vocab_r, width]` (if quantized, those rows' words, scales and biases) in `.embedding`.

        forward          sum over the ranks of their rows, zero where another rank holds the row: ids `[...]` to `[..., width]`
        weight gradient  this rank's rows, no communication

    As a tied head it is a column layer: `as_linear`. Ids must be in the vocabulary: MLX does not check them.

    Source: Megatron-LM (Shoeybi et al. 2019, section 3).
    """

    comm: Communicator
    split: Split
    embedding: nn.Module

    def __init__(self, inner: nn.Module, comm: Communicator, split: Split, *, gather_logits: bool = True) -> None:
        """Create the split embedding around an inner one that already holds this rank's rows; see `from_embedding`."""
        super().__init__()
        if split.parts != comm.size or not split.is_partition or any(len(ranges) != 1 for ranges in split.by_rank):
            raise PlanError(f"each of {comm.size} ranks must hold one exclusive range of rows; got the split {split}.")
        self.comm, self.split = comm, split
        ((self.start, self.stop),) = split.ranges(comm.rank)
        self.gather_logits = gather_logits
        self.embedding = inner

    @classmethod
    def from_embedding(
        cls, embedding: nn.Module, comm: Communicator, split: Split | None = None, *, gather_logits: bool = True
    ) -> VocabParallelEmbedding:
        """The split form of an unsplit embedding, with this rank's rows. Nothing is evaluated.

        Args:
            embedding: An `nn.Embedding` or `nn.QuantizedEmbedding`.
            comm: The ranks.
            split: Assignment of rows to ranks, one range a rank(default: even).
            gather_logits: Whether `as_linear` gives every rank all logits instead of its own.

        Raises:
            ModelError: It is not an embedding.
            PlanError: `split` does not assign each rank one exclusive range of rows.
        """
        if not isinstance(embedding, nn.Embedding | nn.QuantizedEmbedding):
            raise ModelError(
                f"{type(embedding).__name__} is not an nn.Embedding or nn.QuantizedEmbedding. Keep it unsplit with the rule "
                "`replicate`."
            )
        rows = embedding["weight"].shape[0]
        split = split if split is not None else Split.even(rows, comm.size)
        if split.size != rows:
            raise PlanError(f"the split must cover the embedding's {rows} rows; got {split}.")
        inner = slice_module(embedding, "outputs", split.ranges(comm.rank), bias=False)
        if hasattr(inner, "num_embeddings"):
            inner.num_embeddings = split.local_size(comm.rank)
        return cls(inner, comm, split, gather_logits=gather_logits)

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "embedding":
            adopt(value, self.comm, self.split, "vocab")
        super().__setitem__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_INNER and "embedding" in self:
            return getattr(base_layer(self["embedding"]), name)
        return super().__getattr__(name)

    def __call__(self, ids: mx.array) -> mx.array:
        """Ids `[...]` to `[..., width]`."""
        if self.comm.size == 1:
            return self["embedding"](ids)
        here = (ids >= self.start) & (ids < self.stop)
        local = mx.where(here, ids, self.start) - self.start
        rows = self._of_inner(None, local)
        return reduce_from(mx.where(here[..., None], rows, 0), self.comm)

    def as_linear(self, x: mx.array) -> mx.array:
        """The logits of a tied head: `[..., width]` to `[..., vocab]`, or to `[..., vocab_r]` unless `gather_logits`."""
        y = self._of_inner("as_linear", copy_to(x, self.comm))
        if not self.gather_logits or self.comm.size == 1:
            return y
        y = gather_from(y, self.comm, -1, self.split.local_sizes)
        if self.split.is_in_order:
            return y
        order = mx.array([i for ranges in self.split.by_rank for start, stop in ranges for i in range(start, stop)])
        return mx.take(y, mx.argsort(order), axis=-1)

    def _of_inner(self, method: str | None, x: mx.array) -> mx.array:
        inner: Any = self["embedding"]
        compute = getattr(inner, method) if method is not None else inner
        if not is_adapter(inner):
            return compute(x)
        with summed(inner, self.comm, self.split, "vocab"):
            return compute(x)

    def _extra_repr(self) -> str:
        return f"vocabulary={self.split}, rank {self.comm.rank}"
