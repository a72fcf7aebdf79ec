"""Ranks as threads of one process: to test a split on a small model without the other processes.

MLX's arrays are immutable and its streams belong to threads, so ranks share only evaluated weights. A
thread computes only while it holds the turn, and releases it while it waits for the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from partita.errors import DistributedError
from partita.mlx.collectives.comm import Communicator

Result = TypeVar("Result")


class _Exchange:
    """Values that the threads of a group exchange. A thread that fails breaks the barrier, so no thread waits forever."""

    def __init__(self, size: int) -> None:
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self._wait()
        values = list(self.slots)
        self._wait()
        return values

    def _wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


class ThreadCommunicator(Communicator):
    """The communicator of one of `size` threads. Its collectives are complete when they return."""

    def __init__(self, exchange: _Exchange, rank: int, size: int) -> None:
        """Create rank `rank` of the threads that share `exchange`."""
        super().__init__(None)
        self.rank, self.size = rank, size
        self._board = exchange

    def _swap(self, x: mx.array) -> list[np.ndarray[Any, Any]]:
        shared = _numbers(x)
        parts = self._board.swap(self.rank, (shared, x.dtype))
        kinds = {(part.shape, str(dtype)) for part, dtype in parts}
        if len(kinds) > 1:
            raise DistributedError(
                f"the ranks of a group call a collective with different arrays: {sorted(kinds, key=str)}."
            )
        return [part for part, _ in parts]

    def _sum(self, x: mx.array) -> mx.array:
        return mx.array(sum(self._swap(x)), x.dtype)

    def _max(self, x: mx.array) -> mx.array:
        return mx.array(np.max(self._swap(x), axis=0), x.dtype)

    def _gather(self, x: mx.array) -> mx.array:
        return mx.array(np.concatenate(self._swap(x)), x.dtype)

    def send(self, x: mx.array, to: int) -> None:
        """See `Communicator.send`; ranks as threads have no pairs."""
        raise DistributedError("ranks that are threads of one process do not send to one another.")

    def recv(self, shape: Sequence[int], dtype: mx.Dtype, source: int) -> mx.array:
        """See `Communicator.recv`; ranks as threads have no pairs."""
        raise DistributedError("ranks that are threads of one process do not receive from one another.")


def _numbers(x: mx.array) -> np.ndarray[Any, Any]:
    """An array's values for another thread: an MLX array may depend on a graph of its own thread."""
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def run_as_threads(size: int, work: Callable[[Communicator], Result]) -> list[Result]:
    """Call `work` once for each of `size` ranks, each in its own thread with its own communicator, on the CPU.

    Arrays that `work` captures or returns must be evaluated. Each thread has its own random state.

    Raises:
        Exception: The error of the lowest rank that failed.
    """
    exchange = _Exchange(size)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def one(rank: int) -> None:
        with exchange.turn:
            try:
                with mx.stream(mx.cpu):
                    results[rank] = work(ThreadCommunicator(exchange, rank, size))
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                errors.append((rank, error))
                exchange.barrier.abort()
            finally:
                # A thread that keeps its streams until the process ends can abort it.
                mx.synchronize()
                mx.clear_streams()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda item: item[0])[1]
    return results
