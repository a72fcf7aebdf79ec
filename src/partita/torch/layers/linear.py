"""Linear layers split over the tensor ranks: columns (outputs) or rows (inputs), around any inner linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.core.sharding.split import Split, check_sizes
from partita.errors import PlanError
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import parallel_group_info
from partita.torch.collectives.mappings import (
    all_gather,
    copy_to,
    gather_from,
    reduce_from,
    reduce_from_,
    reduce_scatter,
    scatter_to,
)
from partita.torch.layers.dropout import RegionRandomness
from partita.torch.layers.init import InitType, init_affine_, init_bias_, strided_split
from partita.torch.layers.inner import (
    base_layer,
    empty_linear,
    has_no_hooks,
    inner_bias,
    inner_weight,
    linear_shape,
    slice_linear,
)
from partita.torch.layers.lora import LoraLinear, Style, adopt, adopt_new
from partita.torch.layers.region import RegionInput


class _ShardedLinear(nn.Module):
    """Base of column and row layers: an inner layer `linear`, the group, and the split of the dimension."""

    linear: nn.Module
    comm: Communicator
    split: Split
    transposed: bool
    style: Style
    _is_adapted = False

    def _set_split(self, split: Split) -> None:
        # torch.compile cannot trace the computation of a cached property, so these are computed now.
        _ = split.local_sizes, split.is_in_order, split.is_partition
        self.split = split

    @property
    def weight(self) -> Tensor:
        """This rank's part of the weight."""
        return inner_weight(self.linear)

    @property
    def master_weight(self) -> Tensor:
        """The unsplit weight `[out_features, in_features]` (transposed for a Conv1D), the same on every rank.

        Every rank must call it.
        """
        return self.comm.gather_split(self.weight.detach(), self._weight_dim, self.split)

    @property
    def _weight_dim(self) -> int:
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "linear":
            # Adapters such as LoRA replace the inner layer; their parameters must fit the split.
            adopt(value, self.comm, self.split, self.style)
            self._is_adapted = base_layer(value) is not value
        super().__setattr__(name, value)

    def _compute(self, x: Tensor) -> Tensor:
        if self._is_adapted:
            adopt_new(self.linear, self.comm, self.split, self.style)
        linear: Any = self.linear
        return F.linear(x, linear.weight, linear.bias) if self._is_plain else linear(x)

    @property
    def _is_plain(self) -> bool:
        return type(self.linear) is nn.Linear and has_no_hooks(self.linear)


