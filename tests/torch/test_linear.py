"""Column and row layers on real ranks against one `nn.Linear` of their master weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.core.sharding.split import Split
from partita.errors import DistributedError, ModelError, PlanError
from partita.torch import (
    ColumnParallelLinear,
    Communicator,
    LoraLinear,
    ParallelEmbedding,
    RowParallelLinear,
    init_parallelism,
    reset_parallelism,
)
from partita.torch.collectives.mappings import gather_from, scatter_to
from partita.torch.model.parts import unsplit_name
from tests.support.compare import assert_equal, draw, part, world
from tests.support.ranks import RankError, on, ranks

SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4])
F64 = torch.float64


def unsplit(layer: ColumnParallelLinear | RowParallelLinear) -> nn.Linear:
    """The unsplit layer of the same weight."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
    linear.weight.data.copy_(layer.master_weight)
    if linear.bias is not None:
        assert layer.master_bias is not None
        linear.bias.data.copy_(layer.master_bias)
    return linear


def grads_of_both_orders(y: Tensor, x: Tensor, weight: Tensor, turn: Tensor, module: nn.Module) -> list[Tensor]:
    """Gradient of the input and of the parameters, and the same of that gradient in a direction."""
    parameters = list(module.parameters())
    first = torch.autograd.grad((y**3 * weight).sum(), [x, *parameters], create_graph=True)
    second = torch.autograd.grad((first[0] * turn).sum(), [x, *(p for p in parameters if p.dim() == 2)])
    return [*first, *second]


# --- against nn.Linear --------------------------------------------------------------------------------------------------


def columns() -> None:
    comm = world()
    for bias, gather, stride, shape in product((True, False), (True, False), (1, 2), ((), (4,), (2, 3))):
        what = f"bias={bias}, gather_output={gather}, stride={stride}, {shape}"
        layer = ColumnParallelLinear(7, 10, bias, gather, "biased_normal", stride, group=comm, dtype=F64)
        whole = unsplit(layer)
        mine = layer.split.ranges(comm.rank)
        assert sum(b - a for a, b in mine) == layer.weight.shape[0]
        assert_equal(layer.weight, part(whole.weight, 0, mine), 0, what)
        x = draw(*shape, 7).requires_grad_()
        y, expected = layer(x), whole(x)
        weight, turn = draw(*expected.shape), draw(*x.shape)
        shown = expected if gather else part(expected, -1, mine)
        assert_equal(y, shown, what=f"{what}: output")
        found = grads_of_both_orders(y, x, weight if gather else part(weight, -1, mine), turn, layer)
        true = grads_of_both_orders(expected, x, weight, turn, whole)
        names = ["dx", "dW", *(["db"] if bias else []), "dx second", "dW second"]
        for name, a, b in zip(names, found, true, strict=True):
            assert_equal(a, b if "dx" in name else part(b, 0, mine), what=f"{what}: {name}")


def rows() -> None:
    comm = world()
    for bias, parallel, stride, shape in product((True, False), (True, False), (1, 2), ((), (4,), (2, 3))):
        what = f"bias={bias}, input_is_parallel={parallel}, stride={stride}, {shape}"
        layer = RowParallelLinear(10, 7, bias, parallel, "biased_normal", stride, group=comm, dtype=F64)
        assert layer.input_is_parallel is parallel
        whole = unsplit(layer)
        mine = layer.split.ranges(comm.rank)
        assert_equal(layer.weight, part(whole.weight, 1, mine), 0, what)
        x = draw(*shape, 10).requires_grad_()
        given = part(x.detach(), -1, mine).requires_grad_() if parallel else x
        y, expected = layer(given), whole(x)
        weight, turn = draw(*expected.shape), draw(*x.shape)
        assert_equal(y, expected, what=f"{what}: output")
        found = grads_of_both_orders(y, given, weight, part(turn, -1, mine) if parallel else turn, layer)
        true = grads_of_both_orders(expected, x, weight, turn, whole)
        # A layer's own parameters come first, so that its bias stands before its inner layer's weight.
        names = ["dx", *(["db"] if bias else []), "dW", "dx second", "dW second"]
        if bias:
            true[1], true[2] = true[2], true[1]
        for name, a, b in zip(names, found, true, strict=True):
            expected_part = part(b, -1, mine) if "dW" in name or ("dx" in name and parallel) else b
            assert_equal(a, expected_part, what=f"{what}: {name}")


