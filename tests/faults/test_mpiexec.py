"""A run whose mpiexec, or a process of it, was killed ended with exit code 195 or 1 and raw messages of Open MPI."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from partita.ranks.backends import open_mpi
from partita.ranks.liveness import LOST
from tests.cli.test_launch import gone_by
from tests.faults.broken_run import break_run, partita_ranks

pytestmark = [
    pytest.mark.fresh,
    pytest.mark.timeout(100),
    pytest.mark.skipif(open_mpi() is None, reason="Open MPI is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc"),
]


def children_of(pid: int) -> list[tuple[int, str]]:
    """The children of a process: their numbers and command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if parent == pid:
            found.append((int(folder.name), command))
    return sorted(found)


class Helpers:
    """The processes of Open MPI below our launcher: mpiexec, then its processes."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def kill(self, launcher: int, which: int) -> None:
        (mpiexec,) = [pid for pid, command in children_of(launcher) if "tests.faults.programs" not in command]
        self.pids = [mpiexec, *(pid for pid, _ in children_of(mpiexec))]
        assert len(self.pids) == 3
        os.kill(self.pids[which], signal.SIGKILL)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_it_is_a_lost_process(engine: str, which: int, tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    helpers = Helpers()
    command = [*partita_ranks("mpi", 2), engine, "collective", str(tmp_path)]
    ended = break_run(command, 2, tmp_path, lambda launcher: helpers.kill(launcher, which))
    assert ended.code == LOST, ended.said
    (line,) = ended.said.splitlines()
    assert line.startswith(f"error: {'' if not which else 'the process of '}mpiexec")
    assert " was lost while " in line
    assert line.endswith("cannot continue without it. Start the command again.")
    assert gone_by(helpers.pids, 5.0)
