"""Cross-entropy over a split vocabulary, on real ranks, against torch's own over the whole one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from partita.core.sharding.split import Split
from partita.errors import DistributedError, PlanError
from partita.torch import Communicator, init_parallelism, reset_parallelism, vocab_parallel_cross_entropy
from tests.support.compare import assert_equal, draw, part, world
from tests.support.ranks import RankError, on, ranks

SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4])
REDUCTIONS = ("mean", "sum", "none")


def torchs_own(logits: Tensor, target: Tensor, reduction: str, **settings: Any) -> Tensor:
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), reduction=reduction, **settings)
    return loss.view(target.shape) if reduction == "none" else loss


def both(
    comm: Communicator,
    logits: Tensor,
    target: Tensor,
    what: str,
    reduction: Any = "mean",
    split: Split | None = None,
    **settings: Any,
) -> None:
    """Loss and gradient of this rank's logits are those of the whole ones."""
    given = split if split is not None else Split.even(logits.shape[-1], comm.size)
    mine = part(logits, -1, given.ranges(comm.rank)).requires_grad_()
    whole = logits.clone().requires_grad_()
    before = mine.detach().clone()
    loss = vocab_parallel_cross_entropy(mine, target, comm, split, reduction=reduction, **settings)
    expected = torchs_own(whole, target, reduction, **settings)
    assert_equal(loss, expected, what=what)
    weight = draw(*loss.shape)
    (loss * weight).sum().backward()
    (expected * weight).sum().backward()
    assert whole.grad is not None
    assert_equal(mine.grad, part(whole.grad, -1, given.ranges(comm.rank)), what=f"{what}: gradient")
    assert torch.equal(mine, before), f"{what}: the logits were changed"


def losses() -> None:
    comm = world()
    for vocab, shape, smoothing, reduction in product((13, 8), ((), (6,), (2, 5)), (0.0, 0.1, 1.0), REDUCTIONS):
        logits, target = draw(*shape, vocab) * 4, torch.randint(0, vocab, shape)
        what = f"vocabulary {vocab}, {shape}, smoothing {smoothing}, {reduction}"
        both(comm, logits, target, what, reduction, label_smoothing=smoothing)
        if not shape:
            continue
        ignored = target.clone()
        ignored.view(-1)[::2] = -100
        both(comm, logits, ignored, f"{what}, ignored", reduction, label_smoothing=smoothing)
        # An id of the vocabulary may be the one that is ignored.
        index = int(target.view(-1)[0])
        both(comm, logits, target, f"{what}, ignored id", reduction, label_smoothing=smoothing, ignore_index=index)


def splits_of_ones_own() -> None:
    comm = world()
    n = comm.size
    for split in (Split.even(12, n, weights=range(1, n + 1)), Split(12, tuple(reversed(Split.even(12, n).by_rank)))):
        both(comm, draw(4, 12), torch.randint(0, 12, (4,)), str(split), split=split, label_smoothing=0.2)
    # Without a split, the ranks' columns one behind the other are the vocabulary, however many each has.
    split = Split.even(12, n, weights=range(1, n + 1))
    logits, target = draw(4, 12), torch.randint(0, 12, (4,))
    loss = vocab_parallel_cross_entropy(part(logits, -1, split.ranges(comm.rank)), target, comm)
    assert_equal(loss, F.cross_entropy(logits, target))


def far_apart() -> None:
    """Logits that overflow unless the largest of all ranks is taken off first."""
    comm = world()
    for scale in (1e3, 1e300):
        logits, target = draw(5, 11) * scale, torch.randint(0, 11, (5,))
        both(comm, logits, target, f"times {scale}")
    logits = draw(5, 11)
    logits[:, :6] = -float("inf")  # on some ranks nothing is possible
    both(comm, logits, torch.randint(6, 11, (5,)), "impossible ids")


def all_ignored() -> None:
    """As torch: the mean of nothing is NaN, its gradient zero; the sum is zero."""
    comm = world()
    logits, target = draw(4, 9), torch.full((4,), -100)
    for reduction in REDUCTIONS:
        mine = part(logits, -1, Split.even(9, comm.size).ranges(comm.rank)).requires_grad_()
        whole = logits.clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(mine, target, comm, reduction=reduction)  # type: ignore[arg-type]
        expected = torchs_own(whole, target, reduction)
        assert torch.equal(loss.isnan(), expected.isnan())
        assert torch.equal(loss.nan_to_num(), expected.nan_to_num())
        loss.sum().backward()
        expected.sum().backward()
        assert whole.grad is not None
        assert not whole.grad.any()
        assert mine.grad is not None
        assert not mine.grad.any()