@SIZES
@pytest.mark.parametrize("check", [columns, rows])
def test_equals_one_linear_layer(check: Callable[[], None], size: int) -> None:
    on(size, check)


def as_few_features_as_ranks() -> None:
    comm = world()
    n = comm.size
    for layer, x in (
        (ColumnParallelLinear(1, n, group=comm, dtype=F64), draw(3, 1)),
        (RowParallelLinear(n, 1, group=comm, dtype=F64), draw(3, n)),
    ):
        assert_equal(layer(x), unsplit(layer)(x))
    with pytest.raises(PlanError, match=f"{n - 1} units? cannot be distributed over {n} ranks"):
        ColumnParallelLinear(4, n - 1, group=comm)
    with pytest.raises(PlanError, match="cannot be distributed"):
        RowParallelLinear(2 * n - 2, 4, stride=2, group=comm)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_feature_a_rank(size: int) -> None:
    on(size, as_few_features_as_ranks)


def low_precision() -> None:
    comm = world()
    # float32: design's 1e-5. bfloat16 has 8 bits: each of the few roundings costs up to 2 ** -8 of the largest.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4 * 2**-8), (torch.float16, 4 * 2**-10)):
        column = ColumnParallelLinear(24, 33, gather_output=False, init_type="biased_normal", group=comm, dtype=dtype)
        row = RowParallelLinear(33, 24, input_is_parallel=True, init_type="biased_normal", group=comm, dtype=dtype)
        x = draw(5, 24).to(dtype).requires_grad_()
        y = row(F.gelu(column(x)))
        assert y.dtype == dtype
        y.float().sum().backward()
        reference = nn.Sequential(unsplit(column), nn.GELU(), unsplit(row)).double()
        exact = x.detach().double().requires_grad_()
        expected = reference(exact)
        expected.sum().backward()
        assert_equal(y.double(), expected, tolerance, f"{dtype}: output")
        assert x.grad is not None
        assert_equal(x.grad.double(), exact.grad, tolerance, f"{dtype}: dx")
        assert column.weight.grad is not None
        true = part(reference[0].weight.grad, 0, column.split.ranges(comm.rank))  # type: ignore[arg-type]
        assert_equal(column.weight.grad.double(), true, tolerance, f"{dtype}: dW")


@pytest.mark.parametrize("size", [2, 3])
def test_low_precision(size: int) -> None:
    on(size, low_precision)


def without_gradients() -> None:
    comm = world()
    column = ColumnParallelLinear(6, 9, gather_output=False, group=comm, dtype=F64)
    row = RowParallelLinear(9, 6, input_is_parallel=True, init_type="biased_normal", group=comm, dtype=F64)
    whole = nn.Sequential(unsplit(column), unsplit(row))
    x = draw(4, 6)
    before = x.clone()
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=False)):
        with mode:
            assert_equal(row(column(x)), whole(x))
    frozen = row.requires_grad_(False)(column.requires_grad_(False)(x))
    assert_equal(frozen, whole(x))
    assert not frozen.requires_grad
    # A trained input of frozen layers has its gradient nevertheless.
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    row(column(mine)).sum().backward()
    whole(other).sum().backward()
    assert_equal(mine.grad, other.grad)
    assert torch.equal(x, before)
    with torch.autocast("cpu", torch.bfloat16):
        y = row.float()(column.float()(x.float()))
        assert y.dtype == torch.bfloat16
        assert_equal(y, whole.float()(x.float()), 4 * 2**-8)


@SIZES
def test_without_gradients(size: int) -> None:
    on(size, without_gradients)


# --- the two-layer network of the seed --------------------------------------------------------------------------------------


class Network(nn.Module):
    """`ml.models.parallel`'s example: an embedding, then a column and a row layer."""

    def __init__(self, vocab: int, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.tokens = ParallelEmbedding(vocab, width, init_type="normal", dtype=F64)
        self.up = ColumnParallelLinear(width, inner, bias, gather_output=False, init_type="biased_normal", dtype=F64)
        self.down = RowParallelLinear(inner, inner, bias, input_is_parallel=True, init_type="biased_normal", dtype=F64)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.tokens(ids)))
        return y


