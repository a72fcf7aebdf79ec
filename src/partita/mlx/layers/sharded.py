"""MLX's own names for split layers: `AllToShardedLinear` and related classes.

They take the arguments of `mlx.nn`'s layers and are the column and row layers of `layers.linear`: an inner layer that can be
replaced, instead of a copy of each kind of layer. Sizes that do not divide are distributed unevenly.
Source: MLX's pull request 1270, "Distributed layers", and `mlx.nn.layers.distributed`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from partita.core.sharding.split import Split, check_sizes
from partita.errors import ModelError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.groups import as_communicator
from partita.mlx.layers.inner import is_quantized, linear_shape, new_linear, new_quantized_linear, quantization_unit
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear, paired_unit
from partita.mlx.layers.segments import Segments, segment_split

Group = Communicator | mx.distributed.Group | None


class AllToShardedLinear(ColumnParallelLinear):
    """Each rank computes some outputs of an affine map; see `ColumnParallelLinear`."""

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True, group: Group = None) -> None:
        """A new layer whose unsplit weight does not depend on the number of ranks, which must be seeded alike.

        Args:
            input_dims: Inputs.
            output_dims: Outputs of the unsplit layer, distributed as evenly as possible.
            bias: Whether it has a bias.
            group: The ranks (default: all ranks of the run).

        Raises:
            PlanError: There are fewer outputs than ranks.
        """
        check_sizes(input_dims=input_dims, output_dims=output_dims)
        comm = as_communicator(group)
        split = Split.even(output_dims, comm.size)
        ((start, stop),) = split.ranges(comm.rank)
        scale = math.sqrt(1.0 / input_dims)
        weight = _draw_rows(output_dims, input_dims, scale, start, stop)
        drawn = mx.random.uniform(-scale, scale, (output_dims,))[start:stop] if bias else None
        super().__init__(new_linear(weight, drawn), comm, split)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear_layer: nn.Module,
        *,
        segments: Segments = 1,
        sizes: Sequence[int] | None = None,
        group: Group = None,
    ) -> AllToShardedLinear:
        """This rank's outputs of an unsplit layer.

        Args:
            linear_layer: An `nn.Linear`.
            segments: Fused segments of the outputs, of which every rank gets a part: a number of equal
                segments, or the positions between them, as element indices (integers) or fractions.
            sizes: Number of outputs of each rank for a single segment (default: equal parts).
            group: The ranks (default: all ranks of the run).

        Raises:
            ModelError: The layer's class cannot be split.
            PlanError: The segments or sizes do not fit.
        """
        return cls._cut(linear_layer, *outputs_of(linear_layer, segments, sizes, group))


class QuantizedAllToShardedLinear(ColumnParallelLinear):
    """Each rank computes some outputs of an affine map whose weight is quantized and frozen; see `ColumnParallelLinear`."""

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        group: Group = None,
    ) -> None:
        """A layer of zeros to load weights into; nothing is quantized.

        Args:
            input_dims: Inputs, a multiple of the group size.
            output_dims: Outputs of the unsplit layer, distributed as evenly as possible.
            bias: Whether it has a bias.
            group_size: Inputs that share a scale (default: the mode's).
            bits: Bits per entry (default: the mode's).
            mode: `affine`, `mxfp4`, `mxfp8` or `nvfp4`.
            group: The ranks (default: all ranks of the run).

        Raises:
            PlanError: There are fewer outputs than ranks, or MLX does not support the quantization.
        """
        check_sizes(input_dims=input_dims, output_dims=output_dims)
        comm = as_communicator(group)
        split = Split.even(output_dims, comm.size)
        rows = split.local_size(comm.rank)
        super().__init__(new_quantized_linear(input_dims, rows, bias, group_size, bits, mode), comm, split)

    @classmethod
    def from_quantized_linear(
        cls,
        quantized_linear_layer: nn.Module,
        *,
        segments: Segments = 1,
        sizes: Sequence[int] | None = None,
        group: Group = None,
    ) -> QuantizedAllToShardedLinear:
        """This rank's outputs of an unsplit `nn.QuantizedLinear`, like `AllToShardedLinear.from_linear`."""
        _check_quantized(quantized_linear_layer)
        return cls._cut(quantized_linear_layer, *outputs_of(quantized_linear_layer, segments, sizes, group))


class ShardedToAllLinear(RowParallelLinear):
    """Each rank applies an affine map to its inputs, and the results are summed; see `RowParallelLinear`."""

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True, group: Group = None) -> None:
        """A new layer whose unsplit weight does not depend on the number of ranks, which must be seeded alike.

        Args:
            input_dims: Inputs of the unsplit layer, distributed as evenly as possible.
            output_dims: Outputs.
            bias: Whether it has a bias, which is not split.
            group: The ranks (default: all ranks of the run).

        Raises:
            PlanError: There are fewer inputs than ranks.
        """
        check_sizes(input_dims=input_dims, output_dims=output_dims)
        comm = as_communicator(group)
        split = Split.even(input_dims, comm.size)
        ((start, stop),) = split.ranges(comm.rank)
        scale = math.sqrt(1.0 / input_dims)
        weight = mx.contiguous(_draw_rows(input_dims, output_dims, scale, start, stop).T)
        drawn = mx.random.uniform(-scale, scale, (output_dims,)) if bias else None
        super().__init__(new_linear(weight, None), drawn, comm, split)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear_layer: nn.Module,
        *,
        segments: Segments = 1,
        sizes: Sequence[int] | None = None,
        group: Group = None,
    ) -> ShardedToAllLinear:
        """This rank's inputs of an unsplit `nn.Linear`, like `AllToShardedLinear.from_linear`."""
        return cls._cut(linear_layer, *inputs_of(linear_layer, segments, sizes, group))


