"""MLX's names: layers made by constructors and from unsplit ones, segments, sizes, and parameters cut in place."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from partita.errors import ModelError, PlanError
from partita.mlx import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
    shard_inplace,
    shard_linear,
)
from partita.mlx.layers.segments import segment_lengths
from tests.mlx.compare import SINGLE, assert_equal, draw, part, world
from tests.mlx.test_linear import FakeGroup, gradients
from tests.support.mlx_ranks import mlx_ranks, on_mlx


def fake(size: int, rank: int) -> Any:
    return FakeGroup(size, rank)


# --- the behaviours that MLX's own tests check ----------------------------------------------------------------------------


def as_mlx_checks(dims: int) -> None:
    world_ = mx.distributed.init()
    n, r = world_.size(), world_.rank()
    mine = slice(r * dims // n, (r + 1) * dims // n)
    x = mx.random.normal((4, dims))
    lin = nn.Linear(dims, dims, bias=True)
    for whole in (lin, lin.to_quantized(), lin.to_quantized(group_size=32, bits=8, mode="mxfp8")):
        column, row = shard_linear(whole, "all-to-sharded"), shard_linear(whole, "sharded-to-all")
        y = whole(x)
        assert_equal(column(x), y[:, mine], SINGLE, "all-to-sharded")
        assert_equal(row(x[:, mine]), y, SINGLE, "sharded-to-all")
    mod = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)))
    styles = ["all-to-sharded", "sharded-to-all"] * 2
    smod = nn.Sequential(*(shard_linear(m, style) for m, style in zip(mod.layers, styles, strict=True)))
    x, scale = mx.random.normal((4, 128)), mx.random.normal((4, 128))
    y, grads, dx = gradients(smod, x, scale)
    y_whole, grads_whole, dx_whole = gradients(mod, x, scale)
    assert_equal(y, y_whole, SINGLE, "output")
    assert_equal(dx, dx_whole, SINGLE, "input gradient")
    mine = slice(r * 128 // n, (r + 1) * 128 // n)
    assert {name.replace(".linear", "") for name in grads} == grads_whole.keys()
    for name, grad in grads.items():
        expected = grads_whole[name.replace(".linear", "")]
        if int(name.split(".")[1]) % 2 == 0:
            expected = expected[mine]
        elif name.endswith("weight"):
            expected = expected[:, mine]
        assert_equal(grad, expected, SINGLE, name)


@pytest.mark.parametrize("ranks", [2, 4])
def test_split_models_as_mlx_checks_them(ranks: int) -> None:
    mlx_ranks(ranks).run(as_mlx_checks, 256)


class Conv(nn.Module):
    """A convolution that sums over the ranks by itself, as MLX's test has it."""

    def __init__(self, *args: Any, aggregate: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, kernel_size=3)
        self.aggregate = aggregate

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv(x)
        return mx.distributed.all_sum(x) if self.aggregate else x


def by_predicate() -> None:
    def where(path: str, weight: mx.array) -> int | None:
        parts = path.split(".")
        if int(parts[1]) % 2 == 0:
            return 0
        return -1 if parts[-1] != "bias" else None

    shapes = [(3, 32), (32, 32), (32, 32), (32, 3)]
    mod = nn.Sequential(*(Conv(*shape) for shape in shapes))
    smod = nn.Sequential(*(Conv(*shape, aggregate=i % 2 == 1) for i, shape in enumerate(shapes)))
    smod.update(mod.parameters())
    shard_inplace(smod, where)
    x = mx.random.normal((2, 12, 12, 3))
    assert_equal(smod(x), mod(x), SINGLE)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_module_is_cut_by_a_predicate(ranks: int) -> None:
    mlx_ranks(ranks).run(by_predicate)


