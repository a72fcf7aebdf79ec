"""Embeddings split over the tensor ranks: by width (the seed's layer) or by vocabulary."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.core.sharding.split import Split, check_sizes
from partita.errors import ModelError, PlanError
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import parallel_group_info
from partita.torch.collectives.mappings import gather_from, reduce_from
from partita.torch.layers.init import InitType, init_affine_
from partita.torch.layers.inner import base_layer, copy_module, inner_weight, slice_parameter
from partita.torch.layers.lora import Style, adopt, adopt_new


class ParallelEmbedding(nn.Module):
    """An embedding whose width is split over the ranks.

    Rank r of R holds `weight [num_embeddings, dim_r]`, where the `dim_r` add up to `embedding_dim`.

        forward          gather of weight_r[ids]: ids `[...]` to `[..., embedding_dim]`
        weight gradient  this rank's columns, no communication

    Source: `ml.models.parallel.ParallelEmbedding`, whose arguments are those of `nn.Embedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        init_type: InitType = "xavier_normal",
        *,
        group: Communicator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A new embedding whose unsplit weight does not depend on the number of ranks.

        Args:
            num_embeddings: Rows.
            embedding_dim: Width of the unsplit embedding, distributed as evenly as possible.
            padding_idx: The row that is zero at first and gets no gradient, as in `nn.Embedding`.
            max_norm: Looked-up rows with a larger norm (of the unsplit row) are scaled down to it.
            norm_type: The p of the norm for `max_norm`.
            scale_grad_by_freq: Whether gradients are divided by the frequency of the row in the batch.
            sparse: Whether the weight's gradient is sparse.
            init_type: Distribution of the unsplit weight.
            group: The ranks (default: `parallel_group_info().mp`).
            device: Device of the weight.
            dtype: dtype of the weight.

        Raises:
            PlanError: There are fewer columns than ranks, `padding_idx` is out of range, or `norm_type` is not positive.
        """
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise PlanError(f"padding_idx must be in [{-num_embeddings}, {num_embeddings}); got {padding_idx}.")
        if not norm_type > 0:
            raise PlanError(f"norm_type must be a positive number; got {norm_type}.")
        self.comm = group if group is not None else parallel_group_info().mp.comm
        self.split = Split.even(embedding_dim, self.comm.size)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.max_norm, self.norm_type = max_norm, float(norm_type)
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        width = self.split.local_size(self.comm.rank)
        self.weight = nn.Parameter(torch.empty(num_embeddings, width, device=device, dtype=dtype))
        if self.weight.device.type != "meta":
            ranges = self.split.ranges(self.comm.rank)
            init_affine_(self.weight.data, (num_embeddings, embedding_dim), 1, ranges, init_type)
            if self.padding_idx is not None:
                self.weight.data[self.padding_idx] = 0

    @property
    def master_weight(self) -> Tensor:
        """The unsplit weight `[num_embeddings, embedding_dim]`, the same on every rank. Every rank must call it."""
        return self.comm.gather_split(self.weight.detach(), 1, self.split)

    def forward(self, x: Tensor) -> Tensor:
        """Ids `[...]` to `[..., embedding_dim]`."""
        if self.max_norm is not None:
            self._renorm_(x, self.max_norm)
        y = F.embedding(
            x, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse
        )
        return gather_from(y, self.comm, -1, self.split.local_sizes)

    @torch.no_grad()
    def _renorm_(self, ids: Tensor, max_norm: float) -> None:
        """Scale looked-up rows to `max_norm` by the norm of the unsplit row, like torch.embedding_renorm_."""
        rows = ids.unique()
        part = self.weight[rows].double()
        if math.isinf(self.norm_type):
            norms = self.comm.all_reduce_(part.abs().amax(1), torch.distributed.ReduceOp.MAX)
        else:
            norms = self.comm.all_reduce_(part.abs().pow(self.norm_type).sum(1)).pow(1.0 / self.norm_type)
        scale = torch.where(norms > max_norm, max_norm / (norms + 1e-7), 1.0)
        self.weight[rows] = (part * scale[:, None]).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """The description that `print` shows."""
        return f"{self.num_embeddings}, width={self.split}, rank {self.comm.rank}"


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows are split over the ranks, around an inner embedding of any class.

    Rank r of R holds `embedding.weight [vocab_r, dim]`; the inner class may add its own operations (scaling).

        forward          sum over the ranks of their rows, zero where another rank holds the row: ids `[...]` to `[..., dim]`
        weight gradient  this rank's rows, no communication

    Source: Megatron-LM (Shoeybi et al. 2019, section 3).
    """

    style: Style = "vocab"

    def __init__(self, embedding: nn.Embedding, group: Communicator | None = None, split: Split | None = None) -> None:
        """The split form of `embedding`, with a copy of this rank's rows of the weight.

        Args:
            embedding: An `nn.Embedding` or a subclass of it, on any device, meta too.
            group: The ranks (default: `parallel_group_info().mp`).
            split: Assignment of rows to ranks(default: even).

        Raises:
            ModelError: It is not an embedding, or one with `max_norm` or sparse gradients.
            PlanError: `split` does not assign each rank one exclusive range of rows.
        """
        super().__init__()
        if not isinstance(embedding, nn.Embedding):
            raise ModelError(
                f"{type(embedding).__name__} is not an nn.Embedding. Keep it unsplit with the rule `replicate`."
            )
        if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
            raise ModelError(
                "an embedding with max_norm, sparse or scale_grad_by_freq cannot be split by vocabulary. "
                "Split it by width with ParallelEmbedding, or keep it unsplit."
            )
        self.comm = group if group is not None else parallel_group_info().mp.comm
        self.split = split if split is not None else Split.even(embedding.num_embeddings, self.comm.size)
        if not self.split.is_partition or any(len(ranges) != 1 for ranges in self.split.by_rank):
            raise PlanError(f"each rank must hold one exclusive range of rows; got the split {self.split}.")
        ((self.start, self.stop),) = self.split.ranges(self.comm.rank)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        inner = copy_module(embedding)
        inner.weight = slice_parameter(embedding.weight, 0, [(self.start, self.stop)])
        inner.num_embeddings = self.stop - self.start
        padding_idx = embedding.padding_idx
        here = padding_idx is not None and self.start <= padding_idx < self.stop
        inner.padding_idx = padding_idx - self.start if here and padding_idx is not None else None
        self.padding_idx = padding_idx
        self.embedding = inner

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "embedding":
            # As with a linear layer, an adapter must fit the split.
            adopt(value, self.comm, self.split, self.style)
            self._is_adapted = base_layer(value) is not value
        super().__setattr__(name, value)

    @property
    def weight(self) -> nn.Parameter:
        """This rank's rows."""
        return inner_weight(self.embedding)

    @property
    def master_weight(self) -> Tensor:
        """The unsplit weight, the same on every rank. Every rank must call it."""
        return self.comm.gather_split(self.weight.detach(), 0, self.split)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `[...]` to `[..., dim]`."""
        if self.comm.size == 1:
            return self.embedding(ids)  # type: ignore[no-any-return]
        if self._is_adapted:
            adopt_new(self.embedding, self.comm, self.split, self.style)
        local = ids - self.start
        # An id outside the unsplit vocabulary stays unchanged: the lookup raises on every rank, as in the unsplit model.
        elsewhere = ((local < 0) | (local >= self.stop - self.start)) & (ids >= 0) & (ids < self.num_embeddings)
        rows: Tensor = self.embedding(local.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0)
        if torch.is_grad_enabled() and rows.requires_grad:
            return reduce_from(rows, self.comm)
        return self.comm.all_reduce_(rows)

    def extra_repr(self) -> str:
        """The description that `print` shows."""
        return f"vocabulary={self.split}, rank {self.comm.rank}"
