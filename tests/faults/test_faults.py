"""Ranks that are killed, stopped or fail, in whatever they do, on both engines: the others end, and say who was lost."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from partita.ranks.backends import open_mpi
from partita.ranks.liveness import LOST
from tests.faults.broken_run import LOST_AFTER_S, MODULE, break_run, partita_ranks, torchrun

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(100)]

HOST = socket.gethostname()
BACKENDS = {"torch": ("mpi", "gloo"), "mlx": ("mpi", "ring")}
WORKS = ("collective", "send", "load", "save", "generate")
DOING = {
    "collective": "working", "send": "working", "load": "loading the model", "save": "saving the model",
    "generate": "generating",
}  # fmt: skip
WHY = {"KILL": "it was ended by SIGKILL", "STOP": f"no message from it for {LOST_AFTER_S:g} s"}

needs_mpi = pytest.mark.skipif(open_mpi() is None, reason="Open MPI is not installed")


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    shutil.copytree(model, tmp_path / "model")
    return tmp_path


def break_ours(engine: str, backend: str, work: str, fault: str, who: int, folder: Path) -> None:
    ended = break_run([*partita_ranks(backend, 2), engine, work, str(folder)], 2, folder, fault, who)
    assert ended.code == LOST, ended.said
    assert ended.said.count("error: ") == 1, ended.said
    assert f"error: rank {who} (host {HOST}, stage " in ended.said
    assert "was lost while " in ended.said
    assert WHY[fault] in ended.said
    if work not in ("load", "save"):  # which may stand between two of them
        assert DOING[work] in ended.said


@pytest.mark.parametrize(
    ("engine", "backend", "work", "fault", "who"),
    [
        pytest.param("torch", "mpi", "collective", "STOP", 1, marks=needs_mpi),
        ("torch", "gloo", "send", "KILL", 0),
        ("mlx", "ring", "collective", "STOP", 0),
    ],
)
def test_a_lost_rank_is_named(engine: str, backend: str, work: str, fault: str, who: int, folder: Path) -> None:
    break_ours(engine, backend, work, fault, who, folder)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(4))
@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("fault", ["KILL", "STOP"])
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_no_fault_makes_a_rank_hang(engine: str, fault: str, work: str, repeat: int, folder: Path) -> None:
    """Twenty times each: on either engine, killed or stopped, either rank, over either backend, in five works."""
    backend = BACKENDS[engine][repeat % 2]
    if backend == "mpi" and open_mpi() is None:
        pytest.skip("Open MPI is not installed")
    break_ours(engine, backend, work, fault, repeat // 2, folder)


@pytest.mark.parametrize(
    ("fault", "who", "code", "message"),
    [
        (
            "STOP",
            0,
            75,
            f"error: rank 1: rank 0 (host {HOST}, stage 0) was lost while working, in an all-reduce: nothing was",
        ),
        ("raise", 1, 1, "error: rank 1: ValueError: this rank has had enough"),
    ],
)
def test_ranks_of_torchrun(fault: str, who: int, code: int, message: str, folder: Path) -> None:
    ended = break_run([*torchrun(2), "torch", "collective", str(folder)], 2, folder, fault, who)
    assert ended.code != 0
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(message)
    assert f"exitcode  : {code}" in ended.said or fault == "STOP"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(partita_ranks("gloo", 2), id="gloo"),
        pytest.param(partita_ranks("mpi", 2), id="mpi", marks=needs_mpi),
        pytest.param(torchrun(2), id="torchrun"),
    ],
)
def test_a_rank_that_cannot_compile_ends_all(command: list[str], folder: Path) -> None:
    """The others are in the collectives of a layer that they have compiled, where no message reaches them."""
    ended = break_run([*command, "torch", "compile", str(folder)], 2, folder, "raise", 1)
    assert ended.code != 0
    assert ended.seconds < LOST_AFTER_S  # told by the rank that fails, not by its silence
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1: BackendCompilerFailed: backend='backend' raised:"]
    assert "RuntimeError: this rank cannot compile" in ended.said


@needs_mpi
@pytest.mark.parametrize("fault", [pytest.param("KILL", marks=pytest.mark.slow), "STOP"])
def test_ranks_of_mpirun(fault: str, folder: Path) -> None:
    mpi = open_mpi()
    assert mpi is not None
    command = [mpi.mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, *MODULE]
    ended = break_run([*command, "mlx", "collective", str(folder)], 2, folder, fault, 1)
    assert ended.code != 0
    if fault == "STOP":  # of a killed one mpirun itself may tell first
        assert f"error: rank 0: rank 1 (host {HOST}, stage 0) was lost while working: no message from it" in ended.said


@pytest.mark.parametrize(("fault", "who"), [("STOP", 1), pytest.param("KILL", 0, marks=pytest.mark.slow), ("raise", 1)])
def test_ranks_of_mlx_launch(fault: str, who: int, folder: Path) -> None:
    """Whose exit code says nothing: it is 0 whatever its ranks do."""
    command = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
    command += ["--backend", "ring", "-n", "2", "--hosts", "127.0.0.1", sys.executable, *MODULE]
    ended = break_run([*command, "mlx", "collective", str(folder)], 2, folder, fault, who)
    errors = [line for line in ended.said.splitlines() if "error: " in line]
    assert len(errors) == 1, ended.said
    if fault == "raise":
        assert "error: rank 1: ValueError: this rank has had enough" in errors[0]
    else:
        assert f"error: rank {1 - who}: rank {who} (host {HOST}, stage 0) was lost while working" in errors[0]
