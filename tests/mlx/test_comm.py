"""What the communicator does, on real ranks over each backend."""

from __future__ import annotations

import threading
from collections.abc import Callable

import mlx.core as mx
import pytest

from partita.errors import DistributedError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.mappings import copy_to, reduce_from
from tests.mlx.compare import assert_equal, world
from tests.support.compiling import compiling
from tests.support.mlx_ranks import BACKENDS, RankError, mlx_ranks

NUMBERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "bfloat16", "float32",
           "float64", "complex64"]  # fmt: skip

everywhere = pytest.mark.parametrize("backend", BACKENDS)


# --- sums and maxima -----------------------------------------------------------------------------------------------------


def sums(dtype: str, size: int) -> None:
    comm = world()
    kind = getattr(mx, dtype)
    values = [(mx.arange(size) % 7 + rank).astype(kind) for rank in range(comm.size)]
    total = comm.all_sum(values[comm.rank])
    assert_equal(
        total.astype(mx.float32), sum(v.astype(mx.float32) for v in values), 0, "small whole numbers are exact"
    )
    assert total.dtype == kind


@everywhere
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_all_sum_of_every_number(backend: str, ranks: int, dtype: str) -> None:
    for size in (1, 7, 4099):
        mlx_ranks(ranks, backend).run(sums, dtype, size)


def sum_of_halves(dtype: str, in_float32: bool) -> None:
    comm = world(reduce_in_float32=in_float32)
    kind = getattr(mx, dtype)
    values = [mx.random.normal((3, 1000)).astype(kind) for _ in range(comm.size)]
    exact = sum(v.astype(mx.float64) for v in values)
    # One rounding a sum: half a unit of the last of 11 (or 8) bits, of sums up to 4 ranks.
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    roundings = 1 if in_float32 else comm.size - 1
    total = comm.all_sum(values[comm.rank])
    assert_equal(total.astype(mx.float64), exact, 1.01 * unit * roundings)
    if in_float32:
        assert_equal(total, sum(v.astype(mx.float32) for v in values).astype(kind), 0, "rounded once")


