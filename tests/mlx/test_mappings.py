"""Collectives with gradients against what one process computes that holds all ranks' arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from partita.core.sharding.split import Split
from partita.errors import DistributedError
from partita.mlx.collectives import mappings
from partita.mlx.collectives.comm import Communicator
from tests.mlx.compare import assert_equal, draw, part, world
from tests.support.compiling import compiling
from tests.support.mlx_ranks import BACKENDS, mlx_ranks, on_mlx

everywhere = pytest.mark.parametrize("backend", BACKENDS)
Array = mx.array


def spread(sizes: tuple[int, ...]) -> Split:
    starts = [sum(sizes[:r]) for r in range(len(sizes))]
    return Split(sum(sizes), tuple(((a, a + n),) if n else () for a, n in zip(starts, sizes, strict=True)))


# A region: x enters it, each rank multiplies by a weight of its own and takes tanh, and what comes out leaves it. The
# reference holds all weights. Both are functions of x (whole, or this rank's part) and return a number that is the same
# on every rank, whose gradients of first and second order must agree.


def region(
    kind: str, axis: int, sizes: tuple[int, ...], comm: Communicator, w: list[Array]
) -> Callable[[Array], Array]:
    """This rank's computation: `w[r]` is the weight of rank r."""
    mine = w[comm.rank]

    def sums(x: Array) -> Array:
        return mappings.reduce_from(mx.tanh(mappings.copy_to(x, comm) * mine), comm)

    def scatters(x: Array) -> Array:
        inside = mx.tanh(mappings.scatter_to(x, comm, axis, sizes) * part(mine, axis, spread(sizes).ranges(comm.rank)))
        return mappings.gather_from(inside, comm, axis, sizes)

    def sequence(x: Array) -> Array:
        # From a shard into the region and back to a shard; then whole, to compare.
        shard = mappings.scatter_to(x, comm, axis, sizes)
        inside = mx.tanh(mappings.all_gather(shard, comm, axis, sizes) * mine)
        return mappings.gather_from(mappings.reduce_scatter(inside, comm, axis, sizes), comm, axis, sizes)

    return {"sums": sums, "scatters": scatters, "sequence": sequence}[kind]


def reference(kind: str, axis: int, sizes: tuple[int, ...], w: list[Array]) -> Callable[[Array], Array]:
    """The same by one process."""
    split = spread(sizes)

    def sums(x: Array) -> Array:
        return sum((mx.tanh(x * v) for v in w), mx.zeros_like(x))

    def scatters(x: Array) -> Array:
        parts = [mx.tanh(part(x, axis, split.ranges(r)) * part(v, axis, split.ranges(r))) for r, v in enumerate(w)]
        return mx.concatenate(parts, axis)

    return {"sums": sums, "scatters": scatters, "sequence": sums}[kind]


def compare(kind: str, axis: int, sizes: tuple[int, ...]) -> None:
    comm = world()
    shape = [3, 4, 2]
    shape[axis] = sum(sizes)
    w = [draw(*shape) for _ in range(comm.size)]
    x, scale = draw(*shape), draw(*shape)
    split, whole = region(kind, axis, sizes, comm, w), reference(kind, axis, sizes, w)

    def loss(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return lambda x: (function(x) * scale).sum() ** 2

    def second(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return lambda x: (mx.grad(loss(function))(x) * scale).sum()

    assert_equal(split(x), whole(x), what="forward")
    assert_equal(mx.grad(loss(split))(x), mx.grad(loss(whole))(x), what="gradient")
    assert_equal(mx.grad(second(split))(x), mx.grad(second(whole))(x), what="gradient of the gradient")
    assert_equal(mx.vjp(split, [x], [scale])[1][0], mx.vjp(whole, [x], [scale])[1][0], what="vjp")
    assert_equal(mx.jvp(split, [x], [scale])[1][0], mx.jvp(whole, [x], [scale])[1][0], what="jvp")
    if axis == 0 and comm.size == 2:  # each shape is a kernel
        with compiling():
            assert_equal(mx.compile(mx.grad(loss(split)))(x), mx.grad(loss(whole))(x), what="compiled gradient")
    many = mx.stack([x, x + 1])
    assert_equal(mx.vmap(split)(many), mx.stack([whole(x), whole(x + 1)]), what="vmap")


SIZES = {1: [(4,)], 2: [(2, 2), (3, 1)], 3: [(1, 1, 1), (2, 4, 1)]}


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("kind", ["sums", "scatters", "sequence"])
@pytest.mark.parametrize(
    ("ranks", "sizes"), [(ranks, sizes) for ranks, all_sizes in SIZES.items() for sizes in all_sizes]
)
def test_regions_have_the_gradients_of_one_process(kind: str, ranks: int, sizes: tuple[int, ...], axis: int) -> None:
    on_mlx(ranks, compare, kind, axis, sizes)


@pytest.mark.parametrize("kind", ["sums", "scatters", "sequence"])
def test_regions_over_a_ring(kind: str) -> None:
    mlx_ranks(3, "ring").run(compare, kind, 0, (2, 4, 1))


def shared(by_rank: tuple[Any, ...], axis: int) -> None:
    """Copies of one parameter, each used by its rank in its own way, have the gradient of the one parameter."""
    comm = world()
    split = Split(6, by_rank)
    shape = (6, 2) if axis == 0 else (2, 6)
    whole, scales = draw(*shape), [draw(*shape) for _ in range(comm.size)]

    def own(value: Array, rank: int) -> Array:
        return mx.tanh(value) * part(scales[rank], axis, split.ranges(rank))

    def mine(value: Array) -> Array:
        return mappings.reduce_from(own(mappings.copy_shared(value, comm, split, axis), comm.rank).sum(), comm) ** 2

    def one(value: Array) -> Array:
        return sum((own(part(value, axis, split.ranges(r)), r).sum() for r in range(comm.size)), mx.array(0.0)) ** 2

    held = part(whole, axis, split.ranges(comm.rank))
    assert_equal(mappings.copy_shared(held, comm, split, axis), held, 0, "forward")
    assert_equal(mx.grad(mine)(held), part(mx.grad(one)(whole), axis, split.ranges(comm.rank)), what="gradient")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "by_rank",
    [
        (((0, 3),), ((0, 3),), ((3, 6),)),
        (((0, 4),), ((2, 6),), ((4, 5), (0, 1))),
        (((0, 6),), ((0, 6),), ((0, 6),)),
        (((0, 2),), ((2, 4),), ((4, 6),)),
    ],
)
def test_copies_have_the_gradient_of_one_parameter(by_rank: tuple[Any, ...], axis: int) -> None:
    mlx_ranks(3).run(shared, by_rank, axis)


def refused() -> list[str]:
    comm, said = world(), []
    for call in (
        lambda: mappings.scatter_to(mx.zeros(5), comm),
        lambda: mappings.scatter_to(mx.zeros(5), comm, 0, (6, -1)),
        lambda: mappings.gather_from(mx.zeros(5), comm, 0, (4 + comm.rank, 5 - comm.rank) if comm.rank else (4, 5)),
    ):
        with pytest.raises(DistributedError) as raised:
            call()
        said.append(str(raised.value))
    return said


def test_wrong_sizes_are_refused() -> None:
    assert mlx_ranks(2).run(refused)[1] == [
        "5 cannot be split evenly over 2 ranks. Pass `sizes`, one per rank.",
        "sizes must be 2 numbers that add up to 5 (axis 0), but are (6, -1).",
        "sizes must be 2 numbers, and rank 1's 5 (axis 0), but are (5, 4).",
    ]
