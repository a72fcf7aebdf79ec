"""Tensors that a group's backend cannot reach travel through CPU memory, with the results of a direct exchange."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from partita.torch.collectives import cpu_memory, groups
from partita.torch.collectives.comm import Communicator
from tests.support.ranks import ranks


def _collectives() -> None:
    comm = Communicator()
    mine = torch.arange(12.0, dtype=torch.float64).view(3, 4).t() + 100 * comm.rank  # not contiguous
    sizes = (1, 3) if comm.size == 2 else (2, 1, 1)
    part = mine[: sizes[comm.rank]]
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        assert torch.equal(cpu_memory.all_reduce_(comm, mine.clone(), op), comm.all_reduce_(mine.clone(), op))
    assert torch.equal(cpu_memory.all_gather(comm, mine, 1, None), comm.all_gather(mine, 1))
    assert torch.equal(cpu_memory.all_gather(comm, part, 0, sizes), comm.all_gather(part, 0, sizes))
    assert torch.equal(cpu_memory.reduce_scatter(comm, mine, 0, sizes), comm.reduce_scatter(mine, 0, sizes))
    for source in range(comm.size):
        got = mine.clone()
        assert cpu_memory.broadcast_(comm, got, source) is got
        assert torch.equal(got, torch.arange(12.0, dtype=torch.float64).view(3, 4).t() + 100 * source)


def _transfers() -> None:
    comm = Communicator()
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    mine, theirs = torch.full((5, 2), float(comm.rank)), torch.empty(2, 5).t()
    received = cpu_memory.start_recv_(comm, theirs, left, 3)
    sent = cpu_memory.start_send(comm, mine, right, 3)
    mine.fill_(-1.0)  # the message is a copy already
    received.wait()
    sent.wait()
    assert sent.is_completed()  # type: ignore[attr-defined]
    assert torch.equal(theirs, torch.full((5, 2), float(left)))
    if comm.rank == 0:
        cpu_memory.send(comm, torch.tensor([7, 8]).to(torch.bfloat16), right)
    elif comm.rank == 1:
        got = torch.zeros(2, dtype=torch.bfloat16)
        assert cpu_memory.recv_(comm, got, 0) is got
        assert got.tolist() == [7, 8]


@pytest.mark.parametrize("size", [2, 3])
def test_results_are_those_of_a_direct_exchange(size: int) -> None:
    ranks(size).run(_collectives)
    ranks(size).run(_transfers)


def _which() -> list[bool]:
    comm = Communicator()
    return [comm._is_staged(torch.empty(1, device=device)) for device in ("cpu", "meta")]


def test_only_what_the_backend_cannot_reach_is_staged() -> None:
    assert ranks(2).run(_which) == [[False, True]] * 2
    assert not Communicator.single()._is_staged(torch.empty(1, device="meta"))


@pytest.mark.parametrize(
    ("gpus", "ranks_here", "own"), [(0, "1", False), (1, "1", True), (1, "2", False), (2, "2", True)]
)
def test_nccl_needs_a_gpu_for_each_rank(gpus: int, ranks_here: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    assert groups.has_own_gpu() is own
