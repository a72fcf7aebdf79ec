"""Embeddings split by width and by vocabulary, on real ranks, against `nn.Embedding`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partita.core.sharding.split import Split
from partita.errors import DistributedError, ModelError, PlanError
from partita.torch import Communicator, ParallelEmbedding, VocabParallelEmbedding
from partita.torch.model.parts import unsplit_name
from tests.support.compare import assert_equal, draw, part, world
from tests.support.ranks import RankError, on, ranks

F64 = torch.float64
SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4])


def ids_of(rows: int, *shape: int) -> Tensor:
    """Ids that meet every row, and some rows several times."""
    return (torch.arange(math.prod(shape)) * 7 % rows).view(shape)


# --- by width -------------------------------------------------------------------------------------------------------------


def widths() -> None:
    comm = world()
    kinds = ((False, False), (True, False), (False, True))  # torch has no gradients that are both
    for padding, (by_freq, sparse), shape in product((None, 0, 4, -1), kinds, ((1,), (5,), (3, 6))):
        what = f"padding_idx={padding}, scale_grad_by_freq={by_freq}, sparse={sparse}, {shape}"
        mine = ParallelEmbedding(
            9, 7, padding, scale_grad_by_freq=by_freq, sparse=sparse, init_type="normal", group=comm, dtype=F64
        )
        whole = nn.Embedding(9, 7, padding, scale_grad_by_freq=by_freq, sparse=sparse, dtype=F64)
        whole.weight.data.copy_(mine.master_weight)
        if padding is not None:
            assert not mine.master_weight[padding].any(), what
        assert mine.weight.shape == (9, Split.even(7, comm.size).local_size(comm.rank))
        ids = ids_of(9, *shape)
        y, expected = mine(ids), whole(ids)
        assert_equal(y, expected, 0, f"{what}: rows are only moved")
        weight = draw(*expected.shape)
        (y**2 * weight).sum().backward()
        (expected**2 * weight).sum().backward()
        assert mine.weight.grad is not None
        assert whole.weight.grad is not None
        assert mine.weight.grad.is_sparse == sparse
        grads = (
            (mine.weight.grad.to_dense(), whole.weight.grad.to_dense())
            if sparse
            else (mine.weight.grad, whole.weight.grad)
        )
        assert_equal(grads[0], part(grads[1], 1, mine.split.ranges(comm.rank)), what=what)


def max_norms() -> None:
    comm = world()
    for norm_type, max_norm in product((1, 2, 2.5, 3, math.inf), (0.3, 1.0, 100.0)):
        what = f"max_norm={max_norm}, norm_type={norm_type}"
        mine = ParallelEmbedding(9, 7, 2, max_norm, norm_type, init_type="uniform", group=comm, dtype=F64)
        whole = nn.Embedding(9, 7, 2, max_norm, norm_type, dtype=F64)
        whole.weight.data.copy_(mine.master_weight)
        before = mine.master_weight.clone()
        ids = ids_of(6, 2, 5)  # rows 6 to 8 are not looked up, and stay as they are
        y, expected = mine(ids), whole(ids)
        assert_equal(y, expected, what=what)
        assert_equal(mine.master_weight, whole.weight, what=what)
        assert torch.equal(mine.master_weight[6:], before[6:])
        assert torch.equal(mine.master_weight, before) == (max_norm == 100.0) or max_norm == 1.0
        (y**2).sum().backward()
        (expected**2).sum().backward()
        assert_equal(mine.weight.grad, part(whole.weight.grad, 1, mine.split.ranges(comm.rank)), what=what)  # type: ignore[arg-type]
        # What has been scaled once is within the norm, and is not scaled again.
        again = mine.master_weight.clone()
        mine(ids)
        assert_equal(mine.master_weight, again, 1e-7, what)  # torch adds 1e-7 to the norm it divides by


def frozen_and_half() -> None:
    comm = world()
    mine = ParallelEmbedding(9, 7, group=comm, dtype=torch.bfloat16).requires_grad_(False)
    ids = ids_of(9, 4)
    assert torch.equal(mine(ids), mine.master_weight[ids])
    assert not mine(ids).requires_grad
    narrow = ParallelEmbedding(3, comm.size, group=comm)
    assert narrow.weight.shape == (3, 1)
    if comm.size > 1:
        with pytest.raises(PlanError, match="cannot be distributed over"):
            ParallelEmbedding(3, comm.size - 1, group=comm)
    assert ParallelEmbedding(9, 7, 3, group=comm, device="meta").weight.is_meta


@SIZES
@pytest.mark.parametrize("check", [widths, max_norms, frozen_and_half])
def test_parallel_embedding_equals_one_embedding(check: Callable[[], None], size: int) -> None:
    on(size, check)


def test_arguments_that_cannot_be() -> None:
    alone = Communicator.single()
    for padding in (9, -10):
        with pytest.raises(PlanError, match=rf"padding_idx must be in \[-9, 9\); got {padding}"):
            ParallelEmbedding(9, 7, padding, group=alone)
    with pytest.raises(PlanError, match="init_type must be one of"):
        ParallelEmbedding(9, 7, init_type="he", group=alone)  # type: ignore[arg-type]
    for norm_type in (0, -1, -math.inf, math.nan):
        with pytest.raises(PlanError, match="norm_type must be a positive number; got "):
            ParallelEmbedding(9, 7, max_norm=1.0, norm_type=norm_type, group=alone)
    with pytest.raises(DistributedError, match="parallelism is not initialized"):
        ParallelEmbedding(9, 7)


# --- by vocabulary --------------------------------------------------------------------------------------------------------


def vocabularies() -> None:
    comm = world()
    for rows, padding, shape in product((9, 4, 11), (None, 0, 1, 2, 3, -1), ((), (5,), (3, 6))):
        what = f"{rows} rows, padding_idx={padding}, {shape}"
        whole = nn.Embedding(rows, 5, padding, dtype=F64)
        mine = VocabParallelEmbedding(whole, comm)
        assert_equal(mine.master_weight, whole.weight, 0, what)
        assert mine.weight.untyped_storage().nbytes() == mine.weight.numel() * 8
        ids = ids_of(rows, *shape)
        y, expected = mine(ids), whole(ids)
        assert_equal(y, expected, 0, f"{what}: a row and zeros")
        weight = draw(*expected.shape)
        (y**2 * weight).sum().backward()
        (expected**2 * weight).sum().backward()
        assert_equal(mine.weight.grad, part(whole.weight.grad, 0, mine.split.ranges(comm.rank)), what=what)  # type: ignore[arg-type]
        with torch.no_grad():
            assert_equal(mine(ids), expected, 0, what)
    assert [unsplit_name(name) for name, _ in mine.named_parameters()] == ["weight"]
    assert [unsplit_name(name) for name in mine.state_dict()] == ["weight"]


class Scaled(nn.Embedding):
    """As Gemma's: the rows times a number."""

    def __init__(self, rows: int, width: int, padding_idx: int, scale: float) -> None:
        super().__init__(rows, width, padding_idx, dtype=F64)
        self.register_buffer("scale", torch.tensor(scale, dtype=F64), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


class Shifted(nn.Embedding):
    """What an id of another rank brings here must be nothing, whatever is done to the rows."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1


def subclasses() -> None:
    comm = world()
    ids = ids_of(9, 3, 6)
    for whole in (Scaled(9, 5, 3, 5**0.5), Shifted(9, 5, dtype=F64), gemma_embedding()):
        mine = VocabParallelEmbedding(whole, comm)
        assert type(mine.embedding) is type(whole)
        y, expected = mine(ids), whole(ids)
        assert_equal(y, expected, 0, type(whole).__name__)
        (y**2).sum().backward()
        (expected**2).sum().backward()
        assert_equal(mine.weight.grad, part(whole.weight.grad, 0, mine.split.ranges(comm.rank)))  # type: ignore[arg-type]
        # The one it was made of is as it was.
        assert whole.num_embeddings == 9
        assert whole.weight.shape == (9, 5)


def gemma_embedding() -> nn.Embedding:
    """transformers' own, where its import costs little: in one or two ranks."""
    if world().size > 2:
        return Scaled(9, 5, 0, 2.0)
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    embedding: nn.Embedding = Gemma3TextScaledWordEmbedding(9, 5, 0, embed_scale=5**0.5).double()
    return embedding


def splits_of_ones_own() -> None:
    comm = world()
    n = comm.size
    ids = ids_of(12, 3, 6)
    whole = nn.Embedding(12, 5, 7, dtype=F64)
    for split in (Split.even(12, n, weights=range(1, n + 1)), Split(12, tuple(reversed(Split.even(12, n).by_rank)))):
        mine = VocabParallelEmbedding(whole, comm, split)
        assert_equal(mine(ids), whole(ids), 0, str(split))
        assert_equal(mine.master_weight, whole.weight, 0, str(split))
    for split in (
        Split.replicated(12, n),
        Split.even(12, n, segments=(6, 6)),
        Split.even(1, n, allow_empty=True).scaled(12),
    ):
        with pytest.raises(PlanError, match="each rank must hold one exclusive range of rows"):
            VocabParallelEmbedding(whole, comm, split)


@SIZES
@pytest.mark.parametrize("check", [vocabularies, subclasses])
def test_vocab_parallel_embedding_equals_one_embedding(check: Callable[[], None], size: int) -> None:
    on(size, check)


@pytest.mark.parametrize("size", [2, 3])
def test_vocab_parallel_embedding_with_a_split_of_ones_own(size: int) -> None:
    on(size, splits_of_ones_own)


def strange_id(index: int) -> None:
    VocabParallelEmbedding(nn.Embedding(9, 5), world())(torch.tensor([0, index]))


@pytest.mark.parametrize("index", [9, 100, -1])
def test_an_id_outside_the_vocabulary_raises_on_every_rank(index: int) -> None:
    for size in (2, 3):
        with pytest.raises(RankError) as error:
            ranks(size).run(strange_id, index)
        assert str(error.value).count("IndexError: index out of range in self") == size


def test_embeddings_that_cannot_be_split_by_vocabulary() -> None:
    alone = Communicator.single()
    settings: list[dict[str, Any]] = [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}]
    for setting in settings:
        with pytest.raises(
            ModelError, match=r"cannot be split by vocabulary. Split it by width with ParallelEmbedding"
        ):
            VocabParallelEmbedding(nn.Embedding(9, 5, **setting), alone)
    with pytest.raises(ModelError, match=r"Linear is not an nn.Embedding. Keep it unsplit with the rule `replicate`"):
        VocabParallelEmbedding(nn.Linear(9, 5), alone)  # type: ignore[arg-type]
    assert VocabParallelEmbedding(nn.Embedding(9, 5, device="meta"), alone).weight.is_meta


def keeps_state() -> None:
    whole = nn.Embedding(9, 5).requires_grad_(False).eval()
    mine = VocabParallelEmbedding(whole, world())
    assert not mine.weight.requires_grad
    assert not mine.embedding.training
    calls: list[str] = []
    mine.embedding.register_forward_hook(lambda *_: calls.append("inner"))
    whole(torch.tensor([1]))
    assert calls == []


def test_vocab_parallel_embedding_keeps_frozenness() -> None:
    on(2, keeps_state)
