"""The communicator on real ranks: every collective against what it says, uneven sizes included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from partita.core.sharding.split import Split
from partita.errors import DistributedError
from partita.torch.collectives.comm import EXCHANGE_BYTES, Communicator
from tests.support.compare import assert_equal
from tests.support.ranks import RankError, ranks
from tests.torch.test_mappings import row_tables

SIZES = pytest.mark.parametrize("size", [2, 3, 4])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def draw(*shape: int) -> Tensor:
    """The same on every rank, as all are seeded alike."""
    return torch.randn(*shape, dtype=torch.float64)


def size_lists(size: int, parts: int) -> list[tuple[int, ...] | None]:
    """Even, first ranks first, last rank most, a rank with nothing, one rank with all."""
    return [
        None,
        Split.even(size + 1, parts).local_sizes,
        (1,) * (parts - 1) + (size,),
        (*Split.even(size, parts - 1).local_sizes, 0),
        (size,) + (0,) * (parts - 1),
    ]


# --- gather and scatter -------------------------------------------------------------------------------------------------


def gather_uneven() -> None:
    comm = Communicator()
    for sizes in size_lists(6, comm.size):
        for dtype in DTYPES:
            for dim in (0, 1, -1, -3):
                shapes = [[3, 4, 2] for _ in range(comm.size)]
                for shape, n in zip(shapes, sizes or (4,) * comm.size, strict=True):
                    shape[dim] = n
                parts = [draw(*shape).mul(9).to(dtype) for shape in shapes]
                mine = parts[comm.rank].clone()
                whole = comm.all_gather(mine, dim, sizes)
                assert torch.equal(whole, torch.cat(parts, dim)), (sizes, dtype, dim)
                # Nothing that is sent may be changed, nor may the result share its memory.
                whole.zero_()
                assert torch.equal(mine, parts[comm.rank])
                swapped = mine.transpose(0, 2).contiguous().transpose(0, 2)
                assert torch.equal(comm.all_gather(swapped, dim, sizes), torch.cat(parts, dim))
    assert torch.equal(comm.all_gather(torch.tensor([comm.rank])), torch.arange(comm.size))


@SIZES
def test_all_gather(size: int) -> None:
    ranks(size).run(gather_uneven)


def scatter_uneven() -> None:
    comm = Communicator()
    for sizes in size_lists(2 * comm.size, comm.size):
        for dtype in (torch.float64, torch.float32, torch.int64):
            for dim in (0, 1, -1):
                shape = [3, 2, 4]
                shape[dim] = sum(sizes) if sizes is not None else 2 * comm.size
                every = [draw(*shape).mul(9).to(dtype) for _ in range(comm.size)]
                mine = every[comm.rank].clone()
                part = comm.reduce_scatter(mine, dim, sizes)
                total = torch.stack(every).sum(0).split(sizes or 2, dim)[comm.rank]
                # float32: sums of four numbers in another order
                assert_equal(part, total, 1e-12 if dtype != torch.float32 else 1e-6, f"{sizes}, {dtype}, {dim}")
                assert torch.equal(mine, every[comm.rank]), "the input was changed"


@SIZES
def test_reduce_scatter(size: int) -> None:
    ranks(size).run(scatter_uneven)


def exchange_rows() -> None:
    comm = Communicator()
    for table in row_tables(comm.size):
        received = [row[comm.rank] for row in table]
        for dtype in (torch.float64, torch.bfloat16, torch.int64):
            for shape in ((3, 2), ()):
                every = [draw(sum(rows), *shape).mul(9).to(dtype) for rows in table]
                found = comm.all_to_all(every[comm.rank], table[comm.rank], received)
                sent = [x.split(rows)[comm.rank] for x, rows in zip(every, table, strict=True)]
                assert found.dtype == dtype
                assert torch.equal(found, torch.cat(sent)), f"{table}, {dtype}, {shape}"


@SIZES
def test_all_to_all(size: int) -> None:
    ranks(size).run(exchange_rows)


def scatter_odd() -> None:
    Communicator().reduce_scatter(draw(5, 2))


def test_reduce_scatter_needs_sizes_where_parts_differ() -> None:
    with pytest.raises(RankError, match=r"5 cannot be split evenly over 2 ranks. Pass `sizes`, one per rank"):
        ranks(2).run(scatter_odd)


# --- the unsplit tensor of a split --------------------------------------------------------------------------------------


def splits(parts: int) -> list[Split]:
    by_hand = {
        2: (((6, 8), (0, 2)), ((2, 6),)),
        3: (((5, 8),), ((0, 2),), ((1, 5),)),
        4: (((6, 8),), ((4, 6),), ((2, 4),), ((0, 2),)),
    }[parts]
    return [
        Split.even(9, parts),
        Split.even(12, parts, segments=(5, 7)),
        Split.even(2, parts, allow_empty=True),
        Split.heads(14, 2, parts, width=2),
        Split.kv_heads(14, 2, parts, width=3),  # held by several ranks
        Split.concat([Split.heads(6, 2, parts), Split.kv_heads(6, 2, parts), Split.kv_heads(6, 2, parts)]),
        Split.replicated(3, parts),
        Split(8, by_hand),  # not in the order of the ranks
    ]


def gather_splits() -> None:
    comm = Communicator()
    for split in splits(comm.size):
        for dim in (0, 1, -1, -2):
            shape = [3, 4]
            shape[dim] = split.size
            whole = draw(*shape)
            pieces = [whole.narrow(dim, a, b - a) for a, b in split.ranges(comm.rank)]
            mine = torch.cat(pieces, dim) if pieces else whole.narrow(dim, 0, 0)
            assert torch.equal(comm.gather_split(mine, dim, split), whole), (split, dim)


@SIZES
def test_gather_split_restores_the_unsplit_tensor(size: int) -> None:
    ranks(size).run(gather_splits)


# --- the others ---------------------------------------------------------------------------------------------------------


def reduce_and_broadcast() -> None:
    comm = Communicator()
    values = [draw(3, 4) for _ in range(comm.size)]
    total = torch.stack(values).sum(0)
    for op, expected in (
        (dist.ReduceOp.SUM, total),
        (dist.ReduceOp.AVG, total / comm.size),
        (dist.ReduceOp.MAX, torch.stack(values).amax(0)),
        (dist.ReduceOp.MIN, torch.stack(values).amin(0)),
    ):
        mine = values[comm.rank].clone()
        assert comm.all_reduce_(mine, op) is mine
        assert_equal(mine, expected, what=str(op))
    mine = values[comm.rank].clone()
    comm.start_all_reduce_(mine).wait()
    assert_equal(mine, total)
    for source in range(comm.size):
        mine = values[comm.rank].clone()
        assert comm.broadcast_(mine, source) is mine
        assert torch.equal(mine, values[source])
        assert comm.broadcast_object({"rank": comm.rank}, source) == {"rank": source}
    assert comm.all_gather_object(("rank", comm.rank)) == [("rank", r) for r in range(comm.size)]
    comm.barrier()


@SIZES
def test_reductions_and_broadcasts(size: int) -> None:
    ranks(size).run(reduce_and_broadcast)


def ring() -> None:
    comm = Communicator()
    values = [draw(4, 3).t() for _ in range(comm.size)]  # not contiguous
    here, ahead, behind = comm.rank, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    received = torch.empty(3, 4, dtype=torch.float64)
    if here % 2 == 0:
        comm.send(values[here], ahead)
    assert comm.recv_(received, behind) is received
    if here % 2:
        comm.send(values[here], ahead)
    assert torch.equal(received, values[behind])


@SIZES
def test_send_and_receive_round_a_ring(size: int) -> None:
    ranks(size).run(ring)


def large_messages() -> None:
    """On both sides of the size up to which two ranks exchange what they have by themselves."""
    comm = Communicator()
    for numbers in (EXCHANGE_BYTES // 8, EXCHANGE_BYTES // 8 + 1):
        values = [draw(numbers) for _ in range(comm.size)]
        mine = values[comm.rank].clone()
        assert_equal(comm.all_reduce_(mine), torch.stack(values).sum(0))
        # Every rank has the same sum to the last bit: nothing else would keep replicas together.
        assert all(torch.equal(mine, other) for other in comm.all_gather(mine.unsqueeze(0), 0))
        assert torch.equal(comm.all_gather(values[comm.rank]), torch.cat(values))


@SIZES
def test_large_messages(size: int) -> None:
    ranks(size).run(large_messages)


def sub_group() -> None:
    world = Communicator()
    members = [1, world.size - 1]
    group = dist.new_group(members)
    if world.rank not in members:
        with pytest.raises(DistributedError, match=f"rank {world.rank} is not in this group"):
            Communicator(group)
        return
    comm = Communicator(group)
    # Ranks are those of the group, wherever they stand in the run.
    assert (comm.rank, comm.size, comm.global_ranks) == (members.index(world.rank), 2, tuple(members))
    assert comm.all_gather(torch.tensor([world.rank])).tolist() == members
    assert comm.broadcast_(torch.tensor([world.rank]), 1).item() == members[1]
    assert comm.broadcast_object(world.rank, 0) == members[0]
    if comm.rank == 0:
        comm.send(torch.tensor([7]), 1)
    else:
        assert comm.recv_(torch.tensor([0]), 0).item() == 7
    assert repr(comm) == f"Communicator(rank {comm.rank} of 2, global ranks {members})"


@pytest.mark.parametrize("size", [3, 4])
def test_ranks_of_a_sub_group(size: int) -> None:
    ranks(size).run(sub_group)


def test_one_rank_alone() -> None:
    comm = Communicator.single()
    assert (comm.rank, comm.size, comm.global_ranks, comm.group) == (0, 1, (0,), None)
    x = draw(3, 4)
    for result in (
        comm.all_reduce_(x), comm.all_gather(x), comm.all_gather(x, 0, (3,)), comm.reduce_scatter(x),
        comm.gather_split(x, 0, Split.even(3, 1)), comm.broadcast_(x),
    ):  # fmt: skip
        assert result is x
    comm.start_all_reduce_(x).wait()
    comm.barrier()
    assert comm.broadcast_object("x") == "x"
    assert comm.all_gather_object("x") == ["x"]
    assert comm.even_sizes(5) == (5,)


def test_without_a_process_group() -> None:
    with pytest.raises(DistributedError, match=r"torch.distributed is not initialized. Call .*init_parallelism"):
        Communicator()
