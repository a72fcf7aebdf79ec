"""srun, MPIs and indexed jobs of Kubernetes: what they tell each process becomes what torchrun would have told it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from partita.cli.arguments.elastic import fitted
from partita.core.mesh import Mesh
from partita.errors import DistributedError
from partita.ranks import environment
from partita.ranks.schedulers import adopt, first_host
from tests.cli.models import TINY
from tests.support.ranks import ROOT

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NODELIST": "gpu[07-09],login",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
}  # fmt: skip
ONE_NODE = {
    **SLURM,
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu07",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
POD = {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "train-0.train"}


def adopted(given: dict[str, str]) -> dict[str, str]:
    environment = dict(given)
    adopt(environment)
    return {name: value for name, value in environment.items() if name not in given}


def test_a_task_of_srun() -> None:
    made = adopted(SLURM)
    assert made == {
        "RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": made["MASTER_PORT"], "PARTITA_LAUNCHER": "srun",
    }  # fmt: skip
    assert 20_000 <= int(made["MASTER_PORT"]) < 40_000
    # Another step of the job meets elsewhere, and every task of this one in the same place.
    assert adopted({**SLURM, "SLURM_PROCID": "0"})["MASTER_PORT"] == made["MASTER_PORT"]
    assert adopted({**SLURM, "SLURM_STEP_ID": "3"})["MASTER_PORT"] != made["MASTER_PORT"]
    assert adopted(ONE_NODE)["MASTER_ADDR"] == "127.0.0.1"
    assert "MASTER_PORT" not in adopted({**SLURM, "MASTER_PORT": "1"})


def test_a_process_of_another_mpi() -> None:
    made = adopted(PMI)
    assert (made["RANK"], made["WORLD_SIZE"], made["LOCAL_RANK"], made["MASTER_ADDR"]) == ("1", "2", "1", "127.0.0.1")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (ONE_NODE, "srun"),
        (PMI, "mpiexec"),
        (POD, "Kubernetes"),
        ({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "2"}, "mlx.launch"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "the launcher"),
    ],
)
def test_messages_name_the_launcher(
    given: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", given | adopted(given))
    assert environment.launcher() == name
    world = environment.world()
    assert world is not None
    assert fitted(Mesh(dp=world + 1)) == Mesh(dp=world)
    said = capsys.readouterr().err
    assert said == (f"{name} has started {world} ranks: resuming with --dp {world}\n" if environment.is_first() else "")


def test_a_pod_of_an_indexed_job() -> None:
    assert adopted(POD) == {
        "RANK": "3",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_PORT": "29500",
        "PARTITA_LAUNCHER": "Kubernetes",
    }


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, outside of srun
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {**SLURM, "RANK": "1", "WORLD_SIZE": "2"},
        {**SLURM, "OMPI_COMM_WORLD_RANK": "0"},
        {**PMI, "PMI_SIZE": "1"},
        {"JOB_COMPLETION_INDEX": "3"},  # pods that know nothing of each other
    ],
    ids=str,
)
def test_what_is_left_alone(given: dict[str, str]) -> None:
    assert adopted(given) == {}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, "SLURM_STEP_NODELIST"),
        ({**PMI, "MPI_LOCALNRANKS": "1"}, "MASTER_ADDR"),
        ({"JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"JOB_COMPLETION_INDEX": "0", "MASTER_ADDR": "a"}, "WORLD_SIZE"),
    ],
)
def test_a_run_that_cannot_be_joined_is_refused(given: dict[str, str], name: str) -> None:
    with pytest.raises(DistributedError, match=f"{name}.*is not set"):
        adopt(dict(given))


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("gpu[07-09,12],login", "gpu07"), ("r[1,3]n2,x", "r1n2"), ("gpu[3]", "gpu3")],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.timeout(300)
@pytest.mark.fresh
@pytest.mark.parametrize("launcher", ["slurm", pytest.param("pmi", marks=pytest.mark.slow)])
def test_two_tasks_are_one_run(tmp_path: Path, launcher: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "text.txt").write_text("import sys\n" * 60)
    command = (
        sys.executable, "-m", "partita", "train", "--config", str(tmp_path / "config.json"), "--data",
        str(tmp_path / "text.txt"), "--tp", "2", "--steps", "2", "--batch-size", "2", "--sequence-length", "8", "--out",
        str(tmp_path / "out"), "--json",
    )  # fmt: skip

    def start(rank: str) -> subprocess.Popen[str]:
        told: dict[str, Any] = {
            "slurm": {**ONE_NODE, "SLURM_JOB_ID": str(os.getpid()), "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            "pmi": {**PMI, "PMI_RANK": rank, "MPI_LOCALRANKID": rank},
        }
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **told[launcher], "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    processes = [start("0"), start("1")]
    try:
        first, second = [(process, process.communicate(timeout=250)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert (first[0].returncode, second[0].returncode) == (0, 0), (first[1], second[1])
    assert json.loads(first[1][0])["mesh"] == {"dp": 1, "pp": 1, "tp": 2}
    assert second[1][0] == ""
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.fresh
def test_a_command_refuses_what_it_cannot_join(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    ended = subprocess.run(
        (sys.executable, "-m", "partita", "verify", str(tmp_path / "config.json"), "--tp", "2"), cwd=ROOT, text=True,
        env={**os.environ, "JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "2"}, capture_output=True, timeout=100,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "error: an indexed job of Kubernetes started this process as one of several, but MASTER_ADDR"
    )
    assert ended.stderr.count("\n") == 1
