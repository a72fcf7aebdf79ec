"""The collectives with gradients, on real ranks, against the same formula in one process.

Every rank draws the inputs of all ranks from one seed, so that each can compute the unsplit result by itself. A loss behind a
replicated output is the same on every rank and counts once; behind other outputs each rank has a loss of its own, and the
sum over the ranks is meant. Gradients and second-order gradients are those of that total.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from partita.core.sharding.split import Split
from partita.errors import DistributedError
from partita.torch import (
    Communicator,
    init_parallelism,
    mp_copy,
    mp_gather,
    mp_reduce,
    mp_scatter,
    reset_parallelism,
)
from partita.torch.collectives.mappings import (
    all_gather,
    copy_to,
    exchange,
    gather_from,
    reduce_from,
    reduce_scatter,
    scatter_to,
)
from tests.support.compare import assert_equal
from tests.support.ranks import RankError, ranks

SHAPE = (5, 7, 6)
MAX, MIN, AVG, SUM = dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.AVG, dist.ReduceOp.SUM
REDUCTIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "SUM": (SUM, lambda stacked: stacked.sum(0)),
    "AVG": (AVG, lambda stacked: stacked.mean(0)),
    "MAX": (MAX, lambda stacked: stacked.amax(0)),
    "MIN": (MIN, lambda stacked: stacked.amin(0)),
}


@dataclass
class Case:
    """One call of a mapping: the inputs of all ranks, the call, and the formula for the outputs of all ranks."""

    inputs: list[Tensor]
    call: Callable[[Tensor], Tensor]
    formula: Callable[[list[Tensor]], list[Tensor]]
    replicated_input: bool = False
    replicated_output: bool = False


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def row_tables(size: int) -> list[list[list[int]]]:
    """Rows from each rank to each: as many, unlike numbers with some zeros, and all to the last rank."""
    return [
        [[2] * size for _ in range(size)],
        [[(source + 2 * to) % 3 for to in range(size)] for source in range(size)],
        [[0] * (size - 1) + [source + 1] for source in range(size)],
    ]


def size_lists(size: int, parts: int) -> list[tuple[int, ...]]:
    """Even where they go, uneven, most of it at the end, and a rank with nothing."""
    lists = [Split.even(size, parts).local_sizes, (1,) * (parts - 1) + (size - parts + 1,)]
    return [*lists, (0, *Split.even(size, parts - 1).local_sizes)]


def parts_of(dim: int, sizes: Sequence[int]) -> list[Tensor]:
    shapes = [[n if d == dim % 3 else s for d, s in enumerate(SHAPE)] for n in sizes]
    return [draw(*shape) for shape in shapes]


def cases(name: str, comm: Communicator) -> list[tuple[str, Case]]:
    made: list[tuple[str, Case]] = []
    if name == "copy":
        x = draw(*SHAPE)
        made.append(("SUM", Case([x] * comm.size, lambda x: copy_to(x, comm), lambda xs: xs, replicated_input=True)))
        return made
    if name == "reduce":
        for label, (op, formula) in REDUCTIONS.items():
            xs = [draw(*SHAPE) for _ in range(comm.size)]
            for x in xs[1:]:
                x[0] = xs[0][0]  # some elements are the extremum of several ranks
            made.append(
                (
                    label,
                    Case(
                        xs,
                        lambda x, op=op: reduce_from(x, comm, op),
                        lambda xs, formula=formula: [formula(torch.stack(xs))] * comm.size,
                        replicated_output=True,
                    ),
                )
            )
        return made
    if name == "exchange":
        for table in row_tables(comm.size):
            case = Case(
                [draw(sum(rows), *SHAPE[1:]) for rows in table],
                lambda x, t=table: exchange((x,), comm, t[comm.rank], [row[comm.rank] for row in t])[0],
                lambda xs, t=table: [
                    torch.cat([x.split(rows)[to] for x, rows in zip(xs, t, strict=True)]) for to in range(comm.size)
                ],
            )
            made.append((f"rows {table}", case))
        return made
    for dim in (0, 1, 2, -1, -2, -3):
        for sizes in size_lists(SHAPE[dim], comm.size):
            if name == "scatter":
                x = draw(*SHAPE)
                case = Case(
                    [x] * comm.size,
                    lambda x, dim=dim, sizes=sizes: scatter_to(x, comm, dim, sizes),
                    lambda xs, dim=dim, sizes=sizes: list(xs[0].split(sizes, dim)),
                    replicated_input=True,
                )
            elif name in ("gather", "all_gather"):
                gather = gather_from if name == "gather" else all_gather
                case = Case(
                    parts_of(dim, sizes),
                    lambda x, dim=dim, sizes=sizes, gather=gather: gather(x, comm, dim, sizes),
                    lambda xs, dim=dim: [torch.cat(xs, dim)] * comm.size,
                    replicated_output=name == "gather",
                )
            else:
                case = Case(
                    [draw(*SHAPE) for _ in range(comm.size)],
                    lambda x, dim=dim, sizes=sizes: reduce_scatter(x, comm, dim, sizes),
                    lambda xs, dim=dim, sizes=sizes: list(torch.stack(xs).sum(0).split(sizes, dim)),
                )
            made.append((f"dim {dim}, sizes {sizes}", case))
    return made


def loss(y: Tensor, weight: Tensor) -> Tensor:
    """Couples every element with every other, so that the second derivative is a full matrix."""
    return (y * weight).sum() ** 3 + (y**4 * weight).sum()


def check(case: Case, comm: Communicator, what: str) -> None:
    """Output, gradient and second-order gradient of this rank are those of the unsplit formula; nothing is mutated."""
    replicas = case.replicated_input
    whole = [x.clone().requires_grad_() for x in (case.inputs[:1] if replicas else case.inputs)]
    outputs = case.formula(whole * comm.size if replicas else whole)
    weights = [draw(*y.shape) for y in outputs]
    directions = [draw(*x.shape) for x in case.inputs]
    used = 1 if case.replicated_output else comm.size
    total = torch.stack([loss(y, w) for y, w in zip(outputs[:used], weights, strict=False)]).sum()
    grads = torch.autograd.grad(total, whole, create_graph=True)
    turned = torch.stack([(g * v).sum() for g, v in zip(grads, directions, strict=False)]).sum()
    seconds = torch.autograd.grad(turned, whole)

    me = 0 if replicas else comm.rank
    for layout in ("contiguous", "transposed"):
        data = case.inputs[comm.rank].clone()
        if layout == "transposed":
            data = data.transpose(0, 2).contiguous().transpose(0, 2)
        before = data.clone()
        x = data.requires_grad_()
        y = case.call(x)
        assert_equal(y, outputs[comm.rank], what=f"{what}, {layout}: output")
        value = loss(y, weights[0 if case.replicated_output else comm.rank])
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        assert_equal(grad, grads[me], what=f"{what}, {layout}: gradient")
        (second,) = torch.autograd.grad((grad * directions[me]).sum(), x)
        assert_equal(second, seconds[me], what=f"{what}, {layout}: second-order gradient")
        assert torch.equal(x, before), f"{what}, {layout}: the input was changed"


def run_cases(name: str) -> int:
    comm = Communicator()
    made = cases(name, comm)
    for what, case in made:
        check(case, comm, f"{name}, {what}")
    return len(made)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", ["copy", "reduce", "scatter", "gather", "all_gather", "reduce_scatter", "exchange"])
def test_equals_the_formula_of_one_process(name: str, size: int) -> None:
    counts = ranks(size).run(run_cases, name)
    assert counts == [{"copy": 1, "reduce": 4, "exchange": 3}.get(name, 18)] * size


# --- other reductions of the gradient -----------------------------------------------------------------------------------


def copy_with(label: str) -> None:
    comm = Communicator()
    op, formula = REDUCTIONS[label]
    x, weights = draw(3, 4).requires_grad_(), draw(comm.size, 3, 4)
    y = copy_to(x, comm, op)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad((y**2 * weights[comm.rank]).sum(), x, create_graph=True)
    assert_equal(grad, formula(2 * x * weights), what=label)
    # The average, maximum or minimum of gradients is not the gradient of a sum: its derivative would be wrong.
    if label != "SUM":
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("label", REDUCTIONS)
def test_copy_reduces_gradients_as_asked(label: str, size: int) -> None:
    ranks(size).run(copy_with, label)


# --- exactness of what is only moved ------------------------------------------------------------------------------------


def move_bits() -> None:
    comm = Communicator()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        whole = draw(4, 12).mul(10).to(dtype)
        sizes = Split.even(12, comm.size).local_sizes
        mine = scatter_to(whole, comm, -1, sizes)
        assert torch.equal(mine, whole.split(sizes, -1)[comm.rank])
        for gather in (gather_from, all_gather):
            assert torch.equal(gather(mine, comm, -1, sizes), whole)
        if dtype.is_floating_point:
            assert copy_to(whole, comm).dtype == reduce_from(whole, comm).dtype == dtype
            # The largest of equal things is the thing itself.
            assert torch.equal(reduce_from(whole, comm, MAX), whole)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_is_moved_keeps_its_bits(size: int) -> None:
    ranks(size).run(move_bits)


def test_one_rank_alone_has_nothing_to_do() -> None:
    comm, x = Communicator.single(), draw(3, 4)
    for mapping in (copy_to, reduce_from, scatter_to, gather_from, all_gather, reduce_scatter):
        assert mapping(x, comm) is x


# --- errors -------------------------------------------------------------------------------------------------------------


def refuse(mapping: str, arguments: dict[str, Any]) -> None:
    comm = Communicator()
    call = {"copy": copy_to, "reduce": reduce_from, "scatter": scatter_to, "gather": gather_from,
            "all_gather": all_gather, "reduce_scatter": reduce_scatter}[mapping]  # fmt: skip
    call(draw(5, 4), comm, **arguments)


@pytest.mark.parametrize(
    ("mapping", "arguments", "match"),
    [
        ("copy", {"op": dist.ReduceOp.PRODUCT}, "op must be SUM, AVG, MAX or MIN"),
        ("reduce", {"op": dist.ReduceOp.BAND}, "op must be SUM, AVG, MAX or MIN"),
        ("scatter", {"dim": 0}, "5 cannot be split evenly over 2 ranks"),
        ("scatter", {"dim": 0, "sizes": (3, 3)}, r"sizes must be 2 numbers that add up to 5 \(dim 0\)"),
        ("scatter", {"dim": 0, "sizes": (5,)}, r"sizes must be 2 numbers that add up to 5 \(dim 0\)"),
        ("scatter", {"dim": 0, "sizes": (7, -2)}, r"sizes must be 2 numbers that add up to 5 \(dim 0\)"),
        ("reduce_scatter", {"dim": 0}, "5 cannot be split evenly over 2 ranks"),
        ("reduce_scatter", {"dim": 1, "sizes": (1, 2)}, "add up to 4"),
        ("gather", {"dim": 1, "sizes": (3, 3)}, r"sizes must be 2 numbers, and rank 0's 4 \(dim 1\)"),
        ("all_gather", {"dim": 0, "sizes": (5, 5, 5)}, "sizes must be 2 numbers"),
    ],
)
def test_errors_come_before_any_communication(mapping: str, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(RankError, match=match):
        ranks(2).run(refuse, mapping, arguments)
    assert len(ranks(2).run(run_cases, "copy")) == 2  # the ranks are in step still


# --- the seed's names -----------------------------------------------------------------------------------------------------


def seed_names() -> None:
    init_parallelism(dist.get_world_size())
    try:
        comm = Communicator()
        x = draw(comm.size * 2, 3, comm.size * 5)
        mine = (x * (comm.rank + 1)).requires_grad_()
        for dim in (0, 2, -1):
            assert torch.equal(mp_scatter(x, dim), x.chunk(comm.size, dim)[comm.rank])
            assert_equal(mp_gather(mine, dim), torch.cat([x * (r + 1) for r in range(comm.size)], dim))
        assert torch.equal(mp_scatter(x), mp_scatter(x, -1))
        assert torch.equal(mp_gather(x), mp_gather(x, -1))
        assert_equal(mp_reduce(mine), x * sum(range(comm.size + 1)))
        for label, (op, formula) in REDUCTIONS.items():
            every = torch.stack([x * (r + 1) for r in range(comm.size)])
            assert_equal(mp_reduce(mine, op), formula(every), what=label)
            (grad,) = torch.autograd.grad((mp_copy(mine, op) * (comm.rank + 1)).sum(), mine)
            ones = torch.ones_like(every) * torch.arange(1, comm.size + 1).double().view(-1, 1, 1, 1)
            assert_equal(grad, formula(ones), what=label)
        sizes = Split.even(5 * comm.size + 1, comm.size).local_sizes
        uneven = draw(2, sum(sizes))
        assert torch.equal(mp_gather(mp_scatter(uneven, sizes=sizes), sizes=sizes), uneven)
        # A group that is given is taken instead of the default.
        alone = Communicator.single()
        for call in (mp_copy, mp_reduce, mp_scatter, mp_gather):
            assert call(x, group=alone) is x
    finally:
        reset_parallelism()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_seed_names_use_the_default_group(size: int) -> None:
    ranks(size).run(seed_names)


def test_the_seed_names_need_a_group() -> None:
    for call in (mp_copy, mp_reduce, mp_scatter, mp_gather):
        with pytest.raises(
            DistributedError, match=r"parallelism is not initialized. Call partita.torch.init_parallelism"
        ):
            call(torch.ones(2))
