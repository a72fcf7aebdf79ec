"""What MLX's own tests assert of its distributed layers, of ours: `shard_linear`, `shard_inplace` and the four classes.

Source of the assertions: `python/tests/mlx_distributed_tests.py` of ml-explore/mlx. Two things are not as there: a split layer
wraps an inner one, so that its weight's gradient is found under `linear.weight`, though `layer.weight` and `layer["weight"]`
are there; and segments that do not divide are dealt out unevenly, where MLX refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from partita.mlx import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
    shard_inplace,
    shard_linear,
)
from tests.mlx.test_linear import FakeGroup
from tests.support.mlx_ranks import mlx_ranks

COLUMN, ROW = "all-to-sharded", "sharded-to-all"
SEED = 0xF0F0F0F0
ATOL, RTOL = 1e-6, 1e-4
"""MLX's own, for even parts."""
UNEVEN_ATOL, UNEVEN_RTOL = 1e-5, 1e-3
"""MLX's own, for uneven ones: sums are made in another order."""


def close(a: mx.array, b: mx.array, atol: float = ATOL, rtol: float = RTOL) -> bool:
    return a.shape == b.shape and bool(mx.allclose(a, b, atol=atol, rtol=rtol).item())


def mine(sizes: Sequence[int]) -> slice:
    """This rank's part of a dimension that is dealt out in these sizes."""
    rank = mx.distributed.init().rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def size() -> int:
    return mx.distributed.init().size()


def group(ranks: int, rank: int) -> Any:
    return FakeGroup(ranks, rank)


def every_part(ranks: int, layer: nn.Module, style: Any, **options: Any) -> list[Any]:
    """The parts of all ranks, made in this process."""
    return [shard_linear(layer, style, group=group(ranks, rank), **options) for rank in range(ranks)]


# --- on real ranks --------------------------------------------------------------------------------------------------------


def outputs(dims: int, sizes: list[int] | None, quantization: dict[str, Any] | None, tolerances: list[float]) -> None:
    """The output of a split layer is its part of the unsplit one's, or all of it."""
    mx.random.seed(SEED)
    options = {} if sizes is None else {"sizes": sizes}
    here = mine(sizes or [dims // size()] * size())
    x = mx.random.normal((4, dims))
    whole = nn.Linear(dims, dims, bias=True)
    if quantization is not None:
        whole = whole.to_quantized(**quantization)
    column, row = shard_linear(whole, COLUMN, **options), shard_linear(whole, ROW, **options)
    quantized = quantization is not None
    assert type(column) is (QuantizedAllToShardedLinear if quantized else AllToShardedLinear)
    assert type(row) is (QuantizedShardedToAllLinear if quantized else ShardedToAllLinear)
    y = whole(x)
    assert close(column(x), y[:, here], *tolerances)
    assert close(row(x[:, here]), y, *tolerances)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "quantization",
    [None, {}, {"group_size": 32, "bits": 8, "mode": "mxfp8"}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}],
    ids=["plain", "affine", "mxfp8", "mxfp4"],
)
def test_outputs(ranks: int, quantization: dict[str, Any] | None) -> None:
    mlx_ranks(ranks).run(outputs, 1024, None, quantization, [ATOL, RTOL])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("first", "step", "quantization"),
    [(16, 16, None), (32, 32, {"group_size": 32, "bits": 4})],
    ids=["plain", "quantized"],
)
def test_outputs_of_sizes_that_are_given(
    ranks: int, first: int, step: int, quantization: dict[str, Any] | None
) -> None:
    sizes = [first + step * rank for rank in range(ranks)]
    mlx_ranks(ranks).run(outputs, sum(sizes), sizes, quantization, [UNEVEN_ATOL, UNEVEN_RTOL])


def remainder(first: int, others: int, quantization: dict[str, Any] | None) -> None:
    """Without sizes the first ranks get what is left over."""
    mx.random.seed(SEED)
    sizes = [first] + [others] * (size() - 1)
    dims, here = sum(sizes), mine(sizes)
    x, whole = mx.random.normal((4, dims)), nn.Linear(dims, dims)
    if quantization is not None:
        whole = whole.to_quantized(**quantization)
    y = whole(x)
    assert close(shard_linear(whole, COLUMN)(x), y[:, here], UNEVEN_ATOL, UNEVEN_RTOL)
    assert close(shard_linear(whole, ROW)(x[:, here]), y, UNEVEN_ATOL, UNEVEN_RTOL)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("first", "others", "quantization"), [(17, 16, None), (96, 64, {"group_size": 32, "bits": 4})])
def test_outputs_with_a_remainder(ranks: int, first: int, others: int, quantization: dict[str, Any] | None) -> None:
    mlx_ranks(ranks).run(remainder, first, others, quantization)


