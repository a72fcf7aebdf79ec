"""Ranks as threads of one process: to test a split on a small model without the other processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from partita.torch.collectives.comm import Communicator, Work

Result = TypeVar("Result")

_REDUCE: dict[Any, Callable[[Tensor], Tensor]] = {
    dist.ReduceOp.SUM: lambda stacked: stacked.sum(0),
    dist.ReduceOp.AVG: lambda stacked: stacked.mean(0),
    dist.ReduceOp.MAX: lambda stacked: stacked.amax(0),
    dist.ReduceOp.MIN: lambda stacked: stacked.amin(0),
}


class _Exchange:
    """Values that the threads of a group exchange. A thread that fails breaks the barrier, so no thread waits forever."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size
        self.boxes = {(source, to): queue.SimpleQueue[Tensor]() for source in range(size) for to in range(size)}

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


class _Arrival:
    """A tensor that another thread sends, in the order in which it sends to this one."""

    def __init__(self, exchange: _Exchange, box: queue.SimpleQueue[Tensor], into: Tensor) -> None:
        self.exchange, self.box, self.into = exchange, box, into

    def wait(self) -> None:
        while True:
            try:
                sent = self.box.get(timeout=0.1)
            except queue.Empty:
                if self.exchange.barrier.broken:
                    raise threading.BrokenBarrierError from None
                continue
            with torch.no_grad():
                self.into.copy_(sent)
            return


class ThreadCommunicator(Communicator):
    """The communicator of one of `size` threads."""

    def __init__(self, exchange: _Exchange, rank: int, size: int) -> None:
        """Create rank `rank` of the threads that share `exchange`."""
        self.group = None
        self.rank, self.size, self.global_ranks = rank, size, tuple(range(size))
        self._is_pair = False
        self._board = exchange

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """See `Communicator.all_reduce_`."""
        parts = self._board.swap(self.rank, tensor.detach().clone())
        with torch.no_grad():
            return tensor.copy_(_REDUCE[op](torch.stack(parts)))

    def start_all_reduce_(self, tensor: Tensor) -> Work:
        """See `Communicator.start_all_reduce_`."""
        self.all_reduce_(tensor)
        return Communicator.single().start_all_reduce_(tensor)

    def all_gather(self, tensor: Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
        """See `Communicator.all_gather`."""
        return torch.cat(self._board.swap(self.rank, tensor.detach().clone()), dim)

    def reduce_scatter(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """See `Communicator.reduce_scatter`."""
        sizes = sizes if sizes is not None else self.even_sizes(tensor.shape[dim])
        total = self.all_reduce_(tensor.detach().clone())
        return total.narrow(dim, sum(sizes[: self.rank]), sizes[self.rank]).clone()

    def all_to_all(self, tensor: Tensor, sizes: Sequence[int], received: Sequence[int]) -> Tensor:
        """See `Communicator.all_to_all`."""
        rows = self._board.swap(self.rank, tensor.detach().clone().split(list(sizes)))
        return torch.cat([one[self.rank] for one in rows])

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """See `Communicator.broadcast_`."""
        parts = self._board.swap(self.rank, tensor.detach().clone())
        with torch.no_grad():
            return tensor.copy_(parts[source])

    def broadcast_object(self, value: object, source: int = 0) -> object:
        """See `Communicator.broadcast_object`."""
        return self._board.swap(self.rank, value)[source]

    def all_gather_object(self, value: object) -> list[object]:
        """See `Communicator.all_gather_object`."""
        return self._board.swap(self.rank, value)

    def start_send(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        """See `Communicator.start_send`; as with NCCL, tags do not count."""
        self._board.boxes[self.rank, to].put(tensor.detach().clone())
        return Communicator.single().start_all_reduce_(tensor)

    def start_recv_(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        """See `Communicator.start_recv_`."""
        return _Arrival(self._board, self._board.boxes[source, self.rank], tensor)

    def barrier(self) -> None:
        """See `Communicator.barrier`."""
        self._board.swap(self.rank, None)


def run_as_threads(size: int, work: Callable[[Communicator], Result]) -> list[Result]:
    """Call `work` once for each of `size` ranks, each in its own thread with its own communicator.

    Raises:
        Exception: The error of the lowest rank that failed.
    """
    exchange = _Exchange(size)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadCommunicator(exchange, rank, size))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append((rank, error))
            exchange.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda item: item[0])[1]
    return results
