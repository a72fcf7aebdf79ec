"""Processes that have loaded an engine and fork ranks, each in milliseconds instead of the seconds that loading takes.

There are two of each engine, one for even ranks and one for odd, so that neighbours in a pool differ in the seed of their
hashes as the ranks of a run do: what iterates over a set in an order of its own on each rank is found. Without `pidfd_open`
(outside Linux) a rank is a new process.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from typing import Any

_MODELS = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation",
)
LOADED = {
    "torch": ("partita.torch", "partita.torch.train", "tests.support.ranks", "peft", "pytest", *_MODELS),
    "mlx": (
        "partita.mlx", "partita.mlx.train", "tests.support.mlx_ranks", "mlx_lm.generate", "mlx_lm.tuner.utils", "pytest",
        *_MODELS,
    ),
}  # fmt: skip
"""What the ranks of an engine find loaded."""


class Forked:
    """A rank that a nursery has forked; the part of `subprocess.Popen` that pools need."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """None while it runs; its exit code is not known here."""
        return 0 if self._handle < 0 or select.select([self._handle], [], [], 0)[0] else None

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def wait(self) -> None:
        """Return when it has ended."""
        if self._handle >= 0:
            select.select([self._handle], [], [])
            os.close(self._handle)
            self._handle = -1


class Nursery:
    """A process that forks ranks of one engine."""

    def __init__(self, engine: str, env: dict[str, str]) -> None:
        ours, its = socket.socketpair()
        command = [sys.executable, "-m", "tests.support.nursery", engine, str(its.fileno())]
        self.process = subprocess.Popen(command, env=env, pass_fds=[its.fileno()])
        its.close()
        self.line = ours.makefile("rw")
        ours.close()

    def fork(self, module: str, arguments: list[str], env: dict[str, str], folder: str) -> Forked:
        """Start a rank, which calls `_serve(*arguments)` of `module` in `folder`."""
        self.line.write(json.dumps([module, arguments, env, folder]) + "\n")
        self.line.flush()
        return Forked(int(self.line.readline()))

    def close(self) -> None:
        """End the process; its ranks have ended."""
        self.line.close()
        self.process.wait()


_nurseries: dict[tuple[str, int], Nursery] = {}


def start_rank(engine: str, rank: int, module: str, address: str, env: dict[str, str], folder: str) -> Any:
    """A process that serves as rank `rank` of a pool, with `env` as its environment."""
    arguments = [address, str(rank)]
    if not hasattr(os, "pidfd_open"):
        return subprocess.Popen([sys.executable, "-m", module, *arguments], env=env, cwd=folder)
    seed = rank % 2
    nursery = _nurseries.get((engine, seed))
    if nursery is None or nursery.process.poll() is not None:
        nursery = _nurseries[engine, seed] = Nursery(engine, env)
    return nursery.fork(module, arguments, env, folder)


@atexit.register
def close_nurseries() -> None:
    """End all nurseries, after the pools."""
    while _nurseries:
        _nurseries.popitem()[1].close()


def _keep(engine: str, line: socket.socket) -> None:
    for module in LOADED[engine]:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ranks that have ended leave nothing behind
    orders = line.makefile("rw")
    while order := orders.readline():
        module, arguments, env, folder = json.loads(order)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            orders.close()
            line.close()
            os.environ.clear()
            os.environ.update(env)
            os.chdir(folder)
            serve = importlib.import_module(module)._serve
            try:
                serve(arguments[0], int(arguments[1]))
            finally:
                os._exit(1)
        orders.write(f"{pid}\n")
        orders.flush()


if __name__ == "__main__":
    _keep(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