class ColumnParallelLinear(_ShardedLinear):
    """A linear layer whose outputs are split over the ranks.

    Rank r of R holds `weight [out_r, in]` and `bias [out_r]` in `.linear`; the `out_r` add up to `out`.

        forward          y_r [..., out_r] = x [..., in] @ weight_r.T + bias_r, gathered to [..., out] with `gather_output`
        input gradient   sum over the ranks of dy_r @ weight_r
        weight gradient  dy_r.T @ x, while the input gradient is summed

    Source: Megatron-LM (Shoeybi et al. 2019, section 3); the constructor is `ml.models.parallel`'s.
    """

    expand: Tensor | None
    style: Style = "column"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gather_output: bool = True,
        init_type: InitType = "xavier_normal",
        stride: int = 1,
        lora_rank: int | None = None,
        *,
        group: Communicator | None = None,
        sequence_parallel: bool = False,
        sequence_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A new layer whose unsplit weight does not depend on the number of ranks.

        Args:
            in_features: Inputs.
            out_features: Outputs of the unsplit layer, distributed as evenly as possible.
            bias: Whether it has a bias.
            gather_output: Whether every rank gets all outputs instead of its own.
            init_type: Distribution of the unsplit weight; see `initialize_model_parallel_affine_weight_`.
            stride: Number of equal segments of the outputs; a rank has its part of each.
            lora_rank: Rank of a LoRA adapter to add, if any.
            group: The ranks (default: `parallel_group_info().mp`).
            sequence_parallel: Whether the input is this rank's part of the sequence, to be gathered first.
            sequence_dim: Which dimension of the input is the sequence.
            device: Device of the weight.
            dtype: dtype of the weight.

        Raises:
            PlanError: There are fewer outputs than ranks, or `stride` does not divide them.
        """
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features)
        comm = _default_comm(group)
        split = strided_split(out_features, comm.size, stride)
        mine = split.ranges(comm.rank)
        inner = empty_linear(in_features, split.local_size(comm.rank), bias=bias, device=device, dtype=dtype)
        if inner.weight.device.type != "meta":
            init_affine_(inner.weight, (out_features, in_features), 0, mine, init_type)
            if bias:
                init_bias_(inner.bias, init_type, out_features, mine)
        self._set(inner, comm, split, gather_output, None, False, sequence_parallel, sequence_dim)
        self.in_features, self.out_features = in_features, out_features
        if lora_rank is not None:
            self.linear = LoraLinear(inner, lora_rank)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        group: Communicator | None = None,
        split: Split | None = None,
        *,
        gather_output: bool = False,
        entry: RegionInput | None = None,
        expand: Tensor | None = None,
        sequence_parallel: bool = False,
        sequence_dim: int = 1,
    ) -> ColumnParallelLinear:
        """The split form of an unsplit linear layer, with a copy of this rank's part of the weight.

        Args:
            linear: An `nn.Linear` or a transformers `Conv1D`, on any device, meta too.
            group: The ranks (default: `parallel_group_info().mp`).
            split: Assignment of outputs to ranks(default: even).
            gather_output: Whether every rank gets all outputs.
            entry: The region entry that sibling layers with the same input share.
            expand: Indices of the local outputs in the order of the result.
            sequence_parallel: Whether the input is this rank's part of the sequence.
            sequence_dim: Which dimension of the input is the sequence.

        Raises:
            ModelError: The layer's class cannot be split.
        """
        comm = _default_comm(group)
        out_features, in_features, transposed = linear_shape(linear)
        split = split if split is not None else Split.even(out_features, comm.size)
        inner = slice_linear(linear, 1 if transposed else 0, split.ranges(comm.rank), bias=True)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(inner, comm, split, gather_output, entry, transposed, sequence_parallel, sequence_dim)
        layer.in_features, layer.out_features = in_features, out_features
        layer.expand = expand
        return layer.train(linear.training)

    def _set(
        self,
        inner: nn.Module,
        comm: Communicator,
        split: Split,
        gather_output: bool,
        entry: RegionInput | None,
        transposed: bool,
        sequence_parallel: bool,
        sequence_dim: int,
    ) -> None:
        self.comm, self.transposed = comm, transposed
        self._set_split(split)
        self.gather_output = gather_output
        self.sequence_parallel, self.sequence_dim = sequence_parallel, sequence_dim
        self.entry = entry if entry is not None else RegionInput(comm)
        self.entry.join(self)
        self.register_buffer("expand", None, persistent=False)
        if sequence_parallel and gather_output:
            raise PlanError(
                "gather_output=True and sequence_parallel=True exclude each other: use a row layer to leave the region."
            )
        if gather_output and not split.is_partition:
            raise PlanError(f"gather_output=True needs a split without copies; got {split}.")
        self.linear = inner

    @property
    def bias(self) -> Tensor | None:
        """This rank's part of the bias, or None."""
        return inner_bias(self.linear)

    @property
    def master_bias(self) -> Tensor | None:
        """The unsplit bias `[out_features]`, the same on every rank, or None; every rank must ask."""
        return None if self.bias is None else self.comm.gather_split(self.bias.detach(), 0, self.split)

    @property
    def _weight_dim(self) -> int:
        return 1 if self.transposed else 0

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out_r]`, or to `[..., out]` with `gather_output`."""
        if self.sequence_parallel:
            y = self._compute(all_gather(x, self.comm, self.sequence_dim))
        else:
            y = self.entry.apply(self, x)
        if self.expand is not None:
            y = y.index_select(-1, self.expand)
        if self.gather_output and self.comm.size > 1:
            y = self._gather(y)
        return y

    def _gather(self, y: Tensor) -> Tensor:
        y = gather_from(y, self.comm, -1, self.split.local_sizes)
        if self.split.is_in_order:
            return y
        return y.index_select(-1, _unsplit_order(self.split).to(y.device))

    def extra_repr(self) -> str:
        """The description that `print` shows."""
        return f"in={self.in_features}, out={self.split}, rank {self.comm.rank}, gather_output={self.gather_output}"


class RowParallelLinear(_ShardedLinear):
    """A linear layer whose inputs are split over the ranks.

    Rank r of R holds `weight [out, in_r]` in `.linear`and the unsplit `bias [out]`; the `in_r` add up to `in`.

        forward          y [..., out] = sum over the ranks of x_r [..., in_r] @ weight_r.T, then + bias, once
        input gradient   dx_r = dy @ weight_r, no communication
        weight gradient  dy.T @ x_r, no communication

    Source: Megatron-LM (Shoeybi et al. 2019, section 3); the constructor is `ml.models.parallel`'s.
    """

    bias: nn.Parameter | None
    style: Style = "row"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        init_type: InitType = "xavier_normal",
        stride: int = 1,
        lora_rank: int | None = None,
        *,
        group: Communicator | None = None,
        sequence_parallel: bool = False,
        sequence_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A new layer whose unsplit weight does not depend on the number of ranks.

        Args:
            in_features: Inputs of the unsplit layer, distributed as evenly as possible.
            out_features: Outputs.
            bias: Whether it has a bias, which is not split.
            input_is_parallel: Whether each rank receives only its own inputs instead of all.
            init_type: Distribution of the unsplit weight.
            stride: Number of equal segments of the inputs; a rank has its part of each.
            lora_rank: Rank of a LoRA adapter to add, if any.
            group: The ranks (default: `parallel_group_info().mp`).
            sequence_parallel: Whether each rank gets its part of the output's sequence instead of all of it.
            sequence_dim: Which dimension of the output is the sequence.
            device: Device of the weight.
            dtype: dtype of the weight.

        Raises:
            PlanError: There are fewer inputs than ranks, or `stride` does not divide them.
        """
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features)
        comm = _default_comm(group)
        split = strided_split(in_features, comm.size, stride)
        inner = empty_linear(split.local_size(comm.rank), out_features, bias=False, device=device, dtype=dtype)
        whole_bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if inner.weight.device.type != "meta":
            init_affine_(inner.weight, (out_features, in_features), 1, split.ranges(comm.rank), init_type)
            if whole_bias is not None:
                init_bias_(whole_bias, init_type, out_features, ((0, out_features),))
        self._set(inner, whole_bias, comm, split, not input_is_parallel, False, sequence_parallel, sequence_dim)
        self.in_features, self.out_features = in_features, out_features
        if lora_rank is not None:
            self.linear = LoraLinear(inner, lora_rank, inputs=split, tp_rank=comm.rank)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        group: Communicator | None = None,
        split: Split | None = None,
        *,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        sequence_dim: int = 1,
    ) -> RowParallelLinear:
        """The split form of an unsplit linear layer, with a copy of this rank's part of the weight.

        Args:
            linear: An `nn.Linear` or a transformers `Conv1D`, on any device, meta too.
            group: The ranks (default: `parallel_group_info().mp`).
            split: Assignment of inputs to ranks(default: even).
            input_is_parallel: Whether each rank receives only its own inputs instead of all.
            sequence_parallel: Whether each rank gets its part of the sequence of the output.
            sequence_dim: Which dimension of the output is the sequence.

        Raises:
            ModelError: The layer's class cannot be split.
        """
        comm = _default_comm(group)
        out_features, in_features, transposed = linear_shape(linear)
        split = split if split is not None else Split.even(in_features, comm.size)
        bias = inner_bias(linear)
        inner = slice_linear(linear, 0 if transposed else 1, split.ranges(comm.rank), bias=False)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(inner, bias, comm, split, not input_is_parallel, transposed, sequence_parallel, sequence_dim)
        layer.in_features, layer.out_features = in_features, out_features
        return layer.train(linear.training)

    def _set(
        self,
        inner: nn.Module,
        bias: nn.Parameter | None,
        comm: Communicator,
        split: Split,
        split_input: bool,
        transposed: bool,
        sequence_parallel: bool,
        sequence_dim: int,
    ) -> None:
        if not split.is_partition:
            raise PlanError(f"the inputs of a row layer must be split without copies; got {split}.")
        self.comm, self.transposed = comm, transposed
        self._set_split(split)
        self.split_input = split_input
        self.randomness: RegionRandomness | None = None
        self.sequence_parallel, self.sequence_dim = sequence_parallel, sequence_dim
        self.linear = inner
        self.register_parameter("bias", bias)

    @property
    def input_is_parallel(self) -> bool:
        """Whether each rank receives only its own inputs."""
        return not self.split_input

    @property
    def master_bias(self) -> Tensor | None:
        """The bias `[out_features]`, unsplit on every rank, or None."""
        return None if self.bias is None else self.bias.detach()

    @property
    def _weight_dim(self) -> int:
        return 0 if self.transposed else 1

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_r]`, or `[..., in]` unless `input_is_parallel`, to `[..., out]`."""
        if self.split_input and self.comm.size > 1:
            x = self._take(x)
        y = self._compute(x)
        if self.training and self.randomness is not None:
            y = self.randomness.leave(y)
        bias: Tensor | None = self.bias
        if self.sequence_parallel:
            y = reduce_scatter(y, self.comm, self.sequence_dim)
            bias = None if bias is None else copy_to(bias, self.comm)
        elif self.comm.size > 1:
            y = self._reduce(y)
        return y if bias is None else y + bias.to(y.dtype)

    def _reduce(self, y: Tensor) -> Tensor:
        """The sum over the ranks, in the memory of `y` if `y` is the new output of a plain layer without hooks."""
        if not self._is_plain:
            return reduce_from(y, self.comm)
        if torch.is_grad_enabled() and y.requires_grad:
            return reduce_from_(y, self.comm)
        return self.comm.all_reduce_(y.contiguous())

    def _take(self, x: Tensor) -> Tensor:
        if not self.split.is_in_order:
            x = x.index_select(-1, _split_order(self.split).to(x.device))
        return scatter_to(x, self.comm, -1, self.split.local_sizes)

    def extra_repr(self) -> str:
        """The description that `print` shows."""
        return f"in={self.split}, out={self.out_features}, rank {self.comm.rank}, bias={self.bias is not None}"


def _default_comm(group: Communicator | None) -> Communicator:
    return group if group is not None else parallel_group_info().mp.comm


def _split_order(split: Split) -> Tensor:
    """Elements of the unsplit dimension in the order rank 0's, rank 1's, ..."""
    return torch.cat([torch.arange(a, b) for ranges in split.by_rank for a, b in ranges])


def _unsplit_order(split: Split) -> Tensor:
    """The index of each element of the unsplit dimension in the concatenated parts of the ranks."""
    return torch.argsort(_split_order(split))