# --- parts of every rank, looked at in one process ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "sizes", "expected"),
    [
        ("all-to-sharded", [5, 4, 3], [(5, 11), (4, 11), (3, 11)]),
        ("all-to-sharded", None, [(4, 11), (4, 11), (4, 11)]),
        ("sharded-to-all", [5, 5, 1], [(12, 5), (12, 5), (12, 1)]),
        ("sharded-to-all", None, [(12, 4), (12, 4), (12, 3)]),
    ],
)
def test_uneven_parts(style: Any, sizes: list[int] | None, expected: list[tuple[int, int]]) -> None:
    whole = nn.Linear(11, 12)
    parts = [shard_linear(whole, style, sizes=sizes, group=fake(3, rank)) for rank in range(3)]
    assert [part.weight.shape for part in parts] == expected
    axis = 0 if style == "all-to-sharded" else 1
    assert mx.array_equal(mx.concatenate([part.weight for part in parts], axis=axis), whole.weight)
    if axis == 0:
        assert mx.array_equal(mx.concatenate([part.bias for part in parts]), whole.bias)
    else:
        assert all(mx.array_equal(part.bias, whole.bias) for part in parts)
    assert "input_dims=11, output_dims=12" in repr(parts[0])


def test_a_quantized_pair_is_dealt_out_alike() -> None:
    up = nn.Linear(64, 160).to_quantized(group_size=32, bits=4)
    down = nn.Linear(160, 64).to_quantized(group_size=32, bits=4)
    for rank, rows in enumerate((64, 64, 32)):
        column = shard_linear(up, "all-to-sharded", group=fake(3, rank))
        row = shard_linear(down, "sharded-to-all", group=fake(3, rank))
        assert column.weight.shape[0] == rows
        assert row.scales.shape[1] * row.group_size == rows


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_parts_of_quantized_inputs(bits: int) -> None:
    sizes = [96, 64, 32]
    whole = nn.Linear(192, 16).to_quantized(group_size=32, bits=bits)
    parts = [shard_linear(whole, "sharded-to-all", sizes=sizes, group=fake(3, rank)) for rank in range(3)]
    for name in ("weight", "scales", "biases"):
        assert [part[name].shape[1] for part in parts] == [whole[name].shape[1] * n // 192 for n in sizes]
        assert mx.array_equal(mx.concatenate([part[name] for part in parts], axis=1), whole[name])
    assert "input_dims=192" in repr(parts[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shard_linear(nn.Linear(4, 12), "all-to-sharded", sizes=[5, 4, 2], group=fake(3, 0)), "add up to 12"),
        (
            lambda: shard_linear(nn.Linear(4, 12), "all-to-sharded", sizes=[6, 6], group=fake(3, 0)),
            "3 positive numbers",
        ),
        (lambda: shard_linear(nn.Linear(4, 12), "all-to-sharded", sizes=[12, 0, 0], group=fake(3, 0)), "3 positive"),
        (lambda: shard_linear(nn.Linear(10, 4), "sharded-to-all", sizes=[11, -1, 0], group=fake(3, 0)), "3 positive"),
        (
            lambda: shard_linear(nn.Linear(4, 2), "all-to-sharded", group=fake(3, 0)),
            "2 units cannot be distributed over 3",
        ),
        (
            lambda: shard_linear(nn.Linear(4, 12), "all-to-sharded", segments=2, sizes=[4, 4, 4], group=fake(3, 0)),
            "exclude each other",
        ),
        (lambda: shard_linear(nn.Linear(4, 12), "all-to-sharded", segments=5, group=fake(2, 0)), "divide the 12"),
        (lambda: shard_linear(nn.Linear(4, 12), "sideways", group=fake(2, 0)), "sharding must be 'all-to-sharded'"),
        (lambda: shard_linear(nn.LayerNorm(4), "all-to-sharded", group=fake(2, 0)), "LayerNorm cannot be split"),
        (lambda: shard_inplace(nn.Linear(4, 4), "sideways", group=fake(2, 0)), "sharding must be"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises((PlanError, ModelError), match=message):
        call()


# --- segments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "segments", "lengths"),
    [
        (12, 1, [12]),
        (12, 3, [4, 4, 4]),
        (12, [6, 9], [6, 3, 3]),
        (8, [0.5, 0.75], [4, 2, 2]),
        (100, [0.29], [29, 71]),
        (9, [1 / 3, 2 / 3], [3, 3, 3]),
        (7, [Fraction(2, 7), Fraction(3, 7)], [2, 1, 4]),
        (12, [], [12]),
    ],
)
def test_lengths_of_segments(size: int, segments: Any, lengths: list[int]) -> None:
    assert segment_lengths(size, segments) == lengths


@pytest.mark.parametrize(
    ("size", "segments", "message"),
    [
        (12, 5, "divide the 12 elements"),
        (12, 0, "divide the 12 elements"),
        (10, [0.55], "is 5.5, which is not an integer"),
        (12, [9, 6], "must ascend"),
        (12, [6, 12], "must ascend"),
        (12, [0], "must ascend"),
        (12, [1.5], "must ascend"),
    ],
)
def test_segments_that_cannot_be(size: int, segments: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        segment_lengths(size, segments)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_shares_are_exact(lengths: list[int]) -> None:
    size = sum(lengths)
    cuts = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
    for positions in (cuts, [cut / size for cut in cuts], [Fraction(cut, size) for cut in cuts]):
        assert segment_lengths(size, positions) == lengths


def fused(segments: Any, lengths: list[int]) -> None:
    """A fused projection's local outputs are the rank's part of each of the things that lie in it."""
    comm = world()
    whole = nn.Linear(5, sum(lengths))
    x = mx.random.normal((3, 5))
    mine = shard_linear(whole, "all-to-sharded", segments=segments)
    assert [n for _, n in zip(lengths, mine.split.ranges(comm.rank), strict=True)]
    parts, start = [], 0
    for n in lengths:
        piece = whole(x)[:, start : start + n]
        share = mine.split.ranges(comm.rank)[len(parts)]
        parts.append(piece[:, share[0] - start : share[1] - start])
        start += n
    assert_equal(mine(x), mx.concatenate(parts, axis=1), SINGLE)
    down = nn.Linear(sum(lengths), 4)
    y = mx.random.normal((3, sum(lengths)))
    row = shard_linear(down, "sharded-to-all", segments=segments)
    assert_equal(row(part(y, -1, row.split.ranges(comm.rank))), down(y), SINGLE)


@pytest.mark.parametrize(
    ("segments", "lengths"), [(3, [4, 4, 4]), ([8, 11], [8, 3, 3]), ([0.5], [7, 7]), ([Fraction(1, 4)], [3, 9])]
)
def test_fused_layers(segments: Any, lengths: list[int]) -> None:
    mlx_ranks(3).run(fused, segments, lengths)


# --- constructors ---------------------------------------------------------------------------------------------------------


def constructed(ranks: int) -> tuple[list[float], list[float]]:
    """Sums over the whole of what the ranks drew, and whether it works."""
    comm = world()
    assert comm.size == ranks
    column, row = AllToShardedLinear(12, 7), ShardedToAllLinear(7, 12)
    assert column.weight.shape == (column.split.local_size(comm.rank), 12)
    assert row.weight.shape == (12, row.split.local_size(comm.rank))
    assert {name for name, _ in tree_flatten(column.trainable_parameters())} == {"linear.weight", "linear.bias"}
    assert {name for name, _ in tree_flatten(row.trainable_parameters())} == {"linear.weight", "bias"}
    whole_column = comm.all_gather(column.weight, 0, column.split.local_sizes)
    whole_row = comm.all_gather(row.weight, 1, row.split.local_sizes)
    for whole, inputs in ((whole_column, 12), (whole_row, 7)):
        assert 0.5 * inputs**-0.5 < mx.abs(whole).max().item() <= inputs**-0.5  # type: ignore[operator]
    y = row(column(mx.ones((2, 12))))
    biases = comm.all_gather(column.bias, 0, column.split.local_sizes)
    assert_equal(y, (mx.ones((2, 12)) @ whole_column.T + biases) @ whole_row.T + row.bias, SINGLE)
    assert "bias" not in AllToShardedLinear(4, 4, bias=False).linear
    assert "bias" not in ShardedToAllLinear(4, 4, bias=False)
    return whole_column.flatten().tolist(), whole_row.flatten().tolist()  # type: ignore[return-value]


def test_new_layers_do_not_depend_on_the_number_of_ranks() -> None:
    one, *_ = on_mlx(1, constructed, 1)
    for ranks in (2, 3):
        assert all(numbers == one for numbers in mlx_ranks(ranks).run(constructed, ranks))


@pytest.mark.parametrize(
    ("options", "group_size", "bits"),
    [
        ({}, 64, 4),
        ({"group_size": 32, "bits": 3}, 32, 3),
        ({"mode": "mxfp4"}, 32, 4),
        ({"mode": "mxfp8"}, 32, 8),
        ({"mode": "nvfp4"}, 16, 4),
    ],
)
def test_new_quantized_layers_take_an_unsplit_layers_weights(
    options: dict[str, Any], group_size: int, bits: int
) -> None:
    quantization = {"group_size": group_size, "bits": bits, "mode": options.get("mode", "affine")}
    up, down = nn.Linear(128, 192).to_quantized(**quantization), nn.Linear(192, 128).to_quantized(**quantization)
    for rank in range(2):
        for new, made in (
            (
                QuantizedAllToShardedLinear(128, 192, group=fake(2, rank), **options),
                QuantizedAllToShardedLinear.from_quantized_linear(up, sizes=[96, 96], group=fake(2, rank)),
            ),
            (
                QuantizedShardedToAllLinear(192, 128, group=fake(2, rank), **options),
                QuantizedShardedToAllLinear.from_quantized_linear(down, group=fake(2, rank)),
            ),
        ):
            assert (new.group_size, new.bits) == (group_size, bits)
            assert tree_flatten(new.trainable_parameters()) == []
            shapes = {name: (x.shape, x.dtype) for name, x in tree_flatten(new.parameters())}
            assert shapes == {name: (x.shape, x.dtype) for name, x in tree_flatten(made.parameters())}
            new.load_weights(tree_flatten(made.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantizedAllToShardedLinear(64, 64, mode="fp7", group=fake(2, 0)), "mode must be one of affine"),
        (lambda: QuantizedAllToShardedLinear(65, 64, group=fake(2, 0)), "multiple of group_size \\(64\\); got 65"),
        (lambda: QuantizedShardedToAllLinear(64, 64, group=fake(2, 0)), "1 unit cannot be distributed over 2 ranks"),
        (lambda: AllToShardedLinear(4, 1, group=fake(2, 0)), "1 unit cannot be distributed over 2 ranks"),
    ],
)
def test_layers_that_cannot_be_made(make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


# --- in place -------------------------------------------------------------------------------------------------------------


def test_uneven_parts_in_place() -> None:
    whole = nn.Linear(12, 11)
    shapes, parts = [], []
    for rank in range(3):
        module = nn.Linear(12, 11)
        module.update(whole.parameters())
        shard_inplace(module, "all-to-sharded", group=fake(3, rank))
        shapes.append((module.weight.shape, module.bias.shape))
        parts.append(module.weight)
    assert shapes == [((4, 12), (4,)), ((4, 12), (4,)), ((3, 12), (3,))]
    assert mx.array_equal(mx.concatenate(parts), whole.weight)


def test_quantized_parts_in_place_belong_together() -> None:
    up = nn.Linear(64, 1408).to_quantized(group_size=64, bits=4)
    down = nn.Linear(1408, 64).to_quantized(group_size=64, bits=4)
    rows, parts = [], {"weight": [], "scales": [], "biases": []}  # type: ignore[var-annotated]
    for rank in range(3):
        module = nn.Sequential(nn.Linear(64, 1408), nn.Linear(1408, 64))
        nn.quantize(module, group_size=64, bits=4)
        module.layers[0].update(up.parameters())
        module.layers[1].update(down.parameters())
        shard_inplace(module.layers[0], "all-to-sharded", group=fake(3, rank))
        shard_inplace(module.layers[1], "sharded-to-all", group=fake(3, rank))
        rows.append(module.layers[0].weight.shape[0])
        assert module.layers[0].bias.shape == (rows[-1],)
        for name, found in parts.items():
            found.append(module.layers[1][name])
    # 22 groups, dealt out as 8, 7 and 7.
    assert rows == [512, 448, 448]
    assert [x.shape[1] for x in parts["weight"]] == [64, 56, 56]
    assert [x.shape[1] for x in parts["scales"]] == [8, 7, 7]
    for name, found in parts.items():
        assert mx.array_equal(mx.concatenate(found, axis=1), down[name])


def test_a_predicate_cuts_a_quantized_weight_and_its_scales_alike() -> None:
    whole = nn.Linear(96, 4, bias=False).to_quantized(group_size=32, bits=4)
    widths = []
    for rank in range(2):
        module = nn.Linear(96, 4, bias=False).to_quantized(group_size=32, bits=4)
        module.update(whole.parameters())
        shard_inplace(module, lambda path, x: (-1, 1), group=fake(2, rank))
        widths.append((module.weight.shape[1] * 32 // 4, module.scales.shape[1] * 32, module.biases.shape[1] * 32))
    assert widths == [(64, 64, 64), (32, 32, 32)]


def test_stacks_of_experts_in_place() -> None:
    switch_layers = pytest.importorskip("mlx_lm.models.switch_layers")
    stack = switch_layers.SwitchLinear(64, 96, 5, bias=True)
    for module in (stack, stack.to_quantized(group_size=32, bits=4)):
        shapes = []
        for style in ("all-to-sharded", "sharded-to-all"):
            twin = switch_layers.SwitchLinear(64, 96, 5)
            twin = twin if module is stack else twin.to_quantized(group_size=32, bits=4)
            shard_inplace(twin, style, group=fake(2, 0))
            shapes.append((twin.num_experts, twin.output_dims, twin.input_dims, twin.bias.shape))
        assert shapes == [
            (5, 48 if module is stack else 64, 64, (5, 48 if module is stack else 64)),
            (5, 96, 32, (5, 96)),
        ]


def bias_counts_once(ranks: int) -> None:
    """The caller sums what a module cut in place gives; its bias must not come out once a rank."""
    comm = world()
    whole = nn.Linear(6, 5)
    x = mx.random.normal((3, 6))
    expected = whole(x)
    shard_inplace(whole, "sharded-to-all")
    ((start, stop),) = ((comm.rank * 6 // ranks, (comm.rank + 1) * 6 // ranks),)
    assert_equal(comm.all_sum(whole(x[:, start:stop])), expected, SINGLE)
    trained = {name for name, _ in tree_flatten(whole.trainable_parameters())}
    assert trained == ({"weight", "bias"} if comm.rank == 0 else {"weight"})


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_bias_in_place_counts_once(ranks: int) -> None:
    mlx_ranks(ranks).run(bias_counts_once, ranks)


def test_the_whole_layer_is_not_changed() -> None:
    whole = nn.Linear(4, 4)
    before = dict(tree_flatten(whole.parameters()))
    for style in ("all-to-sharded", "sharded-to-all"):
        shard_linear(whole, style, group=fake(2, 1))  # type: ignore[arg-type]
    after = dict(tree_flatten(whole.parameters()))
    assert all(before[name] is after[name] for name in before)
    assert draw(1).shape == (1,)
