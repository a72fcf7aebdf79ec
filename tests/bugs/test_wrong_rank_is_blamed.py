"""An error that repeated another rank's failure counted as this rank's own, so the wrong rank was blamed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from partita.cli import launch
from partita.cli.terminal.failure import explain
from partita.core.mesh import Mesh
from partita.errors import ModelError, PeerFailed
from partita.ranks.backends import open_mpi
from partita.ranks.failure import Failure
from tests.cli.models import TINY
from tests.support.mlx_ranks import BACKENDS, mlx_ranks
from tests.support.ranks import ROOT, ranks

MODULE = "tests.bugs.generate_from_own_folder"
NARROW, WIDE = 40, TINY["intermediate_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`rank0` holds a model, `rank1` the same weights with a config that contradicts them."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    config = {name: value for name, value in TINY.items() if name not in ("architectures", "model_type", "dtype")}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(folder / "rank0")
    shutil.copytree(folder / "rank0", folder / "rank1")
    file = folder / "rank1" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": NARROW}))
    return folder


def options(folder: Path, engine: str, *more: str) -> list[str]:
    return [str(folder), "hi", "--max-new-tokens", "1", "--engine", engine, "--tp", "2", *more]


def check_blame(code: int, said: str) -> None:
    errors = [line for line in said.splitlines() if "error: " in line]
    assert code == Failure.MISUSED, said
    assert len(errors) == 1, said
    assert "rank1" in errors[0] or f"{NARROW}" in errors[0], said
    assert "failed" not in errors[0], said


@pytest.mark.fresh
@pytest.mark.timeout(100)
@pytest.mark.skipif(open_mpi() is None, reason="Open MPI is not installed")
def test_under_mpirun(folder: Path) -> None:
    mpi = open_mpi()
    assert mpi is not None
    mpirun = [mpi.mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", MODULE]
    ended = subprocess.run(
        [*mpirun, *options(folder, "mlx", "--backend", "mpi")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    check_blame(ended.returncode, ended.stderr)
    assert "error: rank 1: " in ended.stderr


@pytest.mark.fresh
@pytest.mark.timeout(100)
@pytest.mark.parametrize(("engine", "backend"), [("mlx", "ring"), ("torch", "gloo")])
def test_under_our_launcher(engine: str, backend: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = launch.start(options(folder, engine), 2, program=("-m", MODULE), backend=backend)
    code = launch.show_outcome(outcome)
    check_blame(code, capfd.readouterr().err)


def fail_on_rank(failing: int, engine: str, mesh: Mesh) -> tuple[str, str, int | None, bool, int]:
    """What a rank raises where rank `failing` of `mesh` fails: type, text, whom it names, whether it is an echo, exit code."""
    groups: Any
    if engine == "torch":
        from partita.torch.collectives.collective_errors import collective_errors
        from partita.torch.collectives.groups import make_groups

        groups = make_groups(mesh)
        number = groups.rank
    else:
        from partita.mlx.collectives.collective_errors import collective_errors as collective_errors_on_mlx
        from partita.mlx.collectives.groups import make_groups as make_mlx_groups

        groups = make_mlx_groups(mesh)
        number = groups.rank
    try:
        with collective_errors(groups) if engine == "torch" else collective_errors_on_mlx(groups):
            if number == failing:
                raise ModelError("this rank is to blame")
    except Exception as error:
        failure = explain(error)
        assert failure is not None
        return type(error).__name__, str(error), getattr(error, "rank", None), failure.echo, failure.code
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(pp=2), Mesh(dp=2), Mesh(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_who_repeats_names_the_rank_that_failed(engine: str, mesh: Mesh) -> None:
    if engine == "mlx" and mesh.size > 2 and "mpi" not in BACKENDS:
        pytest.skip("MLX's ring has no groups of groups")
    failing = mesh.size - 1
    pool = ranks(mesh.size) if engine == "torch" else mlx_ranks(mesh.size)
    said = pool.run(fail_on_rank, failing, engine, mesh)
    repeated = (
        "PeerFailed",
        f"rank {failing} failed: ModelError: this rank is to blame",
        failing,
        True,
        Failure.FAILED,
    )
    assert said == [repeated] * failing + [("ModelError", "this rank is to blame", None, False, Failure.MISUSED)]


def test_an_error_of_ours_is_no_echo_whatever_its_words() -> None:
    failure = explain(ModelError("rank 3 failed to be a power of two: the connection was refused"))
    assert failure is not None
    assert not failure.echo


def test_an_echo_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(PeerFailed(3, "ValueError: the cause")))
    assert (error.rank, str(error)) == (3, "rank 3 failed: ValueError: the cause")