@everywhere
@pytest.mark.parametrize("in_float32", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_of_halves_are_right_in_value(backend: str, dtype: str, in_float32: bool) -> None:
    for ranks in (2, 3):
        mlx_ranks(ranks, backend).run(sum_of_halves, dtype, in_float32)


def sum_bits(size: int) -> list[int]:
    comm = world()
    mx.random.seed(comm.rank)
    return comm.all_sum(mx.random.normal((size,))).view(mx.uint32).tolist()  # type: ignore[return-value]


@everywhere
@pytest.mark.parametrize("ranks", [3, 4])
def test_every_rank_has_the_same_bits(backend: str, ranks: int) -> None:
    for size in (5, 3001, 70_000):
        answers = mlx_ranks(ranks, backend).run(sum_bits, size)
        assert all(answer == answers[0] for answer in answers)


def booleans() -> None:
    comm = world()
    mine = mx.array([True, comm.rank == 0, False])
    count = comm.all_sum(mine)
    assert count.dtype == mx.int32
    assert count.tolist() == [comm.size, 1, 0]
    any_of = comm.all_max(mine)
    assert any_of.dtype == mx.bool_
    assert any_of.tolist() == [True, True, False]
    assert comm.all_gather(mine[1:2]).tolist() == [True] + [False] * (comm.size - 1)


@everywhere
def test_booleans_are_counted_and_not_fatal(backend: str) -> None:
    mlx_ranks(2, backend).run(booleans)


def maxima(dtype: str) -> None:
    comm = world()
    mine = (mx.arange(5) * (comm.rank + 1) - 4).astype(getattr(mx, dtype))
    expected = mx.maximum(mx.arange(5) * comm.size - 4, mx.arange(5) - 4).astype(mine.dtype)
    assert_equal(comm.all_max(mine), expected, 0)


@everywhere
@pytest.mark.parametrize("dtype", ["int32", "float16", "bfloat16", "float32", "float64"])
def test_all_max(backend: str, dtype: str) -> None:
    mlx_ranks(3, backend).run(maxima, dtype)


def maximum_of_complex() -> str:
    with pytest.raises(DistributedError) as raised:
        world().all_max(mx.array([1j]))
    return str(raised.value)


def test_complex_numbers_have_no_maximum() -> None:
    assert "real numbers" in mlx_ranks(2).run(maximum_of_complex)[0]


# --- gathering and scattering ----------------------------------------------------------------------------------------------


def gathers(axis: int, sizes: list[int] | None) -> None:
    comm = world()
    counts = sizes or [2] * comm.size
    shape = [3, 4, 5]
    shape[axis] = sum(counts)
    whole = mx.random.normal(shape)
    starts = [sum(counts[:r]) for r in range(comm.size)]
    mine = mx.take(whole, mx.arange(starts[comm.rank], starts[comm.rank] + counts[comm.rank]), axis)
    assert_equal(comm.all_gather(mine, axis, sizes), whole, 0)


@everywhere
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("sizes", [None, [3, 1, 2], [0, 4, 1], [2, 2, 2]])
def test_all_gather_along_any_axis_of_any_sizes(backend: str, axis: int, sizes: list[int] | None) -> None:
    mlx_ranks(3, backend).run(gathers, axis, sizes)


def gathers_numbers() -> None:
    comm = world()
    assert comm.all_gather(mx.array(float(comm.rank))).tolist() == [float(r) for r in range(comm.size)]
    assert comm.all_gather(mx.zeros((0, 3))).shape == (0, 3)


def test_all_gather_of_numbers_and_of_nothing() -> None:
    mlx_ranks(3).run(gathers_numbers)


def scatters(axis: int, sizes: list[int] | None) -> None:
    comm = world()
    counts = sizes or [2] * comm.size
    shape = [3, 4, 5]
    shape[axis] = sum(counts)
    values = [mx.random.normal(shape).astype(mx.float64) for _ in range(comm.size)]
    start = sum(counts[: comm.rank])
    expected = mx.take(sum(values), mx.arange(start, start + counts[comm.rank]), axis)
    assert_equal(comm.reduce_scatter(values[comm.rank], axis, sizes), expected)


@everywhere
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("sizes", [None, [3, 1, 2], [0, 4, 1]])
def test_reduce_scatter_along_any_axis_of_any_sizes(backend: str, axis: int, sizes: list[int] | None) -> None:
    mlx_ranks(3, backend).run(scatters, axis, sizes)


def wrong_sizes() -> list[str]:
    comm, said = world(), []
    for call in (
        lambda: comm.all_gather(mx.zeros(2), sizes=[1, 1]),
        lambda: comm.reduce_scatter(mx.zeros(3)),
        lambda: comm.reduce_scatter(mx.zeros(4), sizes=[1, 2]),
    ):
        with pytest.raises(DistributedError) as raised:
            call()
        said.append(str(raised.value))
    return said


def test_wrong_sizes_are_refused_before_anything_is_sent() -> None:
    assert mlx_ranks(2).run(wrong_sizes)[1] == [
        "sizes must be 2 numbers, and rank 1's 2 (axis 0), but are (1, 1).",
        "3 cannot be split evenly over 2 ranks. Pass `sizes`, one per rank.",
        "sizes must be 2 numbers that add up to 4 (axis 0), but are (1, 2).",
    ]


# --- from one to all, and from one to another ------------------------------------------------------------------------------


def broadcasts(dtype: str) -> None:
    comm = world()
    kind = getattr(mx, dtype)
    for source in range(comm.size):
        mine = mx.array([0.0, -0.0, 1.5, comm.rank - source]).astype(kind)
        expected = mx.array([0.0, -0.0, 1.5, 0.0]).astype(kind)
        given = comm.broadcast(mine, source)
        assert_equal(given, expected, 0)
        if dtype == "float32":
            assert given.view(mx.uint32).tolist() == expected.view(mx.uint32).tolist(), "minus zero stays what it is"
    assert mx.isnan(comm.broadcast(mx.array([float("nan"), 1.0]))).tolist() == [True, False]


@everywhere
@pytest.mark.parametrize("dtype", ["bool_", "int8", "int64", "bfloat16", "float32", "float64", "complex64"])
def test_broadcast_is_exact(backend: str, dtype: str) -> None:
    mlx_ranks(3, backend).run(broadcasts, dtype)


def passes_round(dtype: str) -> None:
    comm = world()
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    mine = (mx.arange(1000) + comm.rank).astype(getattr(mx, dtype))
    for _ in range(3):
        if comm.rank % 2 == 0:
            comm.send(mine, right)
            got = comm.recv((1000,), mine.dtype, left)
        else:
            got = comm.recv((1000,), mine.dtype, left)
            comm.send(mine, right)
        assert_equal(got, (mx.arange(1000) + left).astype(mine.dtype), 0)


@everywhere
@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "float32", "float64"])
def test_send_and_receive(backend: str, dtype: str) -> None:
    for ranks in (2, 4):
        mlx_ranks(ranks, backend).run(passes_round, dtype)


