"""mlx-lm's LoRA and DoRA on the inner layers of split ones, against the same on the unsplit layer."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.mappings import gather_from, scatter_to
from partita.mlx.layers.embedding import VocabParallelEmbedding
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
from tests.mlx.compare import EXACT, SINGLE, assert_equal, draw, part, world
from tests.mlx.test_linear import COPIES, linear
from tests.support.mlx_ranks import mlx_ranks

lora = pytest.importorskip("mlx_lm.tuner.lora")
dora = pytest.importorskip("mlx_lm.tuner.dora")

RANK = 3
KINDS = {"lora": lora.LoRALinear, "dora": dora.DoRALinear}


def wide(module: nn.Module) -> nn.Module:
    """An adapter's own numbers in float64."""
    for name in ("lora_a", "lora_b", "m"):
        if name in module:
            module[name] = module[name].astype(mx.float64)
    return module


def put_on(kind: str, layer: Any, style: str, comm: Communicator, split: Split) -> tuple[Any, dict[str, mx.array]]:
    """Put an adapter on the inner layer as a user does, and change something by it.

    Also gives the unsplit adapter's numbers.
    """
    layer.linear = wide(KINDS[kind].from_base(layer.linear, r=RANK, scale=2.0))
    adapter = layer.linear
    size = split.size
    if style == "column":
        a, b = adapter.lora_a, draw(RANK, size)
        adapter.lora_b = part(b, 1, split.ranges(comm.rank))
        assert_equal(comm.broadcast(a), a, 0, "lora_a is the same on all ranks")
    else:
        b = draw(RANK, 5)
        a = comm.all_gather(adapter.lora_a, 0, split.local_sizes)
        order = mx.array([i for ranges in split.by_rank for start, stop in ranges for i in range(start, stop)])
        a = mx.take(a, mx.argsort(order), axis=0)
        adapter.lora_b = b
    return adapter, {"lora_a": a, "lora_b": b}


def unsplit(kind: str, whole: nn.Module, numbers: dict[str, mx.array]) -> nn.Module:
    adapter = wide(KINDS[kind].from_base(whole, r=RANK, scale=2.0))
    if "m" in adapter:
        norm = mx.sqrt(mx.square(_weight(whole)).sum(axis=1))
        adapter.m = norm.astype(mx.float64)
    adapter.update(numbers)
    return adapter


def _weight(layer: nn.Module) -> mx.array:
    if isinstance(layer, nn.QuantizedLinear):
        return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode)
    return layer.weight  # type: ignore[no-any-return]


def gradients(module: nn.Module, x: mx.array, scale: mx.array) -> tuple[mx.array, dict[str, mx.array], mx.array]:
    def loss(parameters: dict[str, Any], x: mx.array) -> tuple[mx.array, mx.array]:
        module.update(parameters)
        y = module(x)
        return (mx.tanh(y) * scale).sum(), y

    (_, y), (grads, dx) = mx.value_and_grad(loss, argnums=(0, 1))(module.trainable_parameters(), x)
    return y, dict(tree_flatten(grads)), dx


def compare(kind: str, style: str, split: Split, frozen: bool) -> None:
    comm = world()
    mine = split.ranges(comm.rank)
    column = style == "column"
    whole = linear(4, split.size) if column else linear(split.size, 5)
    if frozen:
        whole.freeze()
    make = ColumnParallelLinear if column else RowParallelLinear
    layer = make.from_linear(whole, comm, split)  # type: ignore[attr-defined]
    before = draw(2, 3, 4 if column else split.size)
    assert_equal(layer(before if column else part(before, -1, mine)),
                 part(whole(before), -1, mine) if column else whole(before))  # fmt: skip
    _, numbers = put_on(kind, layer, style, comm, split)
    reference = unsplit(kind, whole, numbers)

    x, scale = draw(2, 3, 4 if column else split.size), draw(2, 3, split.size if column else 5)
    share = 1 / mx.array([len(split.holders(i)) for i in range(split.size)]).astype(mx.float64)
    y, grads, dx = gradients(layer, x if column else part(x, -1, mine),
                             part(scale * share, -1, mine) if column else scale)  # fmt: skip
    y_whole, grads_whole, dx_whole = gradients(reference, x, scale)

    # mlx-lm computes DoRA's norms of the plain weight in float32.
    tolerance = SINGLE if kind == "dora" else EXACT
    assert_equal(y, part(y_whole, -1, mine) if column else y_whole, tolerance, "output")
    assert_equal(dx, dx_whole if column else part(dx_whole, -1, mine), tolerance, "input gradient")
    cut = {"lora_b": 1, "m": 0, "linear.weight": 0, "linear.bias": 0} if column else {"lora_a": 0, "linear.weight": 1}
    names = {name.removeprefix("linear.") if name != "bias" else "linear.bias": name for name in grads}
    assert names.keys() == grads_whole.keys(), names
    for name, own in names.items():
        expected = part(grads_whole[name], cut[name], mine) if name in cut else grads_whole[name]
        assert_equal(grads[own], expected, tolerance, name)


