"""Linear layers split over the tensor ranks: columns (outputs) or rows (inputs), around any inner linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn

from partita.core.sharding.split import Split
from partita.errors import PlanError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.mappings import all_gather, copy_to, gather_from, reduce_from, reduce_scatter, scatter_to
from partita.mlx.layers.inner import base_layer, linear_shape, quantization_unit, slice_module
from partita.mlx.layers.lora import Style, adopt, dora_row, is_adapter, is_dora, summed
from partita.mlx.layers.region import RegionInput

Column = TypeVar("Column", bound="ColumnParallelLinear")
Row = TypeVar("Row", bound="RowParallelLinear")

_OF_INNER = ("weight", "scales", "biases", "bias", "group_size", "bits", "mode")


class _ShardedLinear(nn.Module):
    """Base of column and row layers: an inner layer `linear`, the group, and the split of the dimension."""

    comm: Communicator
    split: Split
    linear: nn.Module
    _style: ClassVar[Style]

    def __init__(self, inner: nn.Module, comm: Communicator, split: Split) -> None:
        super().__init__()
        if split.parts != comm.size:
            raise PlanError(f"the split must have {comm.size} parts, one per rank of the group; got {split.parts}.")
        self.comm, self.split = comm, split
        self.linear = inner
        self._set_training_mode(inner.training)

    def __setitem__(self, name: str, value: Any) -> None:
        # MLX replaces modules by item: the parameters of adapters such as LoRA must fit the split.
        if name == "linear":
            adopt(value, self.comm, self.split, self._style)
        super().__setitem__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_INNER and name not in self and "linear" in self:
            return getattr(base_layer(self["linear"]), name)
        return super().__getattr__(name)

    def __missing__(self, name: str) -> Any:
        if name in _OF_INNER and "linear" in self:
            return base_layer(self["linear"])[name]
        raise KeyError(name)

    def _compute(self, x: mx.array) -> mx.array:
        linear: Any = self["linear"]
        if self.split.is_partition and not is_adapter(linear):
            return linear(x)
        with summed(linear, self.comm, self.split, self._style):
            return linear(x)


class ColumnParallelLinear(_ShardedLinear):
    """A linear layer whose outputs are split over the ranks.

    Rank r of R holds `weight [out_r, in]` and `bias [out_r]` in `.linear`; the `out_r` add up to `out`. A quantized
    inner layer holds those rows' words, scales and biases.

        forward          y_r [..., out_r] = x [..., in] @ weight_r.T + bias_r, gathered to [..., out] with `gather_output`
        input gradient   sum over the ranks of dy_r @ weight_r
        weight gradient  dy_r.T @ x, no communication; of rows that several ranks hold, summed over those

    Source: Megatron-LM (Shoeybi et al. 2019, section 3).
    """

    _style = "column"

    def __init__(
        self,
        inner: nn.Module,
        comm: Communicator,
        split: Split,
        *,
        gather_output: bool = False,
        expand: Sequence[int] | None = None,
        entry: RegionInput | None = None,
        sequence_parallel: bool = False,
        sequence_axis: int = 1,
    ) -> None:
        """Create the split layer around an inner one that already holds this rank's outputs; see `from_linear`."""
        if sequence_parallel and gather_output:
            raise PlanError(
                "gather_output=True and sequence_parallel=True exclude each other: use a row layer to leave the region."
            )
        if gather_output and not split.is_partition:
            raise PlanError(f"gather_output=True needs a split without copies; got {split}.")
        super().__init__(inner, comm, split)
        self.gather_output = gather_output
        self.entry = entry if entry is not None else RegionInput(comm)
        self.sequence_parallel, self.sequence_axis = sequence_parallel, sequence_axis
        self._expand = mx.array(list(expand)) if expand is not None else None

    @classmethod
    def from_linear(
        cls: type[Column],
        linear: nn.Module,
        comm: Communicator,
        split: Split | None = None,
        *,
        gather_output: bool = False,
        expand: Sequence[int] | None = None,
        entry: RegionInput | None = None,
        sequence_parallel: bool = False,
        sequence_axis: int = 1,
    ) -> Column:
        """The split form of an unsplit linear layer, with this rank's part. Nothing is evaluated.

        Args:
            linear: An `nn.Linear` or `nn.QuantizedLinear`.
            comm: The ranks.
            split: Assignment of outputs to ranks; by default `even_outputs`.
            gather_output: Whether every rank gets all outputs.
            expand: Indices of the local outputs in the order of the result; passed on all ranks or none.
            entry: The region entry that sibling layers with the same input share.
            sequence_parallel: Whether the input is this rank's part of the sequence, to be gathered first.
            sequence_axis: Which axis of the input is the sequence.

        Raises:
            ModelError: The layer's class cannot be split.
            PlanError: The split does not fit it, or `gather_output` is combined with copies or a sequence.
        """
        return cls._cut(
            linear,
            comm,
            split if split is not None else even_outputs(linear, comm.size),
            gather_output=gather_output,
            expand=expand,
            entry=entry,
            sequence_parallel=sequence_parallel,
            sequence_axis=sequence_axis,
        )

    @classmethod
    def _cut(cls: type[Column], linear: nn.Module, comm: Communicator, split: Split, **options: Any) -> Column:
        outputs, _ = linear_shape(linear)
        _must_fit(split, outputs, "outputs", comm)
        layer = cls.__new__(cls)
        inner = slice_module(linear, "outputs", split.ranges(comm.rank), bias=True)
        ColumnParallelLinear.__init__(layer, inner, comm, split, **options)
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in]` to `[..., out_r]`, or to `[..., out]` with `gather_output`."""
        if self.sequence_parallel:
            y = self._compute(all_gather(x, self.comm, self.sequence_axis))
        else:
            y = self._compute(self.entry.enter(x))
        if self._expand is not None:
            y = mx.take(y, self._expand, axis=-1)
        if self.gather_output and self.comm.size > 1:
            y = gather_from(y, self.comm, -1, self.split.local_sizes)
            if not self.split.is_in_order:
                y = mx.take(y, mx.argsort(_split_order(self.split)), axis=-1)
        return y

    def _extra_repr(self) -> str:
        _, inputs = linear_shape(base_layer(self["linear"]))
        return f"input_dims={inputs}, output_dims={self.split.size}, split={self.split}, rank {self.comm.rank}"


class RowParallelLinear(_ShardedLinear):
    """A linear layer whose inputs are split over the ranks.

    Rank r of R holds `weight [out, in_r]` in `.linear`and the unsplit `bias [out]`; the `in_r` add up to `in`. A
    quantized inner layer holds complete groups of the inputs.

        forward          y [..., out] = sum over the ranks of x_r [..., in_r] @ weight_r.T, then + bias, once
        input gradient   dx_r = dy @ weight_r, no communication
        weight gradient  dy.T @ x_r, no communication

    Source: Megatron-LM (Shoeybi et al. 2019, section 3).
    """

    _style = "row"

    def __init__(
        self,
        inner: nn.Module,
        bias: mx.array | None,
        comm: Communicator,
        split: Split,
        *,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        sequence_axis: int = 1,
    ) -> None:
        """Create the split layer around an inner one without bias that already holds this rank's inputs; see `from_linear`."""
        if not split.is_partition:
            raise PlanError(f"the inputs of a row layer must be split without copies; got {split}.")
        super().__init__(inner, comm, split)
        self.input_is_parallel = input_is_parallel
        self.sequence_parallel, self.sequence_axis = sequence_parallel, sequence_axis
        if bias is not None:
            self.bias = bias

    @classmethod
    def from_linear(
        cls: type[Row],
        linear: nn.Module,
        comm: Communicator,
        split: Split | None = None,
        *,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        sequence_axis: int = 1,
    ) -> Row:
        """The split form of an unsplit linear layer, with this rank's part. Nothing is evaluated.

        Args:
            linear: An `nn.Linear` or `nn.QuantizedLinear`.
            comm: The ranks.
            split: Assignment of inputs to ranks; by default `even_inputs`.
            input_is_parallel: Whether each rank receives only its own inputs instead of all.
            sequence_parallel: Whether each rank gets its part of the sequence of the output.
            sequence_axis: Which axis of the output is the sequence.

        Raises:
            ModelError: The layer's class cannot be split.
            PlanError: The split does not fit it, has copies, or divides a quantization group.
        """
        return cls._cut(
            linear,
            comm,
            split if split is not None else even_inputs(linear, comm.size),
            input_is_parallel=input_is_parallel,
            sequence_parallel=sequence_parallel,
            sequence_axis=sequence_axis,
        )

    @classmethod
    def _cut(cls: type[Row], linear: nn.Module, comm: Communicator, split: Split, **options: Any) -> Row:
        _, inputs = linear_shape(linear)
        _must_fit(split, inputs, "inputs", comm)
        layer = cls.__new__(cls)
        inner = slice_module(linear, "inputs", split.ranges(comm.rank), bias=False)
        RowParallelLinear.__init__(layer, inner, linear.get("bias"), comm, split, **options)
        layer._no_grad |= {"bias"} & linear._no_grad
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in_r]`, or `[..., in]` unless `input_is_parallel`, to `[..., out]`."""
        if not self.input_is_parallel and self.comm.size > 1:
            x = x if self.split.is_in_order else mx.take(x, _split_order(self.split), axis=-1)
            x = scatter_to(x, self.comm, -1, self.split.local_sizes)
        y = self._sum(x)
        if "bias" not in self:
            return y
        return y + (copy_to(self["bias"], self.comm) if self.sequence_parallel else self["bias"])

    def _sum(self, x: mx.array) -> mx.array:
        if is_dora(self["linear"]) and self.comm.size > 1:
            return dora_row(self["linear"], x, self.comm, self._leave, scatters=self.sequence_parallel)
        return self._leave(self._compute(x))

    def _leave(self, y: mx.array) -> mx.array:
        return reduce_scatter(y, self.comm, self.sequence_axis) if self.sequence_parallel else reduce_from(y, self.comm)

    def _extra_repr(self) -> str:
        outputs, _ = linear_shape(base_layer(self["linear"]))
        return f"input_dims={self.split.size}, output_dims={outputs}, split={self.split}, rank {self.comm.rank}"


def even_outputs(linear: nn.Module, parts: int) -> Split:
    """The even split of a linear layer's outputs, in units of `paired_unit`."""
    outputs, _ = linear_shape(linear)
    return Split.even(outputs, parts, unit=paired_unit(linear, [outputs], parts))


def even_inputs(linear: nn.Module, parts: int) -> Split:
    """The even split of a linear layer's inputs, in complete quantization groups."""
    _, inputs = linear_shape(linear)
    return Split.even(inputs, parts, unit=quantization_unit(linear))


def paired_unit(module: nn.Module, segments: Sequence[int], parts: int) -> int:
    """The unit in which a layer's outputs are distributed: 1, or the size of a quantization group.

    The row layer that follows cannot divide a quantization group. So a quantized layer's outputs are distributed in complete
    groups too, if every segment has enough of them, and both layers have the same split.
    """
    unit = quantization_unit(module)
    return unit if all(n % unit == 0 and n // unit >= parts for n in segments) else 1


def _must_fit(split: Split, size: int, what: str, comm: Communicator) -> None:
    if split.size != size or split.parts != comm.size:
        raise PlanError(
            f"the split must distribute the layer's {size} {what} over the {comm.size} ranks of the group; got {split}."
        )


def _split_order(split: Split) -> mx.array:
    """Elements of the unsplit dimension in the order rank 0's, rank 1's, ..."""
    return mx.array([i for ranges in split.by_rank for start, stop in ranges for i in range(start, stop)])
