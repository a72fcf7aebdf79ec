"""Column and row layers around quantized layers of every mode, group size and bits that MLX has."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from partita.core.sharding.split import Split
from partita.errors import PlanError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.mlx.layers.sharding import shard_linear
from tests.mlx.compare import SINGLE, assert_equal, draw, part, world
from tests.mlx.test_linear import FakeGroup
from tests.support.mlx_ranks import mlx_ranks

MODES = [
    *(("affine", group_size, bits) for group_size in (32, 64, 128) for bits in (1, 2, 3, 4, 5, 6, 8)),
    ("mxfp4", 32, 4),
    ("mxfp8", 32, 8),
    ("nvfp4", 16, 4),
]
every_mode = pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)


def quantized(
    inputs: int, outputs: int, mode: str, group_size: int, bits: int, bias: bool = True
) -> nn.QuantizedLinear:
    plain = nn.Linear(inputs, outputs, bias)
    plain.weight = mx.random.normal((outputs, inputs))
    layer = nn.QuantizedLinear.from_linear(plain, group_size, bits, mode)
    if bias:
        layer.bias = mx.random.normal((outputs,))
    return layer.freeze()  # MLX leaves the bias to be trained


def dx(module: nn.Module, x: mx.array, scale: mx.array) -> mx.array:
    return mx.grad(lambda x: (module(x) * scale).sum())(x)  # type: ignore[no-any-return]


def compare(mode: str, group_size: int, bits: int) -> None:
    comm = world()
    width = 8 * group_size  # eight groups over three ranks
    up, down = quantized(128, width, mode, group_size, bits), quantized(width, 7, mode, group_size, bits)
    x, scale = draw(3, 128, dtype=mx.float32), draw(3, 7, dtype=mx.float32)
    column, row = shard_linear(up, "all-to-sharded", group=comm), shard_linear(down, "sharded-to-all", group=comm)
    assert column.split == row.split == Split.even(width, comm.size, unit=group_size), "paired"
    ranges = column.split.ranges(comm.rank)
    assert column.mode == row.mode == mode
    assert (column.bits, column.group_size) == (bits, group_size)
    if mode != "affine":
        assert column.get("biases") is None
        assert row.get("biases") is None
    assert tree_flatten(column.trainable_parameters()) == tree_flatten(row.trainable_parameters()) == []

    assert_equal(column(x), part(up(x), -1, ranges), SINGLE, "column")
    h = up(x)
    assert_equal(row(part(h, -1, ranges)), down(h), SINGLE, "row")
    both, both_split = nn.Sequential(up, down), nn.Sequential(column, row)
    assert_equal(dx(both_split, x, scale), dx(both, x, scale), SINGLE, "input gradient")
    # The words, scales and biases are the unsplit layer's own.
    for name in ("weight", "scales", "biases"):
        if name in up:
            rows = mx.concatenate([up[name][a:b] for a, b in ranges])
            assert_equal(column[name], rows, 0, name)
            gathered = comm.all_gather(row[name], 1, [n * row[name].shape[1] // row.split.local_size(comm.rank)
                                                      for n in row.split.local_sizes])  # fmt: skip
            assert_equal(gathered, down[name], 0, name)


@every_mode
def test_split_quantized_layers_equal_the_unsplit_ones(mode: str, group_size: int, bits: int) -> None:
    mlx_ranks(3).run(compare, mode, group_size, bits)


def segments(mode: str, group_size: int, bits: int) -> None:
    """A fused layer whose segments each rank holds its part of, by inputs and by outputs."""
    comm = world()
    lengths = [4 * group_size, 2 * group_size]
    split = Split.even(6 * group_size, comm.size, unit=group_size, segments=lengths)
    mine = split.ranges(comm.rank)
    assert len(mine) == 2
    up, down = quantized(128, split.size, mode, group_size, bits), quantized(split.size, 7, mode, group_size, bits)
    x = draw(3, 128, dtype=mx.float32)
    h = up(x)
    column = ColumnParallelLinear.from_linear(up, comm, split)
    row = RowParallelLinear.from_linear(down, comm, split)
    assert_equal(column(x), part(h, -1, mine), SINGLE, "column")
    assert_equal(row(part(h, -1, mine)), down(h), SINGLE, "row")
    gathered = ColumnParallelLinear.from_linear(up, comm, split, gather_output=True)
    assert_equal(gathered(x), h, SINGLE, "gathered")
    whole = RowParallelLinear.from_linear(down, comm, split, input_is_parallel=False)
    assert_equal(whole(h), down(h), SINGLE, "from whole inputs")


@every_mode
def test_segments_of_quantized_layers(mode: str, group_size: int, bits: int) -> None:
    mlx_ranks(2).run(segments, mode, group_size, bits)


def quantized_afterwards() -> None:
    """A split layer whose inner layer is quantized equals the unsplit layer that is quantized."""
    comm = world()
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    split = nn.Sequential(
        ColumnParallelLinear.from_linear(model.layers[0], comm, Split.even(96, comm.size, unit=32)),
        RowParallelLinear.from_linear(model.layers[1], comm, Split.even(96, comm.size, unit=32)),
    )
    for one in (model, split):
        nn.quantize(one, group_size=32, bits=4)
    assert all(isinstance(layer.linear, nn.QuantizedLinear) for layer in split.layers)
    x = draw(3, 64, dtype=mx.float32)
    assert_equal(split(x), model(x), SINGLE, "output")
    scale = draw(3, 64, dtype=mx.float32)
    assert_equal(dx(split, x, scale), dx(model, x, scale), SINGLE, "input gradient")
    bias = split.layers[1].bias
    assert_equal(bias, model.layers[1].bias, 0, "a row layer's bias stays whole")


def test_an_inner_layer_can_be_quantized() -> None:
    mlx_ranks(3).run(quantized_afterwards)


def fake(size: int, rank: int = 0) -> Communicator:
    return Communicator(FakeGroup(size, rank))  # type: ignore[arg-type]


def test_a_cut_through_a_quantization_group_is_refused() -> None:
    layer = quantized(96, 10, "affine", 32, 4)
    with pytest.raises(
        PlanError, match=r"the inputs \[0, 48\) divide a quantization group of 32: split at multiples of 32"
    ):
        RowParallelLinear.from_linear(layer, fake(2), Split.even(96, 2))
    with pytest.raises(PlanError, match="3 units cannot be distributed over 4 ranks"):
        RowParallelLinear.from_linear(layer, fake(4))
    with pytest.raises(PlanError, match="multiples of 32"):
        shard_linear(layer, "sharded-to-all", sizes=[48, 48], group=fake(2))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_row_layer_quantized_afterwards_through_a_group_is_refused(rank: int) -> None:
    # As many inputs as whole groups, which are not those of the unsplit layer.
    split = Split(128, (((0, 16), (112, 128)), ((16, 112),)))
    row = RowParallelLinear.from_linear(nn.Linear(128, 4), fake(2, rank), split)
    with pytest.raises(PlanError, match="divide a quantization group of 32"):
        nn.quantize(row, group_size=32, bits=4)


def test_outputs_can_be_cut_anywhere() -> None:
    layer = quantized(64, 10, "affine", 32, 4)
    parts = [shard_linear(layer, "all-to-sharded", sizes=[7, 3], group=fake(2, rank)) for rank in range(2)]
    for name in ("weight", "scales", "biases", "bias"):
        assert mx.array_equal(mx.concatenate([part[name] for part in parts]), layer[name]), name


def test_nothing_is_quantized_or_drawn_to_make_a_part() -> None:
    calls = []
    quantize, uniform = mx.quantize, mx.random.uniform
    layer = quantized(64, 96, "affine", 32, 4)
    try:
        mx.quantize = mx.random.uniform = lambda *args, **kwargs: calls.append(args)  # type: ignore[assignment]
        shard_linear(layer, "all-to-sharded", group=fake(2))
        shard_linear(layer, "sharded-to-all", group=fake(2))
        shard_linear(_plain(), "sharded-to-all", group=fake(2))
    finally:
        mx.quantize, mx.random.uniform = quantize, uniform  # type: ignore[assignment]
    assert calls == []


def _plain() -> nn.Linear:
    from partita.mlx.layers.inner import new_linear

    return new_linear(mx.zeros((4, 4)), None)