SPLITS = {"even": Split.even(12, 3), "uneven": Split.even(13, 3), "segments": Split.even(15, 3, segments=[9, 6])}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("style", ["column", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_equal_those_of_the_unsplit_layer(kind: str, style: str, split: Split, frozen: bool) -> None:
    mlx_ranks(3).run(compare, kind, style, split, frozen)


@pytest.mark.parametrize("split", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_copied_columns(kind: str, split: Split) -> None:
    mlx_ranks(3).run(compare_copies, kind, split)


def compare_copies(kind: str, split: Split) -> None:
    compare(kind, "column", split, False)


# --- on quantized layers --------------------------------------------------------------------------------------------------


def on_quantized(kind: str, style: str, mode: str, group_size: int, bits: int) -> None:
    comm = world()
    column = style == "column"
    inputs, outputs = (64, 96) if column else (96, 64)
    plain = nn.Linear(inputs, outputs)
    whole = nn.QuantizedLinear.from_linear(plain, group_size, bits, mode)
    whole.freeze()
    make = ColumnParallelLinear if column else RowParallelLinear
    layer = make.from_linear(whole, comm)  # type: ignore[attr-defined]
    split, mine = layer.split, layer.split.ranges(comm.rank)
    layer.linear = KINDS[kind].from_base(layer.linear, r=RANK)
    reference = KINDS[kind].from_base(whole, r=RANK)
    b = mx.random.normal((RANK, outputs))
    if column:
        reference.lora_a = layer.linear.lora_a
        layer.linear.lora_b = part(b, 1, mine)
    else:
        reference.lora_a = comm.all_gather(layer.linear.lora_a, 0, split.local_sizes)
        layer.linear.lora_b = b
    reference.lora_b = b
    x, scale = draw(2, 3, inputs, dtype=mx.float32), draw(2, 3, outputs, dtype=mx.float32)
    y, grads, dx = gradients(layer, x if column else part(x, -1, mine), part(scale, -1, mine) if column else scale)
    y_whole, grads_whole, dx_whole = gradients(reference, x, scale)
    assert_equal(y, part(y_whole, -1, mine) if column else y_whole, SINGLE, "output")
    assert_equal(dx, dx_whole if column else part(dx_whole, -1, mine), SINGLE, "input gradient")
    cut = {"lora_b": 1, "m": 0} if column else {"lora_a": 0}
    assert {name.removeprefix("linear.") for name in grads} == grads_whole.keys()
    for name, expected in grads_whole.items():
        assert_equal(
            grads[f"linear.{name}"], part(expected, cut[name], mine) if name in cut else expected, SINGLE, name
        )


@pytest.mark.parametrize(("mode", "group_size", "bits"), [("affine", 32, 4), ("affine", 32, 8), ("mxfp4", 32, 4)])
@pytest.mark.parametrize("style", ["column", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_quantized_layers(kind: str, style: str, mode: str, group_size: int, bits: int) -> None:
    mlx_ranks(3).run(on_quantized, kind, style, mode, group_size, bits)


# --- on embeddings, over sequences, by mlx-lm's own function --------------------------------------------------------------


def on_embedding(kind: str) -> None:
    comm = world()
    adapters = {"lora": lora.LoRAEmbedding, "dora": dora.DoRAEmbedding}
    whole = nn.Embedding(11, 6)
    whole.weight = draw(11, 6)
    layer = VocabParallelEmbedding.from_embedding(whole, comm)
    mine = layer.split.ranges(comm.rank)
    layer.embedding = wide(adapters[kind].from_base(layer.embedding, r=RANK))
    reference = wide(adapters[kind].from_base(whole, r=RANK))
    reference.lora_a = comm.all_gather(layer.embedding.lora_a, 0, layer.split.local_sizes)
    reference.lora_b = layer.embedding.lora_b = draw(RANK, 6)
    ids, x, scale = mx.array([[0, 4, 10, 4], [3, 3, 7, 1]]), draw(2, 4, 6), draw(2, 4, 11)

    def tied(module: Any) -> Any:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.m = module

            def __call__(self, x: mx.array) -> mx.array:
                return self.m.as_linear(mx.tanh(self.m(ids)) + x)  # type: ignore[no-any-return]

        return Tied()

    y, grads, dx = gradients(tied(layer), x, scale)
    y_whole, grads_whole, dx_whole = gradients(tied(reference), x, scale)
    assert_equal(y, y_whole, what="output")
    assert_equal(dx, dx_whole, what="input gradient")
    assert {name.replace("m.embedding", "m", 1) for name in grads} == grads_whole.keys()
    for name, expected in grads_whole.items():
        whole_one = name.endswith("lora_b")
        assert_equal(grads[name.replace("m.", "m.embedding.", 1)],
                     expected if whole_one else part(expected, 0, mine), what=name)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_embeddings(kind: str) -> None:
    mlx_ranks(3).run(on_embedding, kind)


class Block(nn.Module):
    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down(mx.tanh(self.up(x)))


class Sequence(nn.Module):
    """Between blocks each rank holds a part of the sequence."""

    def __init__(self, block: nn.Module, comm: Communicator) -> None:
        super().__init__()
        self.block, self._comm = block, [comm]

    def __call__(self, x: mx.array) -> mx.array:
        (comm,) = self._comm
        return gather_from(self.block(scatter_to(x, comm, 1)), comm, 1)


def over_sequences(kind: str) -> None:
    comm = world()
    whole = Block(linear(6, 7), linear(7, 6))
    split = Split.even(7, comm.size)
    options: dict[str, Any] = {"sequence_parallel": True}
    mine = Block(
        ColumnParallelLinear.from_linear(whole.up, comm, split, **options),
        RowParallelLinear.from_linear(whole.down, comm, split, **options),
    )
    ranges = split.ranges(comm.rank)
    numbers = {
        "up": {"lora_a": draw(6, RANK), "lora_b": draw(RANK, 7)},
        "down": {"lora_a": draw(7, RANK), "lora_b": draw(RANK, 6)},
    }
    cut = {("up", "lora_b"): 1, ("up", "m"): 0, ("down", "lora_a"): 0}
    for name in ("up", "down"):
        layer = getattr(mine, name)
        layer.linear = wide(KINDS[kind].from_base(layer.linear, r=RANK, scale=2.0))
        layer.linear.update(
            {k: part(v, cut[name, k], ranges) if (name, k) in cut else v for k, v in numbers[name].items()}
        )
        setattr(whole, name, unsplit(kind, getattr(whole, name), numbers[name]))
    x, scale = draw(2, 3 * comm.size, 6), draw(2, 3 * comm.size, 6)
    y, grads, dx = gradients(Sequence(mine, comm), x, scale)
    y_whole, grads_whole, dx_whole = gradients(whole, x, scale)
    tolerance = SINGLE if kind == "dora" else EXACT
    assert_equal(y, y_whole, tolerance, "output")
    assert_equal(dx, dx_whole, tolerance, "input gradient")
    for path, expected in grads_whole.items():
        name, _, attribute = path.partition(".")
        own = grads["block.down.bias" if path == "down.linear.bias" else f"block.{name}.linear.{attribute}"]
        axis = cut.get(
            (name, attribute), {"up.linear.weight": 0, "up.linear.bias": 0, "down.linear.weight": 1}.get(path)
        )
        assert_equal(own, expected if axis is None else part(expected, axis, ranges), tolerance, path)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_over_sequences(kind: str) -> None:
    mlx_ranks(2).run(over_sequences, kind)


def by_mlx_lm(use_dora: bool) -> list[str]:
    """mlx-lm's own function finds the inner layers and replaces them."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    comm = world()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [
                Block(
                    ColumnParallelLinear.from_linear(nn.Linear(8, 12), comm),
                    RowParallelLinear.from_linear(nn.Linear(12, 8), comm),
                )
            ]

    model = Model()
    model.freeze()
    linear_to_lora_layers(model, 1, {"rank": RANK, "scale": 2.0, "dropout": 0.0}, use_dora=use_dora)
    block = model.layers[0]
    same = comm.all_gather(block.up.linear.lora_a[None])
    assert mx.all(same == same[:1]).item()
    if use_dora:
        same = comm.all_gather(block.down.linear.m[None])
        assert mx.all(same == same[:1]).item()
    parts = comm.all_gather(block.down.linear.lora_a[None])
    assert not mx.all(parts[0] == parts[1]).item(), "each rank draws the part that it holds"
    return [name for name, _ in tree_flatten(model.trainable_parameters())]


@pytest.mark.parametrize("use_dora", [False, True])
def test_mlx_lm_puts_adapters_on_inner_layers(use_dora: bool) -> None:
    (names, _) = mlx_ranks(2).run(by_mlx_lm, use_dora)
    own = {"lora_a", "lora_b", *(("m",) if use_dora else ())}
    assert set(names) == {f"layers.0.{layer}.linear.{name}" for layer in ("up", "down") for name in own}


# --- beginnings -----------------------------------------------------------------------------------------------------------


def fresh_row() -> list[list[float]]:
    """A fresh `lora_a` of a row layer is the part of the unsplit layer's, so that its bound is that of all inputs."""
    comm = world()
    layer = RowParallelLinear.from_linear(nn.Linear(300, 4), comm)
    layer.linear = lora.LoRALinear.from_base(layer.linear, r=RANK)
    bound = 300**-0.5
    assert mx.abs(layer.linear.lora_a).max().item() <= bound
    assert mx.abs(layer.linear.lora_a).max().item() > 0.9 * bound
    twin = copy.deepcopy(layer)
    assert_equal(twin.linear.lora_a, layer.linear.lora_a, 0, "a copy is not drawn anew")
    return mx.random.uniform(shape=(2,)).tolist()  # type: ignore[return-value]


def test_a_fresh_adapter_begins_as_the_unsplit_one() -> None:
    first, second = mlx_ranks(2).run(fresh_row)
    assert first == second, "the ranks go on drawing alike"


def unequal(style: str) -> str:
    comm = world()
    make = ColumnParallelLinear if style == "column" else RowParallelLinear
    layer = make.from_linear(nn.Linear(4, 4), comm)  # type: ignore[attr-defined]
    adapter = lora.LoRALinear.from_base(layer.linear, r=RANK)
    adapter.lora_b = adapter.lora_b + comm.rank + 1.0
    adapter.lora_a = adapter.lora_a + comm.rank
    with pytest.raises(ModelError) as raised:
        layer.linear = adapter
    assert isinstance(layer.linear, nn.Linear), "the layer is as it was"
    return str(raised.value)


@pytest.mark.parametrize(("style", "name"), [("column", "lora_a"), ("row", "lora_b")])
def test_adapters_that_differ_between_ranks_are_refused(style: str, name: str) -> None:
    for said in mlx_ranks(2).run(unequal, style):
        assert said.startswith(f"{name} must be equal on all ranks")


def strange() -> list[str]:
    class Odd(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear, self.magic = linear, mx.zeros(3)

    layer, said = ColumnParallelLinear.from_linear(nn.Linear(4, 4), world()), []
    second = lora.LoRALinear(4, 4)
    second.linear = lora.LoRALinear.from_base(layer.linear)
    for adapter in (Odd(layer.linear), second):
        with pytest.raises(ModelError) as raised:
            layer.linear = adapter
        said.append(str(raised.value))
    return said


def test_what_is_not_understood_is_refused() -> None:
    odd, twice = mlx_ranks(2).run(strange)[0]
    assert odd.startswith("Odd has magic, which cannot be split.")
    assert "wraps another adapter" in twice
