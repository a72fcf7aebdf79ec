"""Fresh rank processes: started for one comparison, told what to call, ended with it.

Ranks meet through Open MPI where it is installed, and can speak otherwise besides: those of torch through gloo, those of MLX
through its ring. So contestants that use one or the other live in the same ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from partita.ranks.backends import open_mpi
from partita.ranks.rendezvous import rendezvous

Engine = Literal["torch", "mlx"]

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 240.0
"""How long one call may take before the ranks are given up."""


class RankError(Exception):
    """What a rank raised, with its traceback."""


class Ranks:
    """`size` ranks of an engine, one thread each. A context manager that ends them."""

    def __init__(self, size: int, engine: Engine = "torch") -> None:
        self.size, self.engine = size, engine
        self._stack = contextlib.ExitStack()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Ranks:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def call(self, function: Callable[..., Any], *args: Any, limit_s: float = LIMIT_S) -> list[Any]:
        """Call `function(*args)` on every rank; the results in rank order. The first error ends all of them."""
        for connection in self._connections:
            connection.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + limit_s
        while len(results) < self.size:
            waiting = [c for rank, c in enumerate(self._connections) if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"{function.__name__}: no answer in {limit_s:.0f} s from {len(waiting)} ranks")
            for connection in ready:
                rank = self._connections.index(connection)  # type: ignore[arg-type]
                try:
                    ok, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise RankError(f"{function.__name__}: rank {rank} died") from None
                if not ok:
                    raise RankError(f"{function.__name__} on rank {rank}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def _start(self) -> None:
        backends = (["mpi"] if open_mpi() is not None else []) + (["ring"] if self.engine == "mlx" else ["gloo"])
        met = [self._stack.enter_context(rendezvous(backend, self.size)) for backend in reversed(backends)]
        with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/socket", "AF_UNIX") as listener:
            listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]
            for rank in range(self.size):
                env = dict(os.environ)
                for environments in met:
                    env |= environments[rank]
                env |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
                env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
                command = [sys.executable, "-m", "bench.ranks", str(listener.address), self.engine]
                self._processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL))
            by_rank = {}
            for _ in range(self.size):
                connection = self._accept(listener)
                by_rank[connection.recv()] = connection
            self._connections = [by_rank[rank] for rank in range(self.size)]

    def _accept(self, listener: Listener) -> Connection:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and all(process.poll() is None for process in self._processes):
            with contextlib.suppress(TimeoutError):
                return listener.accept()
        raise RankError("a rank ended before it could be called, or did not come; its error is above")

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for connection in self._connections:
            connection.close()
        self._stack.close()


def barrier() -> None:
    """Return when every rank has come here; asleep, so that none takes another's core."""
    if os.environ["PARTITA_BENCH_ENGINE"] == "mlx":
        from partita.mlx.collectives.groups import init

        init().barrier()
    else:
        import torch.distributed as dist

        dist.barrier()


def over_gloo(groups: Any) -> Any:
    """The groups of torch along a mesh of one axis, whose ranks talk over gloo whatever else they could."""
    import torch.distributed as dist

    from partita.torch.collectives.comm import Communicator

    gloo = Communicator(dist.group.WORLD)
    axis = "pp" if groups.mesh.pp > 1 else "tp"
    return dataclasses.replace(groups, **{axis: gloo})


def own_rank() -> int:
    """This process's place."""
    return int(os.environ["RANK"])


def _serve(address: str, engine: str) -> None:
    """A rank: call what it is told until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the bench, which ends its ranks.
    os.environ["PARTITA_BENCH_ENGINE"] = engine
    if engine == "torch":
        import torch

        from partita.torch.collectives.groups import init_process_group

        torch.set_num_threads(1)
        init_process_group(timeout_s=LIMIT_S)
    else:
        from partita.mlx.collectives.groups import init

        init()
    with Client(address, "AF_UNIX") as connection:
        connection.send(int(os.environ["RANK"]))
        while True:
            try:
                function, args = connection.recv()
            except EOFError:
                os._exit(0)
            try:
                reply = (True, function(*args))
            except Exception:
                reply = (False, traceback.format_exc())
            connection.send(reply)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