def seed_example() -> list[Tensor]:
    comm = Communicator()
    init_parallelism(comm.size)
    try:
        checks = []
        for bias in (True, False):
            network = Network(11, 6, 9, bias)
            embedding, up, down = network.tokens, network.up, network.down
            whole = nn.Sequential(nn.Embedding(11, 6, dtype=F64), unsplit(up), unsplit(down))
            whole[0].weight.data.copy_(embedding.master_weight)
            names = dict(zip(("0", "1", "2"), ("tokens", "up", "down"), strict=True))
            # Every parameter stands for one of the unsplit model, under its path.
            expected_names = {names[n[0]] + n[1:] for n, _ in whole.named_parameters()}
            assert sorted(map(unsplit_name, dict(network.named_parameters()))) == sorted(expected_names)
            ids = torch.randint(0, 10, (4, 5))
            for optimizer in (torch.optim.SGD, torch.optim.AdamW):
                mine, theirs = optimizer(network.parameters(), lr=0.1), optimizer(whole.parameters(), lr=0.1)
                for step in range(3):
                    mine.zero_grad()
                    theirs.zero_grad()
                    y, expected = network(ids), whole(ids)
                    assert_equal(y, expected, what=f"step {step}")
                    F.cross_entropy(y.flatten(0, 1), ids.flatten() % 9).backward()
                    F.cross_entropy(expected.flatten(0, 1), ids.flatten() % 9).backward()
                    for layer, dim, true in ((embedding, 1, whole[0]), (up, 0, whole[1]), (down, 1, whole[2])):
                        mine_of_it = part(true.weight.grad, dim, layer.split.ranges(comm.rank))
                        assert_equal(layer.weight.grad, mine_of_it, what=f"step {step}: gradient")
                    if bias:
                        assert down.bias is not None
                        assert_equal(down.bias.grad, whole[2].bias.grad)
                    mine.step()
                    theirs.step()
                # AdamW divides by gradients' magnitudes, which lifts a rounding of a tiny one: 1e-9 after six steps.
                assert_equal(embedding.master_weight, whole[0].weight, 1e-9)
                assert_equal(up.master_weight, whole[1].weight, 1e-9)
                assert_equal(down.master_weight, whole[2].weight, 1e-9)
                if bias:
                    assert_equal(up.master_bias, whole[1].bias, 1e-9)
                    assert_equal(down.master_bias, whole[2].bias, 1e-9)
            checks.append(down.master_weight)
        return checks
    finally:
        reset_parallelism()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_example_of_the_seed_equals_its_sequential(size: int) -> None:
    for found in zip(*ranks(size).run(seed_example), strict=True):
        assert all(torch.equal(found[0], other) for other in found)


# --- made of existing layers ----------------------------------------------------------------------------------------------


