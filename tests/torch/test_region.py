"""Entering a split region: one sum for all siblings, which overlaps with their weight gradients; equal to the unsplit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.core.sharding.split import Split
from partita.torch import ColumnParallelLinear, Communicator, LoraLinear, RowParallelLinear
from partita.torch.layers import region
from partita.torch.layers.grads import sum_shared_gradient
from partita.torch.layers.region import RegionInput
from tests.support.compare import assert_equal, draw, part, world
from tests.support.ranks import ranks
from tests.torch.test_linear import columns, made_of_layers, seed_example, swapped_layers, without_gradients

F64 = torch.float64


class Counting(Communicator):
    """A communicator that counts its reductions."""

    reductions = 0

    def all_reduce_(self, tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> Tensor:
        Counting.reductions += 1
        return super().all_reduce_(tensor, op)

    def start_all_reduce_(self, tensor: Tensor) -> Any:
        Counting.reductions += 1
        return super().start_all_reduce_(tensor)


def shared_entry() -> None:
    comm = Counting()
    linears = [nn.Linear(6, 9, dtype=F64) for _ in range(3)]

    def siblings() -> list[ColumnParallelLinear]:
        entry = RegionInput(comm, 3)
        return [ColumnParallelLinear.from_linear(linear, comm, entry=entry) for linear in linears]

    def check(layers: list[ColumnParallelLinear], inputs: list[Tensor], reductions: int) -> None:
        Counting.reductions = 0
        x = draw(4, 6).requires_grad_()
        weight = draw(4, 9)
        mine = part(weight, -1, layers[0].split.ranges(comm.rank))
        used = [f(x) for f in inputs]  # type: ignore[operator]
        outputs = [layer(u) for layer, u in zip(layers, used, strict=True)]
        (grad,) = torch.autograd.grad(torch.stack([(y**2 * mine).sum() for y in outputs]).sum(), x)
        expected = [linear(f(x)) for linear, f in zip(linears, inputs, strict=True)]  # type: ignore[operator]
        (true,) = torch.autograd.grad(torch.stack([(y**2 * weight).sum() for y in expected]).sum(), x)
        assert_equal(grad, true)
        assert Counting.reductions == reductions

    same = [lambda x: x] * 3
    layers = siblings()
    for _ in range(3):
        check(layers, same, 1)  # type: ignore[arg-type]
    # Layers whose inputs are not the same tensor enter each by itself, and go on doing so.
    layers = siblings()
    for _ in range(2):
        check(layers, [lambda x: x, lambda x: x * 2, lambda x: x + 1], 3)  # type: ignore[list-item]
    check(layers, same, 3)  # type: ignore[arg-type]
    # A forward that stopped half way leaves nothing that a later one could take.
    layers = siblings()
    x = draw(4, 6).requires_grad_()
    layers[0](x)
    check(layers, same, 3)  # type: ignore[arg-type]
    # An input that was changed in place is not taken for what it was: autograd says so, as it does unsplit.
    layers = siblings()
    h = draw(4, 6).requires_grad_() * 1
    first = layers[0](h)
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified inplace"):
        (first + layers[1](h)).sum().backward()
    # Gradients accumulate over backwards as they do unsplit.
    layers = siblings()
    x, other = draw(4, 6).requires_grad_(), None
    other = x.detach().clone().requires_grad_()
    for _ in range(2):
        (layers[0](x) + layers[1](x)).sum().backward()
        (linears[0](other) + linears[1](other)).sum().backward()
    assert_equal(x.grad, other.grad)


def checkpointed() -> None:
    from torch.utils.checkpoint import checkpoint

    comm = world()
    linears = [nn.Linear(6, 9, dtype=F64) for _ in range(2)]
    down = nn.Linear(9, 6, dtype=F64)
    entry = RegionInput(comm, 2)
    gate, up = (ColumnParallelLinear.from_linear(linear, comm, entry=entry) for linear in linears)
    row = RowParallelLinear.from_linear(down, comm)
    for reentrant in (True, False):
        x, other = draw(4, 6).requires_grad_(), None
        other = x.detach().clone().requires_grad_()
        for _ in range(2):
            y = checkpoint(lambda x: row(F.silu(gate(x)) * up(x)), x, use_reentrant=reentrant)
            y.sum().backward()
            down(F.silu(linears[0](other)) * linears[1](other)).sum().backward()
        assert_equal(x.grad, other.grad)


def raised(y: Tensor, power: int | None) -> Tensor:
    return y if power is None else y**power


def second_order() -> None:
    """Of siblings, with a constant incoming gradient and without; weights get it too, and first-order ones with it."""
    comm = world()
    linears = [nn.Linear(6, 9, dtype=F64) for _ in range(2)]
    entry = RegionInput(comm, 2)
    layers = [ColumnParallelLinear.from_linear(linear, comm, entry=entry) for linear in linears]
    mine = layers[0].split.ranges(comm.rank)
    x = draw(4, 6).requires_grad_()
    for power in (None, 3):  # without a power, what comes in from behind is a constant
        weight, turn = draw(4, 9), draw(4, 6)
        y = layers[0](x) * 2 + layers[1](x)
        expected = linears[0](x) * 2 + linears[1](x)
        (true,) = torch.autograd.grad((raised(expected, power) * weight).sum(), x, create_graph=True)
        seconds = torch.autograd.grad((true * turn).sum(), [linear.weight for linear in linears], retain_graph=True)
        loss = (raised(y, power) * part(weight, -1, mine)).sum()
        torch.autograd.grad(loss, x, retain_graph=True)  # leaves nothing behind
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        found = torch.autograd.grad((grad * turn).sum(), [layer.weight for layer in layers], retain_graph=True)
        for a, b in zip(found, seconds, strict=True):
            assert_equal(a, part(b, 0, mine), what=f"power {power}")
        # A penalty on the gradient, with the loss itself.
        found = torch.autograd.grad((grad * turn).sum() + loss, [layer.weight for layer in layers])
        total = (true * turn).sum() + (raised(expected, power) * weight).sum()
        seconds = torch.autograd.grad(total, [linear.weight for linear in linears])
        for a, b in zip(found, seconds, strict=True):
            assert_equal(a, part(b, 0, mine), what=f"power {power}, with the loss")


def partly_trained() -> None:
    """Frozen weights, frozen biases, an adapter on one sibling, copies of heads, retained graphs, accumulation."""
    comm = world()
    split = Split.kv_heads(6, 2, comm.size, width=2)
    for frozen in ("", "weight", "bias", "both"):
        linears = [nn.Linear(6, 4, dtype=F64) for _ in range(2)]
        entry = RegionInput(comm, 2)
        layers = [ColumnParallelLinear.from_linear(linear, comm, split, entry=entry) for linear in linears]
        if not split.is_partition:
            for layer in layers:
                for parameter in layer.linear.parameters():
                    sum_shared_gradient(parameter, comm, 0, split)
        for layer, linear in zip(layers, linears, strict=True):
            for module in (layer.linear, linear):
                module.weight.requires_grad_(frozen not in ("weight", "both"))
                module.bias.requires_grad_(frozen not in ("bias", "both"))
        x, weights = draw(2, 3, 6).requires_grad_(), draw(comm.size, 2, 3, 4)
        other = x.detach().clone().requires_grad_()
        held = torch.zeros(comm.size, 1, 1, 4, dtype=F64)
        for rank in range(comm.size):
            for a, b in split.ranges(rank):
                held[rank, ..., a:b] = 1
        for turn in range(2):
            y = (layers[0](x) * layers[1](x) * part(weights[comm.rank], -1, split.ranges(comm.rank))).sum()
            expected = (linears[0](other) * linears[1](other) * (weights * held).sum(0)).sum()
            for retain in (True, False):
                y.backward(retain_graph=retain)
                expected.backward(retain_graph=retain)
            what = f"frozen {frozen}, turn {turn}"
            assert_equal(x.grad, other.grad, what=what)
            for layer, linear in zip(layers, linears, strict=True):
                for name in ("weight", "bias"):
                    found, true = getattr(layer, name).grad, getattr(linear, name).grad
                    assert (found is None) == (true is None), f"{what}: {name}"
                    if true is not None:
                        assert_equal(found, part(true, 0, split.ranges(comm.rank)), what=f"{what}: {name}")
    linears = [nn.Linear(6, 9, dtype=F64) for _ in range(2)]
    entry = RegionInput(comm, 2)
    layers = [ColumnParallelLinear.from_linear(linear, comm, entry=entry) for linear in linears]
    layers[1].linear = LoraLinear(layers[1].linear, 2)
    x = draw(4, 6).requires_grad_()
    (grad,) = torch.autograd.grad(((layers[0](x) + layers[1](x)) ** 2).sum(), x)
    (true,) = torch.autograd.grad(((linears[0](x) + linears[1](x)) ** 2).sum(), x)
    assert layers[0].split.is_partition
    assert_equal(grad, true)


def hooks_see_what_they_should() -> None:
    """A hook on an inner layer is called, and what it keeps is not changed behind its back."""
    comm = world()
    up, down = nn.Linear(6, 9, dtype=F64), nn.Linear(9, 6, dtype=F64)
    column, row = ColumnParallelLinear.from_linear(up, comm), RowParallelLinear.from_linear(down, comm)
    kept: list[Tensor] = []
    for layer in (column, row):
        layer.linear.register_forward_hook(lambda module, args, output: kept.append(output))
    x = draw(4, 6).requires_grad_()
    y = row(column(x))
    assert_equal(y, down(up(x)))
    assert_equal(kept[0], part(up(x), -1, column.split.ranges(comm.rank)))
    mine = kept[0] @ row.weight.T
    assert_equal(kept[1], mine, what="the row layer's own part")
    y.sum().backward()
    with torch.no_grad():
        kept.clear()
        row(column(x))
    assert_equal(kept[1], mine, what="the row layer's own part without gradients")
    # A forward that was put in the place of the class's is the one that is called.
    column, row = ColumnParallelLinear.from_linear(up, comm), RowParallelLinear.from_linear(down, comm)
    for layer in (column, row):
        layer.linear.forward = lambda x, linear=layer.linear: 2 * F.linear(x, linear.weight, linear.bias)  # type: ignore[method-assign, union-attr]
    assert_equal(row(column(x)), down(4 * up(x)))  # the bias is added once, outside
    with nn.modules.module.register_module_forward_hook(lambda module, args, output: kept.append(output)):
        kept.clear()
        ColumnParallelLinear.from_linear(up, comm)(x)
    assert len(kept) == 2  # the inner layer's, and the split layer's


def overlapped(check: str) -> None:
    before = region.OVERLAP_MACS
    region.OVERLAP_MACS = 0
    try:
        globals()[check]()
    finally:
        region.OVERLAP_MACS = before


CHECKS: dict[str, Callable[[], Any]] = {
    check.__name__: check
    for check in (
        shared_entry, checkpointed, second_order, partly_trained, hooks_see_what_they_should, columns, made_of_layers,
        swapped_layers, without_gradients, seed_example,
    )
}  # fmt: skip


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("check", CHECKS)
def test_overlap_changes_nothing(check: str, size: int) -> None:
    ranks(size).run(overlapped, check)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "check", [shared_entry, checkpointed, second_order, partly_trained, hooks_see_what_they_should]
)
def test_siblings_enter_their_region_once(check: Callable[[], None], size: int) -> None:
    ranks(size).run(check)


def it_overlaps() -> None:
    """The sum is under way while weight gradients are computed."""
    events: list[str] = []

    class Noting(Communicator):
        def start_all_reduce_(self, tensor: Tensor) -> Any:
            events.append("start")
            work = super().start_all_reduce_(tensor)

            class Waited:
                def wait(self) -> None:
                    events.append("wait")
                    work.wait()

            return Waited()

    comm = Noting()
    entry = RegionInput(comm, 2)
    layers = [ColumnParallelLinear.from_linear(nn.Linear(6, 9), comm, entry=entry) for _ in range(2)]
    for i, layer in enumerate(layers):
        layer.weight.register_hook(lambda grad, i=i: events.append(f"dW{i}"))
    x = torch.ones(4, 6, requires_grad=True)
    (layers[0](x) + layers[1](x)).sum().backward()
    assert events[0] == "start", events
    assert events[-1] == "wait", events
    assert sorted(events[1:-1]) == ["dW0", "dW1"], events


def overlaps_in_order() -> None:
    before = region.OVERLAP_MACS
    region.OVERLAP_MACS = 0
    try:
        it_overlaps()
    finally:
        region.OVERLAP_MACS = before


def test_the_sum_is_under_way_while_weight_gradients_are_computed() -> None:
    ranks(2).run(overlaps_in_order)