class QuantizedShardedToAllLinear(RowParallelLinear):
    """Each rank applies a quantized, frozen weight to its inputs, and the results are summed; see `RowParallelLinear`."""

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        group: Group = None,
    ) -> None:
        """A layer of zeros to load weights into, like `QuantizedAllToShardedLinear`; nothing is quantized.

        Raises:
            PlanError: There are fewer quantization groups than ranks, or MLX does not support the quantization.
        """
        check_sizes(input_dims=input_dims, output_dims=output_dims)
        comm = as_communicator(group)
        unit = quantization_unit(new_quantized_linear(0, 0, False, group_size, bits, mode))
        split = Split.even(input_dims, comm.size, unit=unit)
        inner = new_quantized_linear(split.local_size(comm.rank), output_dims, False, group_size, bits, mode)
        super().__init__(inner, mx.zeros((output_dims,)) if bias else None, comm, split)
        self.freeze()

    @classmethod
    def from_quantized_linear(
        cls,
        quantized_linear_layer: nn.Module,
        *,
        segments: Segments = 1,
        sizes: Sequence[int] | None = None,
        group: Group = None,
    ) -> QuantizedShardedToAllLinear:
        """This rank's inputs of an unsplit `nn.QuantizedLinear`, in complete groups, like `AllToShardedLinear.from_linear`."""
        _check_quantized(quantized_linear_layer)
        return cls._cut(quantized_linear_layer, *inputs_of(quantized_linear_layer, segments, sizes, group))


def _check_quantized(linear: nn.Module) -> None:
    if not isinstance(linear, nn.Module) or not is_quantized(linear):
        raise ModelError(f"{type(linear).__name__} is not quantized. from_linear takes plain layers.")


def outputs_of(
    linear: nn.Module, segments: Segments, sizes: Sequence[int] | None, group: Group
) -> tuple[Communicator, Split]:
    """The ranks of `group`, and the split of a layer's outputs over them."""
    comm = as_communicator(group)
    outputs, _ = linear_shape(linear)
    unit = functools.partial(paired_unit, linear, parts=comm.size)
    return comm, segment_split(outputs, comm.size, segments, sizes, unit)


def inputs_of(
    linear: nn.Module, segments: Segments, sizes: Sequence[int] | None, group: Group
) -> tuple[Communicator, Split]:
    """The ranks of `group`, and the split of a layer's inputs over them."""
    comm = as_communicator(group)
    _, inputs = linear_shape(linear)
    return comm, segment_split(inputs, comm.size, segments, sizes, lambda lengths: quantization_unit(linear))


def _draw_rows(rows: int, columns: int, scale: float, start: int, stop: int) -> mx.array:
    """Rows `start` to `stop` of an array `[rows, columns]` of numbers in [-scale, scale); only these rows are sampled."""
    key = mx.random.randint(0, 1 << 31, (2,)).astype(mx.uint32)
    keys = mx.random.split(key, rows)[start:stop]
    return mx.vmap(lambda key: mx.random.uniform(-scale, scale, (columns,), key=key))(keys)
