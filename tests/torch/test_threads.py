"""Ranks as threads: the same collectives, and a failure that ends all of them."""

from __future__ import annotations

import pytest
import torch

from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.threads import run_as_threads


def _collectives(comm: Communicator) -> tuple[list[float], list[float], list[float], list[float]]:
    mine = torch.tensor([float(comm.rank), 1.0])
    begun = mine.clone()
    comm.start_all_reduce_(begun).wait()
    gathered = comm.all_gather(mine[: 1 + comm.rank % 2], 0, [1, 2, 1])
    scattered = comm.reduce_scatter(torch.arange(3.0), 0)
    return comm.all_reduce_(mine.clone()).tolist(), begun.tolist(), gathered.tolist(), scattered.tolist()


def test_collectives() -> None:
    for rank, (summed, begun, gathered, scattered) in enumerate(run_as_threads(3, _collectives)):
        assert summed == begun == [3.0, 3.0]
        assert gathered == [0.0, 1.0, 1.0, 2.0]
        assert scattered == [3.0 * rank]


def _rows(comm: Communicator) -> list[float]:
    mine = torch.arange(3.0) + 10 * comm.rank
    return comm.all_to_all(mine, [0, 1, 2], [comm.rank] * 3).tolist()


def test_all_to_all() -> None:
    assert run_as_threads(3, _rows) == [[], [0.0, 10.0, 20.0], [1.0, 2.0, 11.0, 12.0, 21.0, 22.0]]


def _one_fails(comm: Communicator) -> None:
    if comm.rank == 1:
        raise ValueError("rank 1 cannot")
    comm.barrier()


def test_a_rank_that_fails_ends_all() -> None:
    with pytest.raises(ValueError, match="rank 1 cannot"):
        run_as_threads(3, _one_fails)