def conv1d(outputs: int, inputs: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(outputs, inputs).double()
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    return layer


def made_of_layers() -> None:
    comm = world()
    for make in (lambda o, i: nn.Linear(i, o, dtype=F64), lambda o, i: nn.Linear(i, o, False, dtype=F64), conv1d):
        up, down = make(9, 6), make(6, 9)
        for bias in (up.bias, down.bias):
            assert bias is None or bool(bias.any())
        column, row = ColumnParallelLinear.from_linear(up, comm), RowParallelLinear.from_linear(down, comm)
        assert type(column.linear) is type(row.linear) is type(up)
        assert (column.gather_output, row.input_is_parallel) == (False, True)
        assert_equal(column.master_weight, up.weight, 0)
        assert_equal(row.master_weight, down.weight, 0)
        if up.bias is not None:
            assert_equal(column.master_bias, up.bias, 0)
            assert_equal(row.master_bias, down.bias, 0)
            assert row.bias is down.bias
        # The parameters are copies: nothing of the unsplit layer is held on to.
        assert column.weight.untyped_storage().nbytes() == column.weight.numel() * 8
        names = sorted(
            {f"up.{n}" for n in dict(up.named_parameters())} | {f"down.{n}" for n in dict(down.named_parameters())}
        )
        both = nn.ModuleDict({"up": column, "down": row})
        assert sorted(map(unsplit_name, dict(both.named_parameters()))) == names
        assert sorted(map(unsplit_name, both.state_dict())) == names
        x = draw(2, 3, 6).requires_grad_()
        y, expected = row(F.gelu(column(x))), down(F.gelu(up(x)))
        assert_equal(y, expected)
        weight = draw(2, 3, 6)
        (grad,) = torch.autograd.grad((y * weight).sum(), x, retain_graph=True)
        (true,) = torch.autograd.grad((expected * weight).sum(), x, retain_graph=True)
        assert_equal(grad, true)
        (y * weight).sum().backward()
        (expected * weight).sum().backward()
        assert_equal(column.comm.gather_split(column.weight.grad, column._weight_dim, column.split), up.weight.grad)
        assert_equal(row.comm.gather_split(row.weight.grad, row._weight_dim, row.split), down.weight.grad)


@SIZES
def test_from_linear(size: int) -> None:
    on(size, made_of_layers)


def made_with_a_split() -> None:
    comm = world()
    n = comm.size
    for split in (
        Split.even(12, n, segments=(6, 6)),
        Split.even(12, n, weights=range(1, n + 1)),
        Split(12, tuple(reversed(Split.even(12, n).by_rank))),
        Split.even(1, n, allow_empty=True).scaled(12),
    ):
        linear = nn.Linear(5, 12, dtype=F64)
        x = draw(3, 5)
        for gather in (True, False):
            layer = ColumnParallelLinear.from_linear(linear, comm, split, gather_output=gather)
            expected = linear(x)
            assert_equal(layer(x), expected if gather else part(expected, -1, split.ranges(comm.rank)), what=str(split))
        assert_equal(layer.master_weight, linear.weight, 0)
        linear, x = nn.Linear(12, 5, dtype=F64), draw(3, 12)
        for parallel in (True, False):
            row = RowParallelLinear.from_linear(linear, comm, split, input_is_parallel=parallel)
            given = part(x, -1, split.ranges(comm.rank)) if parallel else x
            assert_equal(row(given), linear(x), what=str(split))
        assert_equal(row.master_weight, linear.weight, 0)
    shared = Split.kv_heads(4, 1, n, width=3)
    with pytest.raises(PlanError, match="gather_output=True needs a split without copies"):
        ColumnParallelLinear.from_linear(nn.Linear(5, 3), comm, shared, gather_output=True)
    with pytest.raises(PlanError, match="the inputs of a row layer must be split without copies"):
        RowParallelLinear.from_linear(nn.Linear(3, 5), comm, shared)
    linear = nn.Linear(5, 3, dtype=F64)
    layer = ColumnParallelLinear.from_linear(linear, comm, shared, expand=torch.tensor([2, 0, 0]))
    x = draw(2, 5)
    assert_equal(layer(x), linear(x)[:, [2, 0, 0]])
    assert_equal(layer.master_weight, linear.weight, 0)


@pytest.mark.parametrize("size", [2, 3])
def test_from_linear_with_a_split_of_ones_own(size: int) -> None:
    on(size, made_with_a_split)


def keeps_state() -> None:
    comm = world()
    linear = nn.Linear(4, 6).requires_grad_(False).eval()
    calls: list[str] = []
    for make in (ColumnParallelLinear.from_linear, RowParallelLinear.from_linear):
        layer = make(linear, comm)
        assert not layer.training
        assert not any(p.requires_grad for p in layer.parameters())
        # The inner layer is one of its own: what is put on it is not put on the layer it was made of.
        layer.linear.register_forward_hook(lambda *_: calls.append("inner"))
        linear(torch.ones(4))
        assert calls == []
        assert make(linear.to("meta"), comm).weight.is_meta
        linear = nn.Linear(4, 6).requires_grad_(False).eval()
    assert ColumnParallelLinear(4, 6, group=comm, device="meta", init_type="orthogonal").weight.is_meta
    assert RowParallelLinear(4, 6, group=comm, device="meta").bias.is_meta  # type: ignore[union-attr]


def test_from_linear_keeps_mode_and_frozenness() -> None:
    on(2, keeps_state)


class Packed(nn.Linear):
    """As quantized layers do: an nn.Linear whose weight is packed in another shape."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(32, 1))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Bilinear(4, 4, 4), "Bilinear"),
        (lambda: nn.Embedding(4, 4), "Embedding"),
        (lambda: nn.Conv1d(4, 4, 1), "Conv1d"),
        (lambda: LoraLinear(nn.Linear(4, 4), 2), "LoraLinear"),
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear"),
        (Packed, "Packed"),
    ],
)
def test_layers_that_cannot_be_cut_are_refused(make: Callable[[], nn.Module], name: str) -> None:
    comm = Communicator.single()
    for from_linear in (ColumnParallelLinear.from_linear, RowParallelLinear.from_linear):
        with pytest.raises(ModelError, match=f"{name} cannot be split: only nn.Linear and transformers' Conv1D"):
            from_linear(make(), comm)


def test_arguments_that_cannot_be() -> None:
    alone = Communicator.single()
    for make in (ColumnParallelLinear, RowParallelLinear):
        with pytest.raises(PlanError, match=r"init_type must be one of orthogonal, normal, .* got 'glorot'"):
            make(4, 4, init_type="glorot", group=alone)  # type: ignore[arg-type]
        for stride in (3, 0, -1):
            with pytest.raises(PlanError, match=rf"stride must divide the split dimension \(4\); got {stride}"):
                make(4, 4, stride=stride, group=alone)
        with pytest.raises(DistributedError, match="parallelism is not initialized"):
            make(4, 4)
    with pytest.raises(PlanError, match="gather_output=True and sequence_parallel=True exclude each other"):
        ColumnParallelLinear(4, 4, sequence_parallel=True, group=alone)


# --- another inner layer --------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Another kind of linear layer: it computes the same in two halves of its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = nn.Parameter(linear.bias.detach().clone()) if linear.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        half = self.weight.shape[1] // 2
        y = x[..., :half] @ self.weight[:, :half].T + x[..., half:] @ self.weight[:, half:].T
        return y if self.bias is None else y + self.bias


class Around(nn.Module):
    """A layer around another, as adapters are, that brings no parameters."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y


def swapped_layers() -> None:
    comm = world()
    for swap in (Twice, Around, lambda linear: Around(Twice(linear))):
        column = ColumnParallelLinear(6, 9, gather_output=False, init_type="biased_normal", group=comm, dtype=F64)
        row = RowParallelLinear(9, 6, input_is_parallel=True, init_type="biased_normal", group=comm, dtype=F64)
        whole = nn.Sequential(unsplit(column), unsplit(row))
        names = sorted(unsplit_name(n) for m in (column, row) for n, _ in m.named_parameters())
        column.linear, row.linear = swap(column.linear), swap(row.linear)
        x = draw(3, 6).requires_grad_()
        y, expected = row(column(x)), whole(x)
        assert_equal(y, expected)
        (grad,) = torch.autograd.grad((y**2).sum(), [x], retain_graph=True)
        (true,) = torch.autograd.grad((expected**2).sum(), [x], retain_graph=True)
        assert_equal(grad, true)
        (y**2).sum().backward()
        (expected**2).sum().backward()
        assert_equal(column.weight.grad, part(whole[0].weight.grad, 0, column.split.ranges(comm.rank)))
        assert_equal(row.weight.grad, part(whole[1].weight.grad, 1, row.split.ranges(comm.rank)))
        # Weight, bias and the unsplit names are found as before.
        assert_equal(column.master_weight, whole[0].weight, 0)
        assert_equal(column.master_bias, whole[0].bias, 0)
        assert_equal(row.master_weight, whole[1].weight, 0)
        assert sorted(unsplit_name(n) for m in (column, row) for n, _ in m.named_parameters()) == names


@pytest.mark.parametrize("size", [2, 3])
def test_the_inner_layer_may_be_swapped(size: int) -> None:
    on(size, swapped_layers)


# --- sequence parallelism -------------------------------------------------------------------------------------------------


def sequence_shards(make: str) -> None:
    comm = world()
    length = 3 * comm.size
    for dim, bias in product((0, 1), (True, False)):
        up, down = nn.Linear(6, 9, bias, dtype=F64), nn.Linear(9, 5, bias, dtype=F64)
        if make == "from_linear":
            column = ColumnParallelLinear.from_linear(up, comm, sequence_parallel=True, sequence_dim=dim)
            row = RowParallelLinear.from_linear(down, comm, sequence_parallel=True, sequence_dim=dim)
        else:
            column = ColumnParallelLinear(
                6, 9, bias, gather_output=False, group=comm, dtype=F64, sequence_parallel=True, sequence_dim=dim
            )
            row = RowParallelLinear(
                9, 5, bias, input_is_parallel=True, group=comm, dtype=F64, sequence_parallel=True, sequence_dim=dim
            )
            up, down = unsplit(column), unsplit(row)
        shape = [2, 2]
        shape[dim] = length
        x = draw(*shape, 6).requires_grad_()
        weight = draw(*shape, 5)
        shard = x.detach().chunk(comm.size, dim)[comm.rank].clone().requires_grad_()
        y, expected = row(F.gelu(column(shard))), down(F.gelu(up(x)))
        assert_equal(y, expected.chunk(comm.size, dim)[comm.rank])
        (y**2 * weight.chunk(comm.size, dim)[comm.rank]).sum().backward()
        (expected**2 * weight).sum().backward()
        assert x.grad is not None
        assert_equal(shard.grad, x.grad.chunk(comm.size, dim)[comm.rank], what="dx")
        assert_equal(column.weight.grad, part(up.weight.grad, 0, column.split.ranges(comm.rank)), what="dW column")
        assert_equal(row.weight.grad, part(down.weight.grad, 1, row.split.ranges(comm.rank)), what="dW row")
        if bias:
            assert row.bias is not None
            assert column.bias is not None
            assert_equal(column.bias.grad, part(up.bias.grad, 0, column.split.ranges(comm.rank)), what="db column")
            assert_equal(row.bias.grad, down.bias.grad, what="db row")


@SIZES
@pytest.mark.parametrize("make", ["from_linear", "new"])
def test_sequence_parallelism_equals_the_whole_sequence(make: str, size: int) -> None:
    on(size, sequence_shards, make)


def uneven_sequence() -> None:
    comm = world()
    length = 3 * comm.size + 1
    x = draw(2, length, 6)
    # A sequence that does not go up in the ranks is refused where it is cut: on the way in ...
    with pytest.raises(DistributedError, match=f"{length} cannot be split evenly over {comm.size} ranks"):
        scatter_to(x, comm, 1)
    # ... and on the way out.
    row = RowParallelLinear(6, 5, group=comm, dtype=F64, sequence_parallel=True)
    with pytest.raises(DistributedError, match=f"{length} cannot be split evenly over {comm.size} ranks"):
        row(x)


@pytest.mark.parametrize("size", [2, 3])
def test_a_sequence_of_uneven_length_is_refused(size: int) -> None:
    on(size, uneven_sequence)


# --- copies of a layer ------------------------------------------------------------------------------------------------------


def copied() -> None:
    comm = world()
    column = ColumnParallelLinear(6, 9, group=comm, dtype=F64)
    twin = copy.deepcopy(column)
    assert twin.comm is comm
    x = draw(3, 6)
    assert_equal(twin(x), column(x), 0)
    twin.weight.data.zero_()
    assert bool(column.weight.any())


def test_a_deep_copy_talks_to_the_same_ranks() -> None:
    on(2, copied)


def state_dict_of_another() -> None:
    comm = world()
    first, second = (RowParallelLinear(6, 9, group=comm, dtype=F64) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert_equal(second.master_weight, first.master_weight, 0)
    assert sorted(first.state_dict()) == ["bias", "linear.weight"]


def test_state_dict() -> None:
    on(2, state_dict_of_another)


def gather_of_uneven_columns() -> None:
    comm = world()
    column = ColumnParallelLinear(6, 9, group=comm, dtype=F64)
    x = draw(3, 6)
    column.gather_output = False
    assert_equal(gather_from(column(x), comm, -1, column.split.local_sizes), unsplit(column)(x))
    assert str(column) == (
        f"ColumnParallelLinear(\n  in=6, out={column.split}, rank {comm.rank}, gather_output=False\n  (linear): "
        f"Linear(in_features=6, out_features={column.weight.shape[0]}, bias=True)\n)"
    )


def test_parts_are_shown_and_can_be_gathered() -> None:
    on(2, gather_of_uneven_columns)


def wrong_input() -> None:
    ColumnParallelLinear(6, 9, group=world())(torch.ones(3, 5))


def test_an_input_of_another_width_raises_on_every_rank() -> None:
    with pytest.raises(RankError, match=r"rank 0: (.|\n)*rank 1: (.|\n)*mat1 and mat2 shapes cannot be multiplied"):
        ranks(2).run(wrong_input)
