"""Column and row layers against the unsplit layer, on real ranks: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from partita.core.sharding.split import Split
from partita.errors import ModelError, PlanError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.mappings import gather_from, scatter_to
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.mlx.layers.region import RegionInput
from tests.mlx.compare import EXACT, SINGLE, assert_equal, draw, part, world
from tests.support.compiling import compiling
from tests.support.mlx_ranks import mlx_ranks, on_mlx


def linear(inputs: int, outputs: int, bias: bool = True, dtype: mx.Dtype = mx.float64) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias)
    layer.weight = draw(outputs, inputs, dtype=dtype)
    if bias:
        layer.bias = draw(outputs, dtype=dtype)
    return layer


def gradients(module: nn.Module, x: mx.array, scale: mx.array) -> tuple[mx.array, dict[str, mx.array], mx.array]:
    """Output, gradients by the unsplit layer's names, and the input's gradient of `sum(module(x) * scale)`."""

    def loss(parameters: dict[str, Any], x: mx.array) -> tuple[mx.array, mx.array]:
        module.update(parameters)
        y = module(x)
        return (y * scale).sum(), y

    (_, y), (grads, dx) = mx.value_and_grad(loss, argnums=(0, 1))(module.trainable_parameters(), x)
    return y, {name.removeprefix("linear."): grad for name, grad in tree_flatten(grads)}, dx


SPLITS = {
    "even": Split.even(12, 3),
    "uneven": Split.even(13, 3),
    "segments": Split.even(15, 3, segments=[9, 6]),
    "weights": Split.even(12, 3, weights=[1, 2, 3]),
    "turned": Split(6, (((4, 6),), ((0, 1), (3, 4)), ((1, 3),))),
}
COPIES = {
    "kv heads": Split.kv_heads(6, 2, 3, width=2),
    "all": Split.replicated(4, 3),
    "some": Split(6, (((0, 4),), ((2, 6),), ((5, 6), (0, 2)))),
}

# --- columns ------------------------------------------------------------------------------------------------------------


def column(split: Split, bias: bool, gather: bool, dtype: str) -> None:
    comm = world()
    kind = getattr(mx, dtype)
    whole = linear(5, split.size, bias, kind)
    x, scale = draw(2, 4, 5, dtype=kind), draw(2, 4, split.size, dtype=kind)
    mine = split.ranges(comm.rank)
    layer = ColumnParallelLinear.from_linear(whole, comm, split, gather_output=gather)
    tolerance = EXACT if kind == mx.float64 else SINGLE

    # A copy's output is the copy's only: each is scaled by its share, so that the copies count as one.
    share = 1 / mx.array([len(split.holders(i)) for i in range(split.size)]).astype(kind)
    y, grads, dx = gradients(layer, x, scale if gather else part(scale * share, -1, mine))
    y_whole, grads_whole, dx_whole = gradients(whole, x, scale)

    assert_equal(y, y_whole if gather else part(y_whole, -1, mine), tolerance, "output")
    assert_equal(dx, dx_whole, tolerance, "input gradient")
    assert grads.keys() == grads_whole.keys()
    for name, grad in grads.items():
        assert_equal(grad, part(grads_whole[name], 0, mine), tolerance, name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_columns_equal_the_unsplit_layer(split: Split, bias: bool, gather: bool, dtype: str) -> None:
    mlx_ranks(3).run(column, split, bias, gather, dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("split", COPIES.values(), ids=COPIES)
def test_copied_columns_have_the_gradient_of_one(split: Split, bias: bool) -> None:
    mlx_ranks(3).run(column, split, bias, False, "float64")


def column_by_default(ranks: int) -> None:
    comm = world()
    assert comm.size == ranks
    layer = ColumnParallelLinear.from_linear(linear(3, 7), comm)
    assert layer.split == Split.even(7, ranks)
    assert layer.weight.shape == (Split.even(7, ranks).local_size(comm.rank), 3)
    assert layer.linear.bias.shape == layer["bias"].shape == (layer.weight.shape[0],)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_columns_are_dealt_out_evenly_by_default(ranks: int) -> None:
    on_mlx(ranks, column_by_default, ranks)


def expanded() -> None:
    """Query heads that share KV heads unevenly get the KV heads that they attend to."""
    comm = world()
    whole = linear(3, 4)
    split = Split(4, (((0, 2),), ((2, 4),)))
    order = [0, 0, 1]
    layer = ColumnParallelLinear.from_linear(whole, comm, split, expand=order)
    x = draw(2, 3)
    expected = mx.take(part(whole(x), -1, split.ranges(comm.rank)), mx.array(order), axis=-1)
    assert_equal(layer(x), expected)


def test_outputs_can_be_repeated() -> None:
    mlx_ranks(2).run(expanded)


def siblings() -> None:
    """Three layers with one input enter once: one sum of their gradients, and the same gradient."""
    comm = world()
    counted: list[int] = []
    all_sum = comm.all_sum
    comm.all_sum = lambda x: counted.append(1) or all_sum(x)  # type: ignore[method-assign, func-returns-value]
    try:
        wholes = [linear(4, n) for n in (6, 2, 2)]
        x = draw(3, 4)
        entry = RegionInput(comm, users=3)
        for layers in (
            [ColumnParallelLinear.from_linear(whole, comm, entry=entry) for whole in wholes],
            [ColumnParallelLinear.from_linear(whole, comm) for whole in wholes],
        ):
            counted.clear()
            for _ in range(2):
                mine = mx.grad(lambda x: sum(mx.square(layer(x)).sum() for layer in layers))(x)  # noqa: B023
                assert_equal(mine, mx.grad(lambda x: sum(mx.square(whole(x)).sum() for whole in wholes))(x))
            assert len(counted) == (2 if layers[0].entry is entry else 6)
    finally:
        del comm.all_sum


def test_siblings_enter_once() -> None:
    mlx_ranks(2).run(siblings)


def siblings_of_their_own() -> None:
    comm = world()
    entry = RegionInput(comm, users=2)
    first, second = (ColumnParallelLinear.from_linear(linear(4, 4), comm, entry=entry) for _ in range(2))
    x, y = draw(2, 4), draw(2, 4)
    grad = mx.grad(lambda x, y: first(x).sum() + second(y).sum(), argnums=(0, 1))(x, y)
    own = [comm.all_sum(layer.weight.sum(0)) for layer in (first, second)]
    for mine, expected in zip(grad, own, strict=True):
        assert_equal(mine, mx.broadcast_to(expected, (2, 4)))


def test_siblings_with_inputs_of_their_own_are_summed_apart() -> None:
    mlx_ranks(2).run(siblings_of_their_own)


# --- rows ---------------------------------------------------------------------------------------------------------------


def row(split: Split, bias: bool, parallel: bool, dtype: str) -> None:
    comm = world()
    kind = getattr(mx, dtype)
    whole = linear(split.size, 5, bias, kind)
    x, scale = draw(2, 4, split.size, dtype=kind), draw(2, 4, 5, dtype=kind)
    mine = split.ranges(comm.rank)
    layer = RowParallelLinear.from_linear(whole, comm, split, input_is_parallel=parallel)
    tolerance = EXACT if kind == mx.float64 else SINGLE

    y, grads, dx = gradients(layer, part(x, -1, mine) if parallel else x, scale)
    y_whole, grads_whole, dx_whole = gradients(whole, x, scale)

    assert_equal(y, y_whole, tolerance, "output")
    assert_equal(dx, part(dx_whole, -1, mine) if parallel else dx_whole, tolerance, "input gradient")
    assert grads.keys() == grads_whole.keys()
    assert_equal(grads["weight"], part(grads_whole["weight"], 1, mine), tolerance, "weight")
    if bias:
        assert_equal(grads["bias"], grads_whole["bias"], tolerance, "bias")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_rows_equal_the_unsplit_layer(split: Split, bias: bool, parallel: bool, dtype: str) -> None:
    mlx_ranks(3).run(row, split, bias, parallel, dtype)


def low_precision(dtype: str) -> None:
    comm = world()
    kind = getattr(mx, dtype)
    whole = linear(24, 5, True, kind)
    x = draw(3, 24, dtype=kind)
    exact = linear(24, 5)
    exact.weight, exact.bias = whole.weight.astype(mx.float64), whole.bias.astype(mx.float64)
    layer = RowParallelLinear.from_linear(whole, comm, input_is_parallel=False)
    # Each of the few roundings (product, sums, bias) costs half a unit of the last of 11 (8) bits.
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    y = layer(x)
    assert y.dtype == kind
    assert_equal(y.astype(mx.float64), exact(x.astype(mx.float64)), 6 * unit)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_halves(dtype: str) -> None:
    mlx_ranks(3).run(low_precision, dtype)


# --- a whole block, also compiled and over sequences --------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down(mx.tanh(self.up(x)))


def blocks(width: int, **options: Any) -> tuple[Block, Block, Communicator, Split]:
    comm = world()
    split = Split.even(width, comm.size)
    whole = Block(linear(6, width), linear(width, 6))
    mine = Block(
        ColumnParallelLinear.from_linear(whole.up, comm, split, **options),
        RowParallelLinear.from_linear(whole.down, comm, split, **options),
    )
    return whole, mine, comm, split


def block() -> None:
    whole, mine, comm, split = blocks(7)
    x, scale = draw(2, 3, 6), draw(2, 3, 6)
    y, grads, dx = gradients(mine, x, scale)
    y_whole, grads_whole, dx_whole = gradients(whole, x, scale)
    ranges = split.ranges(comm.rank)
    assert_equal(y, y_whole, what="output")
    assert_equal(dx, dx_whole, what="input gradient")
    assert {name.replace(".linear", "") for name in grads} == grads_whole.keys()
    for name, axis in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
        assert_equal(grads[name.replace(".", ".linear.")], part(grads_whole[name], axis, ranges), what=name)
    assert_equal(grads["down.bias"], grads_whole["down.bias"], what="down.bias")
    with compiling():
        compiled = mx.compile(mx.value_and_grad(lambda x: (mine(x) * scale).sum()))
        for _ in range(2):
            assert_equal(compiled(x)[1], dx_whole, what="compiled")
    trained = nn.value_and_grad(mine, lambda x: (mine(x) * scale).sum())(x)[1]
    assert_equal(trained["down"]["linear"]["weight"], grads["down.linear.weight"], 0, "nn.value_and_grad")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_block_equals_the_unsplit_block(ranks: int) -> None:
    on_mlx(ranks, block)


def test_a_block_over_a_ring() -> None:
    mlx_ranks(3, "ring").run(block)


def sequence() -> None:
    """Between the blocks each rank holds a part of the sequence."""
    whole, mine, comm, split = blocks(7, sequence_parallel=True, sequence_axis=1)
    x, scale = draw(2, 3 * comm.size, 6), draw(2, 3 * comm.size, 6)

    class Sharded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = mine

        def __call__(self, x: mx.array) -> mx.array:
            return gather_from(self.block(scatter_to(x, comm, 1)), comm, 1)

    y, grads, dx = gradients(Sharded(), x, scale)
    y_whole, grads_whole, dx_whole = gradients(whole, x, scale)
    assert_equal(y, y_whole, what="output")
    assert_equal(dx, dx_whole, what="input gradient")
    ranges = split.ranges(comm.rank)
    assert_equal(grads["block.up.linear.weight"], part(grads_whole["up.weight"], 0, ranges), what="up.weight")
    assert_equal(grads["block.up.linear.bias"], part(grads_whole["up.bias"], 0, ranges), what="up.bias")
    assert_equal(grads["block.down.linear.weight"], part(grads_whole["down.weight"], 1, ranges), what="down.weight")
    assert_equal(grads["block.down.bias"], grads_whole["down.bias"], what="down.bias")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sequence_parallelism_equals_the_unsplit_block(ranks: int) -> None:
    on_mlx(ranks, sequence)


# --- what a split layer is ----------------------------------------------------------------------------------------------


def memory() -> tuple[int, int]:
    """Bytes that stay after the whole layer is let go, of a column and a row layer."""
    comm = world()
    held = []
    for make in (ColumnParallelLinear, RowParallelLinear):
        whole = nn.Linear(1024, 1024, bias=False)
        mx.eval(whole.weight)
        before = mx.get_active_memory()
        layer = make.from_linear(whole, comm)  # type: ignore[attr-defined]
        mx.eval(layer.parameters())
        del whole
        held.append(mx.get_active_memory() - (before - 4 * 1024 * 1024))
        del layer
    return held[0], held[1]


def test_a_part_does_not_hold_on_to_the_whole() -> None:
    part_bytes = 4 * 1024 * 512
    for held in mlx_ranks(2).run(memory):
        assert all(abs(n - part_bytes) < part_bytes // 8 for n in held), held


def test_nothing_is_evaluated_to_make_a_split_layer() -> None:
    whole = nn.Linear(1024, 1024)
    before = mx.get_active_memory()
    layer = ColumnParallelLinear.from_linear(whole, Communicator.single())
    other = RowParallelLinear.from_linear(whole, Communicator.single())
    assert mx.get_active_memory() <= before  # garbage of other tests may be freed in between
    del layer, other


def test_frozen_and_trained_stay_what_they_were() -> None:
    whole = linear(4, 4).freeze()
    for layer in (
        ColumnParallelLinear.from_linear(whole, Communicator.single()),
        RowParallelLinear.from_linear(whole, Communicator.single()),
    ):
        assert tree_flatten(layer.trainable_parameters()) == []
        layer.unfreeze()
        assert len(tree_flatten(layer.trainable_parameters())) == 2
    assert tree_flatten(whole.trainable_parameters()) == [], "the whole layer is not touched"


class FakeGroup:
    """A group that knows its size and rank only, to look at every rank's part in one process."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: ColumnParallelLinear.from_linear(nn.Conv2d(3, 3, 3), c), "Conv2d cannot be split"),
        (lambda c: ColumnParallelLinear.from_linear(nn.Linear(3, 4), c, Split.even(5, 2)), "the layer's 4 outputs"),
        (
            lambda c: RowParallelLinear.from_linear(nn.Linear(3, 4), c, Split.even(3, 3)),
            "over the 2 ranks of the group",
        ),
        (lambda c: RowParallelLinear.from_linear(nn.Linear(4, 4), c, Split.replicated(4, 2)), "without copies"),
        (
            lambda c: ColumnParallelLinear.from_linear(nn.Linear(3, 4), c, Split.replicated(4, 2), gather_output=True),
            "needs a split without copies",
        ),
        (
            lambda c: ColumnParallelLinear.from_linear(nn.Linear(3, 4), c, gather_output=True, sequence_parallel=True),
            "exclude each other",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises((PlanError, ModelError), match=message):
        make(Communicator(FakeGroup(2, 1)))  # type: ignore[arg-type]


def test_it_says_what_it_is() -> None:
    comm = Communicator(FakeGroup(2, 1))  # type: ignore[arg-type]
    column = ColumnParallelLinear.from_linear(nn.Linear(3, 5), comm)
    assert repr(column) == (
        "ColumnParallelLinear(input_dims=3, output_dims=5, split=5 = [0: 0:3, 1: 3:5], rank 1\n"
        "  (linear): Linear(input_dims=3, output_dims=2, bias=True)\n)"
    )