def send_across() -> str | None:
    comm = world()
    if comm.rank == 0:
        with pytest.raises(DistributedError) as raised:
            comm.send(mx.zeros(1), 2)
        return str(raised.value)
    return None


def test_a_ring_reaches_neighbours_only() -> None:
    assert mlx_ranks(4, "ring").run(send_across)[0] == (
        "rank 0 of 4 cannot send to rank 2: the ring backend reaches only the neighbours [1, 3]. Use the mpi backend."
    )


def send_to_nobody() -> list[str]:
    comm, said = world(), []
    for other in (comm.rank, 2, -1):
        with pytest.raises(DistributedError) as raised:
            comm.recv((1,), mx.float32, other)
        said.append(str(raised.value))
    return said


def test_there_is_no_other_rank() -> None:
    said = mlx_ranks(2).run(send_to_nobody)[1]
    assert said[0] == "rank 1 of 2 cannot receive from rank 1: it is not another rank of the group."
    assert "rank 2" in said[1]
    assert "rank -1" in said[2]


# --- objects -----------------------------------------------------------------------------------------------------------------


def objects() -> tuple[object, object, list[object]]:
    comm = world()
    return (
        comm.broadcast_object({"from": comm.rank, "text": "häß"}, source=comm.size - 1),
        comm.broadcast_object(b"\0\xff" * (comm.rank + 1)),
        comm.all_gather_object("x" * comm.rank),
    )


@everywhere
def test_objects(backend: str) -> None:
    for given, raw, gathered in mlx_ranks(3, backend).run(objects):
        assert given == {"from": 2, "text": "häß"}
        assert raw == b"\0\xff"
        assert gathered == ["", "x", "xx"]


def unspeakable() -> str:
    comm = world()
    with pytest.raises(DistributedError) as raised:
        comm.all_gather_object({1, 2} if comm.rank == 1 else "fine")
    return str(raised.value)


def test_what_cannot_be_said_is_an_error_on_every_rank() -> None:
    first, second = mlx_ranks(2).run(unspeakable)
    assert first.startswith("rank 1's value")
    assert "set is not JSON serializable" in second


# --- ranks that disagree ----------------------------------------------------------------------------------------------------