def low_precision() -> None:
    comm = world()
    # Computed in float32: as exact as torch's own float32; gradients are rounded to the logits' 8 or 11 bits.
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
        logits, target = (draw(6, 50) * 3).to(dtype), torch.randint(0, 50, (6,))
        mine = part(logits, -1, Split.even(50, comm.size).ranges(comm.rank)).requires_grad_()
        whole = logits.float().requires_grad_()
        loss = vocab_parallel_cross_entropy(mine, target, comm, label_smoothing=0.1)
        expected = F.cross_entropy(whole, target, label_smoothing=0.1)
        assert_equal(loss, expected, 1e-6, str(dtype))
        loss.backward()
        expected.backward()
        assert mine.grad is not None
        assert mine.grad.dtype == dtype
        true = part(whole.grad, -1, Split.even(50, comm.size).ranges(comm.rank))  # type: ignore[arg-type]
        assert_equal(mine.grad.float(), true, tolerance, f"{dtype}: gradient")


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.last_dim = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
                self.last_dim = max(self.last_dim, tensor.shape[-1] if tensor.dim() > 1 else 0)
        return made


def never_whole() -> None:
    comm = world()
    rows, vocab = 5, 60 * comm.size
    mine = draw(rows, 60).requires_grad_()
    target = torch.randint(0, vocab, (rows,))
    for smoothing in (0.0, 0.1):
        with Largest() as largest:
            vocab_parallel_cross_entropy(mine, target, comm, label_smoothing=smoothing).backward()
        # The own columns, and what is sent: three numbers a row.
        assert largest.elements == rows * 60
        assert largest.last_dim == 60
        with Largest() as other:
            F.cross_entropy(comm.all_gather(mine.detach()).requires_grad_(), target).backward()
        assert other.elements == rows * vocab


def no_second_derivative() -> None:
    comm = world()
    x = draw(3, 4).requires_grad_()
    for factor in (1.0, x.sum()):  # the incoming gradient is a constant, or is not
        loss = vocab_parallel_cross_entropy(x * x, torch.tensor([0, 1, 2]), comm) * factor
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        # Of a sum that reaches `x` in other ways too, it would be wrong without a sign of it.
        with pytest.raises(RuntimeError, match="vocab_parallel_cross_entropy has no second derivative"):
            (grad.sum() + (x**3).sum()).backward()


def default_group() -> None:
    comm = world()
    init_parallelism(comm.size)
    try:
        logits, target = draw(4, 9), torch.randint(0, 9, (4,))
        mine = part(logits, -1, Split.even(9, comm.size).ranges(comm.rank))
        assert_equal(vocab_parallel_cross_entropy(mine, target), F.cross_entropy(logits, target))
    finally:
        reset_parallelism()


@SIZES
@pytest.mark.parametrize(
    "check", [losses, splits_of_ones_own, far_apart, all_ignored, low_precision, no_second_derivative]
)
def test_equals_torchs_cross_entropy(check: Callable[[], None], size: int) -> None:
    on(size, check)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_whole_vocabulary_is_on_no_rank(size: int) -> None:
    on(size, never_whole)


@pytest.mark.parametrize("size", [2, 3])
def test_the_default_group(size: int) -> None:
    on(size, default_group)


# --- errors -------------------------------------------------------------------------------------------------------------


def refuse(target: list[int], settings: dict[str, Any]) -> None:
    comm = world()
    mine = draw(2, Split.even(9, comm.size).local_size(comm.rank))
    vocab_parallel_cross_entropy(mine, torch.tensor(target), comm, **settings)


@pytest.mark.parametrize(
    ("target", "settings", "match"),
    [
        ([0, 9], {}, r"target 9 is outside the vocabulary of 9 and not ignore_index \(-100\)"),
        ([0, -1], {}, "target -1 is outside the vocabulary of 9"),
        ([0, -100], {"ignore_index": -1}, "target -100 is outside the vocabulary of 9"),
        ([0, 1, 2], {}, r"logits must be \(3, [54]\) on rank [01]; got \(2, [54]\)"),
        ([0, 1], {"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]; got 1.5"),
        ([0, 1], {"label_smoothing": float("nan")}, r"label_smoothing must be in \[0, 1\]; got nan"),
        ([0, 1], {"reduction": "average"}, "reduction must be none, mean or sum; got 'average'"),
        ([0, 1], {"split": Split.even(12, 2)}, r"logits must be \(2, 6\) on rank 0; got \(2, 5\)"),
        ([0, 1], {"split": Split.replicated(5, 2)}, "each rank must hold one exclusive range of logits"),
        ([0, 1], {"split": Split.even(10, 2, segments=(5, 5))}, "each rank must hold one exclusive range of logits"),
    ],
)
def test_errors_before_any_communication(target: list[int], settings: dict[str, Any], match: str) -> None:
    with pytest.raises(RankError, match=match):
        ranks(2).run(refuse, target, settings)
    ranks(2).run(default_group)  # the ranks are in step still


def test_needs_a_group() -> None:
    with pytest.raises(DistributedError, match="parallelism is not initialized"):
        vocab_parallel_cross_entropy(torch.ones(1, 2), torch.tensor([0]))
    with pytest.raises(PlanError, match="target 2 is outside the vocabulary of 2"):
        vocab_parallel_cross_entropy(torch.ones(1, 2), torch.tensor([2]), Communicator.single())
