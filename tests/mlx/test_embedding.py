"""The vocabulary-parallel embedding against the unsplit one: rows, tied logits, every gradient; plain and quantized."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from partita.core.sharding.split import Split
from partita.errors import ModelError, PlanError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.layers.embedding import VocabParallelEmbedding
from tests.mlx.compare import SINGLE, assert_equal, draw, part, world
from tests.mlx.test_linear import FakeGroup
from tests.support.mlx_ranks import mlx_ranks, on_mlx

VOCABULARY, WIDTH = 11, 6
SPLITS = {
    "even": Split.even(VOCABULARY, 3),
    "uneven": Split.even(VOCABULARY, 3, weights=[1, 5, 2]),
    "turned": Split(VOCABULARY, (((8, 11),), ((0, 3),), ((3, 8),))),
}


def embedding(vocabulary: int = VOCABULARY, width: int = WIDTH) -> nn.Embedding:
    layer = nn.Embedding(vocabulary, width)
    layer.weight = draw(vocabulary, width)
    return layer


def every_id(dtype: mx.Dtype = mx.int32) -> mx.array:
    return mx.concatenate([mx.arange(VOCABULARY), mx.array([3, 3, 0])]).reshape(2, 7).astype(dtype)


def rows(split: Split, dtype: str) -> None:
    comm = world()
    whole = embedding()
    layer = VocabParallelEmbedding.from_embedding(whole, comm, split)
    ids, scale = every_id(getattr(mx, dtype)), draw(2, 7, WIDTH)
    assert_equal(layer(ids), whole(ids), 0, "rows are sums with zeros")

    def gradient(module: nn.Module) -> mx.array:
        grads = nn.value_and_grad(module, lambda: (mx.tanh(module(ids)) * scale).sum())()[1]
        return dict(tree_flatten(grads)).popitem()[1]  # type: ignore[no-any-return]

    assert_equal(gradient(layer), part(gradient(whole), 0, split.ranges(comm.rank)), what="weight")


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint8"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_rows_equal_the_unsplit_embedding(split: Split, dtype: str) -> None:
    mlx_ranks(3).run(rows, split, dtype)


def tied(split: Split, gather: bool) -> None:
    """One weight looks ids up and makes logits: both gradients reach it."""
    comm = world()
    whole = embedding()
    layer = VocabParallelEmbedding.from_embedding(whole, comm, split, gather_logits=gather)
    ids, scale = every_id(), draw(2, 7, VOCABULARY)
    mine = split.ranges(comm.rank)
    weight = scale if gather else part(scale, -1, mine)

    def run(module: Any, scale: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        x = draw(2, 7, WIDTH)
        logits = module.as_linear(mx.tanh(module(ids)) + x)
        both = mx.grad(
            lambda parameters, x: (module.update(parameters).as_linear(mx.tanh(module(ids)) + x) * scale).sum(),
            argnums=(0, 1),
        )(module.trainable_parameters(), x)
        return logits, dict(tree_flatten(both[0])).popitem()[1], both[1]

    mx.random.seed(1)
    logits, grad, dx = run(layer, weight)
    mx.random.seed(1)
    logits_whole, grad_whole, dx_whole = run(whole, scale)
    assert_equal(logits, logits_whole if gather else part(logits_whole, -1, mine), what="logits")
    assert_equal(dx, dx_whole, what="input gradient")
    assert_equal(grad, part(grad_whole, 0, mine), what="weight")


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_tied_head_equals_the_unsplit_one(split: Split, gather: bool) -> None:
    mlx_ranks(3).run(tied, split, gather)


def quantized(mode: str, group_size: int, bits: int) -> None:
    comm = world()
    plain = nn.Embedding(VOCABULARY, 64)
    whole = nn.QuantizedEmbedding.from_embedding(plain, group_size, bits, mode)
    layer = VocabParallelEmbedding.from_embedding(whole, comm)
    assert isinstance(layer.embedding, nn.QuantizedEmbedding)
    assert layer.embedding.num_embeddings == layer.split.local_size(comm.rank)
    assert tree_flatten(layer.trainable_parameters()) == []
    ids, x = every_id(), draw(2, 7, 64, dtype=mx.float32)
    assert_equal(layer(ids), whole(ids), 0, "rows")
    assert_equal(layer.as_linear(x), whole.as_linear(x), SINGLE, "logits")
    scale = draw(2, 7, VOCABULARY, dtype=mx.float32)
    dx, dx_whole = (mx.grad(lambda x: (m.as_linear(x) * scale).sum())(x) for m in (layer, whole))  # noqa: B023
    assert_equal(dx, dx_whole, SINGLE, "input gradient")


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"),
    [*(("affine", 32, bits) for bits in (2, 3, 4, 5, 6, 8)), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)],
)
def test_a_quantized_embedding_equals_the_unsplit_one(mode: str, group_size: int, bits: int) -> None:
    mlx_ranks(3).run(quantized, mode, group_size, bits)


def by_default() -> None:
    layer = VocabParallelEmbedding.from_embedding(embedding(), world())
    assert layer.split == Split.even(VOCABULARY, world().size)
    assert_equal(layer(every_id()), embedding_again()(every_id()), 0)


def embedding_again() -> nn.Embedding:
    mx.random.seed(0)
    return embedding()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_are_dealt_out_evenly_by_default(ranks: int) -> None:
    on_mlx(ranks, by_default)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: VocabParallelEmbedding.from_embedding(nn.Linear(2, 2), c), "Linear is not an nn.Embedding"),
        (lambda c: VocabParallelEmbedding.from_embedding(embedding(), c, Split.even(4, 2)), "embedding's 11 rows"),
        (
            lambda c: VocabParallelEmbedding.from_embedding(embedding(), c, Split.replicated(VOCABULARY, 2)),
            "one exclusive range of rows",
        ),
        (
            lambda c: VocabParallelEmbedding.from_embedding(
                embedding(), c, Split(VOCABULARY, (((0, 2), (4, 11)), ((2, 4),)))
            ),
            "one exclusive range of rows",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises((PlanError, ModelError), match=message):
        make(Communicator(FakeGroup(2, 0)))  # type: ignore[arg-type]