def disagree(what: str) -> str:
    comm = world(checked=True)
    calls = {
        "shape": lambda: comm.all_sum(mx.zeros((4, 3 + comm.rank))),
        "dtype": lambda: comm.all_sum(mx.zeros(4, mx.float16 if comm.rank else mx.float32)),
        "operation": lambda: comm.all_sum(mx.zeros(4)) if comm.rank else comm.all_gather(mx.zeros(4)),
        "sizes": lambda: comm.all_gather(mx.zeros(2), sizes=(2, 2) if comm.rank else (2, 3)),
        "source": lambda: comm.broadcast(mx.zeros(2), source=comm.rank),
    }
    assert comm.all_sum(mx.ones(2)).tolist() == [comm.size] * 2, "those that agree are served"
    with pytest.raises(DistributedError) as raised:
        calls[what]()
    assert comm.all_gather(mx.array([comm.rank])).tolist() == list(range(comm.size)), "and are in step again"
    return str(raised.value)


@everywhere
@pytest.mark.parametrize(
    ("what", "calls"),
    [
        ("shape", ("all_sum of [4, 3] float32", "all_sum of [4, 4] float32")),
        ("dtype", ("all_sum of [4] float32", "all_sum of [4] float16")),
        ("operation", ("all_gather of [any] float32 with (4, 4)", "all_sum of [4] float32")),
        ("sizes", ("all_gather of [any] float32 with (2, 3)", "all_gather of [any] float32 with (2, 2)")),
        ("source", ("broadcast of [2] float32 with (0,)", "broadcast of [2] float32 with (1,)")),
    ],
)
def test_checked_ranks_that_disagree_are_told_both_sides(backend: str, what: str, calls: tuple[str, str]) -> None:
    for said in mlx_ranks(2, backend).run(disagree, what):
        assert f"rank 0 calls {calls[0]} as number" in said
        assert f"rank 1 calls {calls[1]} as number" in said


def receive_what_is_not_sent() -> str | None:
    comm = world(checked=True)
    if comm.rank == 0:
        comm.send(mx.zeros(3), 1)
        comm.send(mx.ones(4), 1)
        return None
    with pytest.raises(DistributedError) as raised:
        comm.recv((4,), mx.float32, 0)
    # What was announced still lies in the line.
    assert Communicator.recv(comm, (3,), mx.float32, 0).tolist() == [0.0] * 3
    assert comm.recv((4,), mx.float32, 0).tolist() == [1.0] * 4
    return str(raised.value)


@everywhere
def test_a_checked_receiver_is_told_what_is_sent_instead(backend: str) -> None:
    assert mlx_ranks(2, backend).run(receive_what_is_not_sent)[1] == (
        "rank 1 waits for a send of [4] float32 from rank 0, which calls send of [3] float32."
    )


def compiled() -> str:
    comm = world(checked=True)
    with compiling(), pytest.raises(DistributedError) as raised:
        mx.compile(comm.all_sum)(mx.ones(2))
    return str(raised.value)


def test_a_checked_communicator_says_that_it_cannot_be_compiled() -> None:
    assert all("mx.compile" in said for said in mlx_ranks(2).run(compiled))


# --- groups of some of the ranks ---------------------------------------------------------------------------------------------


def splits() -> tuple[int, int, list[int], list[int]]:
    comm = world()
    pairs = comm.split(comm.rank // 2)
    turned = comm.split(comm.rank % 2, key=comm.size - comm.rank)
    nested = pairs.split(pairs.rank)
    assert nested.size == 1
    mine = mx.array([comm.rank])
    return pairs.rank, pairs.size, pairs.all_gather(mine).tolist(), turned.all_gather(mine).tolist()  # type: ignore[return-value]


@pytest.mark.skipif("mpi" not in BACKENDS, reason="only MPI's groups can be split")
def test_split() -> None:
    assert mlx_ranks(4, "mpi").run(splits) == [
        (0, 2, [0, 1], [2, 0]),
        (1, 2, [0, 1], [3, 1]),
        (0, 2, [2, 3], [2, 0]),
        (1, 2, [2, 3], [3, 1]),
    ]


def split_ring() -> str:
    with pytest.raises(DistributedError) as raised:
        world().split(0)
    return str(raised.value)


def test_a_ring_cannot_be_split() -> None:
    assert "the ring backend cannot split a group" in mlx_ranks(2, "ring").run(split_ring)[0]


def from_another_thread() -> str:
    comm, said = world(), []

    def communicate() -> None:
        try:
            mx.eval(comm.all_sum(mx.ones(3)))
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=communicate)
    thread.start()
    thread.join()
    return said[0]


