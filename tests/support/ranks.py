"""Real ranks for tests: one pool of long-lived processes a world size, each with a gloo group, shared by all tests.

A test hands the pool a function of a module; every rank calls it and its results come back in rank order. What one rank
raises is raised in the test. A pool that a test has broken (a rank died, or hung past the limit) is replaced.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

from partita.ranks.rendezvous import rendezvous
from partita.torch.quantized.native import library
from tests.support.nursery import close_nurseries, start_rank

LIMIT_S = 100.0
ROOT = Path(__file__).resolve().parents[2]


class RankError(Exception):
    """What a rank raised, with its traceback."""


class Ranks:
    """A pool of `size` ranks that meet by `backend`."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size = size
        if backend == "gloo":
            library()  # compiled before a rank's time runs
        self.met = ExitStack()
        environments = self.met.enter_context(rendezvous(backend, size))
        self.folder = tempfile.TemporaryDirectory()
        listener = Listener(str(Path(self.folder.name) / "socket"), "AF_UNIX")
        self.processes = []
        for rank, met in enumerate(environments):
            env = {
                **os.environ, **met, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }  # fmt: skip
            self.processes.append(
                start_rank("torch", rank, "tests.support.ranks", str(listener.address), env, str(ROOT))
            )
        connections = {}
        for _ in range(size):
            connection = listener.accept()
            connections[connection.recv()] = connection
        self.connections = [connections[rank] for rank in range(size)]
        listener.close()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank; the results in rank order."""
        job = pickle.dumps((function.__module__, function.__qualname__, args))
        for connection in self.connections:
            connection.send_bytes(job)
        results, errors = [], []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(LIMIT_S):
                self.close()
                raise RankError(f"rank {rank} of {self.size} did not answer in {LIMIT_S} s; first error: {errors[:1]}")
            try:
                ok, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                self.close()
                raise RankError(f"rank {rank} of {self.size} died") from None
            (results if ok else errors).append(value)
        if errors:
            if any("Connection closed" in error or "timeout" in error for error in errors):
                self.close()  # the ranks are no longer in step
            raise RankError("\n".join(errors))
        return results

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for connection in self.connections:
            connection.close()
        self.met.close()
        self.folder.cleanup()


_pools: dict[tuple[int, str], Ranks] = {}


def ranks(size: int, backend: str = "gloo") -> Ranks:
    """The shared pool of `size` ranks that meet by `backend`, started when it is first asked for."""
    pool = _pools.get((size, backend))
    if pool is None or not pool.alive:
        pool = _pools[size, backend] = Ranks(size, backend)
    return pool


def on(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `size` ranks; one rank is this process, without a process group."""
    if size > 1:
        return ranks(size).run(function, *args)
    import torch

    torch.manual_seed(0)
    return [function(*args)]


def close_all() -> None:
    while _pools:
        _pools.popitem()[1].close()
    close_nurseries()


atexit.register(close_all)


def _serve(address: str, rank: int) -> None:
    import torch

    from partita.torch.collectives.groups import init_process_group

    torch.set_num_threads(1)
    init_process_group(timeout_s=60.0)
    with Client(address, "AF_UNIX") as connection:
        connection.send(rank)
        while True:
            try:
                module, name, args = pickle.loads(connection.recv_bytes())
            except EOFError:
                os._exit(0)
            try:
                function = getattr(importlib.import_module(module), name)
                torch.manual_seed(0)
                reply = (True, function(*args))
            except Exception:
                reply = (False, f"rank {rank}: {traceback.format_exc()}")
            connection.send_bytes(pickle.dumps(reply))


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