def training(count: int, sizes: list[int] | None, width: int, tolerances: list[float]) -> None:
    """The gradient of each part is the part of the unsplit layer's gradient."""
    mx.random.seed(SEED)
    options = {} if sizes is None else {"sizes": sizes}
    here = mine(sizes or [width // size()] * size())

    def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return (model(x) * y).sum()

    whole = nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))
    styles: list[Any] = [COLUMN, ROW] * (count // 2)
    split = nn.Sequential(*(shard_linear(m, style, **options) for m, style in zip(whole.layers, styles, strict=True)))
    x, y = mx.random.normal((4, width)), mx.random.normal((4, width))
    expected_loss, expected = nn.value_and_grad(whole, loss)(whole, x, y)
    found_loss, found = nn.value_and_grad(split, loss)(split, x, y)
    mx.eval(expected_loss, expected, found_loss, found)
    assert close(found_loss, expected_loss, *tolerances)
    for place, style in enumerate(styles):
        weight, bias = expected["layers"][place]["weight"], expected["layers"][place]["bias"]
        layer = found["layers"][place]
        if style == COLUMN:
            assert close(layer["linear"]["weight"], weight[here], *tolerances)
            assert close(layer["linear"]["bias"], bias[here], *tolerances)
        else:
            assert close(layer["linear"]["weight"], weight[:, here], *tolerances)
            assert close(layer["bias"], bias, *tolerances)


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_of_four_layers(ranks: int) -> None:
    mlx_ranks(ranks).run(training, 4, None, 128, [ATOL, RTOL])


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_of_uneven_parts(ranks: int) -> None:
    sizes = [16 * (rank + 1) for rank in range(ranks)]
    mlx_ranks(ranks).run(training, 2, sizes, sum(sizes), [UNEVEN_ATOL, UNEVEN_RTOL])


class Convolution(nn.Module):
    """Sums over the ranks by itself where it is told to."""

    def __init__(self, inputs: int, outputs: int, sums: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=3)
        self.sums = sums

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv(x)
        return mx.distributed.all_sum(x) if self.sums else x


def convolutions() -> None:
    mx.random.seed(SEED)

    def where(path: str, weight: mx.array) -> int | None:
        _, place, *_, name = path.split(".")
        if int(place) % 2 == 0:
            return 0
        return None if name == "bias" else -1

    widths = [(3, 128), (128, 128), (128, 128), (128, 3)]
    whole = nn.Sequential(*(Convolution(*width, sums=False) for width in widths))
    split = nn.Sequential(*(Convolution(*width, sums=place % 2 == 1) for place, width in enumerate(widths)))
    split.update(whole.parameters())
    shard_inplace(split, where)
    x = mx.random.normal((4, 16, 16, 3))
    assert close(split(x), whole(x), ATOL, RTOL)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_predicate_cuts_convolutions(ranks: int) -> None:
    mlx_ranks(ranks).run(convolutions)


# --- parts of all ranks in one process ------------------------------------------------------------------------------------


def test_the_mode_is_kept_and_what_it_has_not_is_not_there() -> None:
    whole = nn.Linear(256, 256).to_quantized(group_size=32, bits=8, mode="mxfp8")
    for style in (COLUMN, ROW):
        for part in every_part(2, whole, style):
            assert part.mode == whole.mode == "mxfp8"
            assert part.get("biases") is None
            assert "biases" not in dict(tree_flatten(part.parameters())).keys() | part.linear.keys()


def test_plain_parts_make_up_the_layer() -> None:
    whole = nn.Linear(11, 12)
    rows = every_part(3, whole, COLUMN, sizes=[5, 4, 3])
    assert [part.weight.shape for part in rows] == [(5, 11), (4, 11), (3, 11)]
    for name in ("weight", "bias"):
        assert mx.array_equal(mx.concatenate([part[name] for part in rows]), whole[name])
    assert "output_dims=12" in repr(rows[0])
    columns = every_part(3, whole, ROW)
    assert [part.weight.shape for part in columns] == [(12, 4), (12, 4), (12, 3)]
    assert mx.array_equal(mx.concatenate([part.weight for part in columns], axis=1), whole.weight)
    assert "input_dims=11" in repr(columns[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_parts_are_cut_at_the_same_places(bits: int) -> None:
    whole, sizes = nn.Linear(192, 16).to_quantized(group_size=32, bits=bits), [96, 64, 32]
    parts = every_part(3, whole, ROW, sizes=sizes)
    for name in ("weight", "scales", "biases"):
        assert [part[name].shape[1] for part in parts] == [whole[name].shape[1] * n // 192 for n in sizes]
        assert mx.array_equal(mx.concatenate([part[name] for part in parts], axis=1), whole[name])
    assert "input_dims=192" in repr(parts[0])


def test_rows_of_a_quantized_layer_are_cut_anywhere() -> None:
    whole = nn.Linear(64, 10).to_quantized(group_size=32, bits=4)
    parts = every_part(2, whole, COLUMN, sizes=[7, 3])
    for name in ("weight", "scales", "biases", "bias"):
        assert mx.array_equal(mx.concatenate([part[name] for part in parts]), whole[name])
    assert "output_dims=10" in repr(parts[0])


def test_a_pair_of_quantized_layers_agrees() -> None:
    up, down = (nn.Linear(*dims).to_quantized(group_size=32, bits=4) for dims in ((64, 160), (160, 64)))
    columns, rows = every_part(3, up, COLUMN), every_part(3, down, ROW)
    assert [part.weight.shape[0] for part in columns] == [64, 64, 32]
    assert [part.scales.shape[1] * part.group_size for part in rows] == [64, 64, 32]


@pytest.mark.parametrize(
    ("dims", "style", "ranks", "options"),
    [
        ((10, 12), COLUMN, 3, {"sizes": [5, 4, 2]}),
        ((10, 12), COLUMN, 3, {"sizes": [6, 6]}),
        ((10, 12), COLUMN, 3, {"sizes": [12, 0, 0]}),
        ((10, 12), ROW, 3, {"sizes": [11, -1, 0]}),
        ((10, 2), COLUMN, 3, {}),
        ((10, 12), COLUMN, 3, {"segments": 2, "sizes": [4, 4, 4]}),
    ],
)
def test_what_cannot_be_dealt_out(dims: tuple[int, int], style: Any, ranks: int, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        shard_linear(nn.Linear(*dims), style, group=group(ranks, 0), **options)


def test_uneven_segments_are_dealt_out_each_by_itself() -> None:
    """MLX refuses these: 14 rows in two segments over three ranks."""
    whole = nn.Linear(10, 14)
    parts = every_part(3, whole, COLUMN, segments=2)
    assert [part.weight.shape[0] for part in parts] == [6, 4, 4]
    rows = [[0, 1, 2, 7, 8, 9], [3, 4, 10, 11], [5, 6, 12, 13]]
    for part, wanted in zip(parts, rows, strict=True):
        assert mx.array_equal(part.weight, whole.weight[mx.array(wanted)])


@pytest.mark.parametrize(
    ("style", "ranks", "options", "message"),
    [
        (ROW, 2, {"sizes": [48, 48]}, "multiples of 32"),
        (ROW, 4, {}, "3 units cannot be distributed over 4"),
        (COLUMN, 11, {}, "10 units cannot be distributed over 11"),
    ],
)
def test_what_of_a_quantized_layer_cannot_be(style: Any, ranks: int, options: dict[str, Any], message: str) -> None:
    whole = nn.Linear(96, 10).to_quantized(group_size=32, bits=4)
    with pytest.raises(ValueError, match=message):
        shard_linear(whole, style, group=group(ranks, 0), **options)


def in_place(whole: nn.Module, style: Any, ranks: int) -> list[nn.Module]:
    parts = []
    for rank in range(ranks):
        part = nn.Linear(*reversed(whole.weight.shape)) if not hasattr(whole, "scales") else _like(whole)
        part.update(whole.parameters())
        shard_inplace(part, style, group=group(ranks, rank))
        parts.append(part)
    return parts


def _like(whole: Any) -> nn.Module:
    outputs, inputs = whole.scales.shape[0], whole.scales.shape[1] * whole.group_size
    return nn.Linear(inputs, outputs).to_quantized(group_size=whole.group_size, bits=whole.bits)


def test_in_place_what_does_not_divide() -> None:
    whole = nn.Linear(12, 11)
    parts = in_place(whole, COLUMN, 3)
    assert [part.weight.shape[0] for part in parts] == [4, 4, 3]
    assert mx.array_equal(mx.concatenate([part.weight for part in parts]), whole.weight)


def test_in_place_quantized() -> None:
    """22 groups of 64 are dealt out as 8, 7 and 7, by either layer of a pair."""
    down, up = (nn.Linear(*dims).to_quantized(group_size=64, bits=4) for dims in ((1408, 64), (64, 1408)))
    parts = in_place(down, ROW, 3)
    assert [part.weight.shape[-1] for part in parts] == [64, 56, 56]
    assert [part.scales.shape[-1] for part in parts] == [8, 7, 7]
    for name in ("weight", "scales", "biases"):
        assert mx.array_equal(mx.concatenate([part[name] for part in parts], axis=-1), down[name])
    assert [part.weight.shape[0] for part in in_place(up, COLUMN, 3)] == [512, 448, 448]