def test_a_second_thread_cannot_communicate_at_the_same_time() -> None:
    assert all("Stream" in said for said in mlx_ranks(2).run(from_another_thread))


# --- one rank alone ----------------------------------------------------------------------------------------------------------


def test_one_rank_alone() -> None:
    comm = Communicator.single()
    x = mx.arange(6).reshape(2, 3)
    assert (comm.rank, comm.size) == (0, 1)
    for result in (comm.all_sum(x), comm.all_max(x), comm.all_gather(x, 1), comm.reduce_scatter(x), comm.broadcast(x)):
        assert mx.array_equal(result, x)
    assert comm.all_sum(mx.array([True, False])).tolist() == [1, 0]
    assert comm.all_gather_object((1, "a")) == [[1, "a"]]
    assert comm.split(3) is comm
    comm.barrier()


def fails_on_one(rank: int) -> None:
    if world().rank == rank:
        raise ValueError("this rank has had enough")


def test_the_pool_says_which_rank_raised() -> None:
    with pytest.raises(RankError, match=r"rank 1: (.|\n)*this rank has had enough"):
        mlx_ranks(2).run(fails_on_one, 1)


# --- the order of collectives -------------------------------------------------------------------------------------------------


def graphs_that_differ(steps: int) -> None:
    """Two sums that do not depend on each other, on ranks whose graphs are of different depths.

    Left to MLX, which evaluates breadth first, one rank would add its first array to the other's second.
    """
    comm = world()
    first, second = mx.ones(4), mx.full(4, 10.0)
    for _ in range(steps if comm.rank == 1 else 0):
        first = -first
    one = comm.all_sum(first)
    for _ in range(steps if comm.rank == 0 else 0):
        one = -one
    two = comm.all_sum(second)
    mx.eval(one + two)
    assert one.tolist() == [float(comm.size)] * 4
    assert two.tolist() == [10.0 * comm.size] * 4


def gradients_that_differ(steps: int) -> None:
    comm = world()

    def loss(x: mx.array, y: mx.array) -> mx.array:
        x, y = copy_to(x, comm), copy_to(y, comm)
        for _ in range(steps if comm.rank == 1 else 0):
            x = -x
        for _ in range(steps if comm.rank == 0 else 0):
            y = -y
        return (reduce_from(x, comm) * reduce_from(y, comm)).sum()

    grads = mx.grad(loss, argnums=(0, 1))(mx.ones(4), mx.full(4, 10.0))
    mx.eval(grads[0] + grads[1])
    assert grads[0].tolist() == [10.0 * comm.size**2] * 4
    assert grads[1].tolist() == [1.0 * comm.size**2] * 4


@everywhere
@pytest.mark.parametrize("function", [graphs_that_differ, gradients_that_differ])
def test_collectives_keep_the_order_of_their_calls(backend: str, function: Callable[[int], None]) -> None:
    for steps in (2, 4, 30):
        mlx_ranks(2, backend).run(function, steps)


def one_looks_away() -> list[float]:
    comm = world()
    total = comm.all_sum(mx.array([1.0 + comm.rank]))
    other = comm.all_sum(mx.array([10.0]))
    return other.tolist() if comm.rank else total.tolist()  # type: ignore[return-value]


@everywhere
def test_a_rank_need_not_look_at_a_result(backend: str) -> None:
    assert mlx_ranks(2, backend).run(one_looks_away) == [[3.0], [20.0]]
