"""Real MLX ranks for tests: one pool of long-lived processes a world size and backend, as `tests.support.ranks`.

They talk over Open MPI where it is installed, else over MLX's ring, unless a test asks for one of the two.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from partita.ranks.backends import open_mpi
from partita.ranks.rendezvous import rendezvous
from tests.support.nursery import start_rank
from tests.support.ranks import ROOT, RankError

LIMIT_S = 60.0
STEP_S = 5.0
"""How long the others may take once one has failed: a rank that waits for it will not come back."""

BACKENDS = ("mpi", "ring") if open_mpi() is not None else ("ring",)


class MlxRanks:
    """A pool of `size` ranks over one backend."""

    def __init__(self, size: int, backend: str) -> None:
        self.size = size
        self.stack = contextlib.ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        listener = Listener(str(Path(folder) / "socket"), "AF_UNIX")
        environments = self.stack.enter_context(rendezvous(backend, size))
        self.processes = []
        for rank, environment in enumerate(environments):
            env = {
                **os.environ,
                **environment,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "PYTHONWARNINGS": "ignore",
            }
            self.processes.append(
                start_rank("mlx", rank, "tests.support.mlx_ranks", str(listener.address), env, str(ROOT))
            )
        connections = {}
        for _ in range(size):
            connection = listener.accept()
            connections[connection.recv()] = connection
        self.connections: list[Connection] = [connections[rank] for rank in range(size)]  # type: ignore[type-arg]
        listener.close()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank; the results in rank order."""
        job = pickle.dumps((function.__module__, function.__qualname__, args))
        for connection in self.connections:
            connection.send_bytes(job)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + LIMIT_S
        while len(answers) < self.size:
            left = [connection for rank, connection in enumerate(self.connections) if rank not in answers]
            for connection in wait(left, max(0.0, deadline - time.monotonic())):
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, f"rank {rank} of {self.size} died")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + STEP_S)
            if time.monotonic() >= deadline:
                break
        errors = [value for ok, value in answers.values() if not ok]
        if len(answers) < self.size or any(" died" in error for error in errors):
            self.close()
            errors.append(f"of {self.size} ranks, only {sorted(answers)} answered")
        if errors:
            raise RankError("\n".join(errors))
        return [answers[rank][1] for rank in range(self.size)]

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for connection in self.connections:
            connection.close()
        self.stack.close()


_pools: dict[tuple[int, str], MlxRanks] = {}


def mlx_ranks(size: int, backend: str = BACKENDS[0]) -> MlxRanks:
    """The shared pool of `size` ranks, started when it is first asked for."""
    pool = _pools.get((size, backend))
    if pool is None or not pool.alive:
        pool = _pools[size, backend] = MlxRanks(size, backend)
    return pool


def on_mlx(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `size` ranks; one rank is this process, without a group."""
    if size > 1:
        return mlx_ranks(size).run(function, *args)
    import mlx.core as mx

    mx.random.seed(0)
    return [function(*args)]


def close_mlx_ranks() -> None:
    while _pools:
        _pools.popitem()[1].close()


atexit.register(close_mlx_ranks)


def _serve(address: str, rank: int) -> None:
    import mlx.core as mx

    from partita.mlx.collectives.groups import init

    init()
    with Client(address, "AF_UNIX") as connection:
        connection.send(rank)
        while True:
            try:
                module, name, args = pickle.loads(connection.recv_bytes())
            except EOFError:
                os._exit(0)
            try:
                function = getattr(importlib.import_module(module), name)
                mx.random.seed(0)
                reply = (True, function(*args))
            except Exception:
                reply = (False, f"rank {rank}: {traceback.format_exc()}")
            connection.send_bytes(pickle.dumps(reply))


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
