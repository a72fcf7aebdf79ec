"""Under mpirun and torchrun every rank printed a usage error, and an error that all ranks found at the same time.

And a rank that leaves the printing to rank 0 could end before it, upon which the launcher ended rank 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from partita.ranks.backends import open_mpi
from tests.cli.models import TINY
from tests.support.ranks import ROOT

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(300)]


def launched_by(launcher: str) -> list[str]:
    """The command of two ranks."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "partita"]
    mpi = open_mpi()
    if mpi is None:
        pytest.skip("Open MPI is not installed")
    return [mpi.mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "partita"]


@pytest.mark.parametrize(
    ("launcher", "command", "message"),
    [
        ("mpirun", "generate unknown hi --tp 2 --backend carrier-pigeon", "Invalid value for '--backend'"),
        ("mpirun", "verify unknown --tp 2 --engine mlx", ": the installed mlx-lm has no model"),
        ("mpirun", "verify unknown --tp 2 --engine torch", "error: "),
        ("torchrun", "verify unknown --tp 2 --engine torch", "error: "),
        ("torchrun", "train --config unknown --data missing --tp 2 --out out", "error: --data missing: there is no"),
        ("torchrun", "generate unknown hi --pp 2 --backend carrier-pigeon", "Invalid value for '--backend'"),
    ],
)
def test_one_rank_prints_it(launcher: str, command: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/config.json").write_text(json.dumps({**TINY, "model_type": "nosuch"}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run(
        [*launched_by(launcher), *command.split()], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert ended.returncode != 0
    printed = [line for line in ended.stderr.splitlines() if line.startswith("error: ") or "Invalid value" in line]
    assert len(printed) == 1, ended.stderr
    assert message in printed[0]
