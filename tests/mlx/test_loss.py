"""Cross-entropy of split logits against `mlx.nn.losses.cross_entropy` of whole ones."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from partita.core.sharding.split import Split
from partita.errors import PlanError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.layers.loss import vocab_parallel_cross_entropy
from tests.mlx.compare import EXACT, SINGLE, assert_equal, draw, part, world
from tests.mlx.test_linear import FakeGroup
from tests.support.compiling import compiling
from tests.support.mlx_ranks import mlx_ranks, on_mlx

VOCABULARY = 11


def unsplit(logits: mx.array, targets: mx.array, reduction: str, smoothing: float, ignore_index: int) -> mx.array:
    keep = targets != ignore_index
    each = nn.losses.cross_entropy(logits, mx.where(keep, targets, 0), label_smoothing=smoothing)
    each = mx.where(keep, each, 0)
    if reduction == "none":
        return each
    return each.sum() / (keep.sum() if reduction == "mean" else mx.array(1)).astype(each.dtype)


def compare(reduction: str, smoothing: float, dtype: str, weights: list[float] | None) -> None:
    comm = world()
    kind = getattr(mx, dtype)
    split = Split.even(VOCABULARY, comm.size, weights=weights)
    # Large numbers: only the differences of logits may count.
    logits = (draw(3, 5, VOCABULARY) * 4 + 300).astype(kind)
    targets = mx.random.randint(0, VOCABULARY, (3, 5))
    targets[0, 1] = -100
    scale = draw(3, 5).astype(mx.float64 if kind == mx.float64 else mx.float32)
    mine = part(logits, -1, split.ranges(comm.rank))

    def total(loss: mx.array) -> mx.array:
        return (loss * scale).sum() if reduction == "none" else loss

    def local(x: mx.array) -> mx.array:
        return vocab_parallel_cross_entropy(
            x,
            targets,
            comm,
            split,
            reduction=reduction,
            label_smoothing=smoothing,  # type: ignore[arg-type]
        )

    def whole(x: mx.array) -> mx.array:
        wide = x if kind == mx.float64 else x.astype(mx.float32)
        return unsplit(wide, targets, reduction, smoothing, -100)

    # In float32 the logits of 300 themselves are known to 1.5e-5 only; bfloat16's gradient is rounded to 8 bits.
    tolerance = {"float64": EXACT, "float32": 10 * SINGLE, "bfloat16": 2.0**-8}[dtype]
    assert_equal(local(mine), whole(logits), min(tolerance, 10 * SINGLE), "loss")
    grad, grad_whole = mx.grad(lambda x: total(local(x)))(mine), mx.grad(lambda x: total(whole(x)))(logits)
    assert_equal(grad, part(grad_whole, -1, split.ranges(comm.rank)), tolerance, "gradient")
    assert mx.all(grad[0, 1] == 0).item(), "an ignored row has no gradient"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("ranks", "weights"), [(1, None), (2, [1.0, 4.0]), (3, None)])
def test_the_loss_equals_the_unsplit_one(
    ranks: int, weights: list[float] | None, reduction: str, smoothing: float, dtype: str
) -> None:
    on_mlx(ranks, compare, reduction, smoothing, dtype, weights)


def compiled() -> None:
    comm = world()
    split = Split.even(VOCABULARY, comm.size)
    mine, targets = part(draw(4, VOCABULARY), -1, split.ranges(comm.rank)), mx.array([0, 10, 3, 3])
    grad = mx.grad(lambda x: vocab_parallel_cross_entropy(x, targets, comm, split))
    with compiling():
        assert_equal(mx.compile(grad)(mine), grad(mine))


def test_the_loss_can_be_compiled() -> None:
    mlx_ranks(2).run(compiled)


def parts_as_they_come() -> None:
    comm = world()
    columns = 2 + 3 * comm.rank
    logits = draw(4, sum(2 + 3 * r for r in range(comm.size)))
    start = sum(2 + 3 * r for r in range(comm.rank))
    targets = mx.array([0, 1, 2, 6])
    loss = vocab_parallel_cross_entropy(logits[:, start : start + columns], targets, comm)
    assert_equal(loss, nn.losses.cross_entropy(logits, targets, reduction="mean"))


def test_without_a_split_the_parts_follow_each_other() -> None:
    mlx_ranks(2).run(parts_as_they_come)


def outside() -> list[bool]:
    comm = world()
    targets = mx.array([0, VOCABULARY, -1, VOCABULARY - 1])
    logits = part(draw(4, VOCABULARY), -1, Split.even(VOCABULARY, comm.size).ranges(comm.rank))
    loss = vocab_parallel_cross_entropy(logits, targets, comm, Split.even(VOCABULARY, comm.size), reduction="none")
    return mx.isnan(loss).tolist()  # type: ignore[return-value]


def test_a_target_outside_the_vocabulary_is_no_number() -> None:
    assert mlx_ranks(3).run(outside) == [[False, True, True, False]] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": Split.even(4, 2)}, r"logits must be \(3, 2\) on rank 1; got \(3, 5\)"),
        ({"split": Split.replicated(5, 2)}, "one exclusive range of logits"),
        ({"split": Split.even(10, 2), "reduction": "all"}, "reduction must be none, mean or sum; got 'all'"),
        ({"split": Split.even(10, 2), "label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]; got 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    comm = Communicator(FakeGroup(2, 1))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=message):
        vocab_parallel_cross_entropy(mx.zeros((3, 5)), mx.zeros(3, mx.int32), comm, **options)
