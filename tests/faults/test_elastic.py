"""Under torchrun's restarts a run goes on from its last checkpoint by itself, with as many replicas as there are ranks for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from partita.checkpoint.run_folder import RunFolder
from partita.training.state import read_state
from tests.cli.models import TINY, write
from tests.support.ranks import ROOT

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(120)]

STEPS = 240
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PARTITA_LOST_AFTER": "5"}


@pytest.fixture
def train(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a partita. " * 200)
    options = [
        "--batch-size",
        "4",
        "--sequence-length",
        "16",
        "--learning-rate",
        "1e-2",
        "--steps",
        str(STEPS),
        "--json",
    ]
    config = write(tmp_path, TINY)
    options += ["--save-every", "20", "--dtype", "float64"]
    return ["-m", "partita", "train", "--config", config, "--data", str(text), *options]


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options]


def start(command: list[str]) -> Any:
    return subprocess.Popen(
        command, cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for_step(run: RunFolder, step: int, process: Any) -> None:
    until_s = time.monotonic() + 60
    while not [one for one in run.steps() if one >= step]:
        assert time.monotonic() < until_s
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def end(*processes: Any) -> list[tuple[int, str, str]]:
    try:
        said = [process.communicate(timeout=90) for process in processes]
        return [(process.returncode, *both) for process, both in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def rank_pids(agent: Any) -> list[int]:
    """The ranks that torchrun's agent has started, in order."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


def losses_alone(train: list[str], folder: Path) -> list[float]:
    code, out, err = end(start([sys.executable, *train, "--out", str(folder)]))[0]
    assert code == 0, err
    return [step["loss"] for step in json.loads(out)["steps"]]


def test_after_a_failure_the_run_goes_on_by_itself(train: list[str], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    agent = start(
        [*torchrun("--nproc-per-node", "2", "--max-restarts", "2"), *train, "--dp", "2", "--out", str(run.path)]
    )
    wait_for_step(run, 20, agent)
    os.kill(rank_pids(agent)[1], signal.SIGKILL)
    code, out, err = end(agent)[0]
    assert code == 0, err
    assert "error: rank 0: rank 1 (host " in err
    assert f"resuming from {run.path}/step-0000" in err
    found = json.loads(out)
    assert found["steps"][0]["step"] > 20
    expected = losses_alone(train, tmp_path / "alone")
    assert [step["loss"] for step in found["steps"]] == pytest.approx(expected[-len(found["steps"]) :], rel=1e-9)


@pytest.mark.slow
def test_with_fewer_ranks_there_are_fewer_replicas(train: list[str], tmp_path: Path) -> None:
    """Two agents of one rank each, of which one is killed with its rank: the other goes on alone."""
    run = RunFolder(tmp_path / "run")
    port = 29_531
    options = [
        "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "the-run",
        "--rdzv-endpoint", f"127.0.0.1:{port}",
        "--rdzv-conf", "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=2",
    ]  # fmt: skip
    command = [*torchrun(*options), *train, "--dp", "2", "--out", str(run.path)]
    first = start(command)
    time.sleep(2.0)  # it is the one that has the store
    second = start(command)
    wait_for_step(run, 20, first)
    for pid in [*rank_pids(second), second.pid]:
        os.kill(pid, signal.SIGKILL)
    (code, out, err), _ = end(first, second)
    assert code == 0, err
    assert "torchrun has started 1 rank: resuming with --dp 1" in err
    found = json.loads(out)
    assert found["mesh"] == {"dp": 1, "pp": 1, "tp": 1}
    expected = losses_alone(train, tmp_path / "alone")
    assert [step["loss"] for step in found["steps"]] == pytest.approx(expected[-len(found["steps"]) :], rel=1e-9)
    assert read_state(run.step_folder(STEPS)).notes["run_id"] == "the-run"


@pytest.mark.slow
def test_a_run_that_was_done_is_done(train: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    losses_alone(train, run.path)
    monkeypatch.setitem(ENV, "TORCHELASTIC_RESTART_COUNT", "1")
    code, out, err = end(start([sys.executable, *train, "--out", str(run.path)]))[0]
    assert code == 0, err
    assert json.loads(out)["steps"] == []
    monkeypatch.setitem(ENV, "TORCHELASTIC_RESTART_COUNT", "0")
    code, _, err = end(start([sys.executable, *train, "--out", str(run.path)]))[0]
    assert code == 2
    assert "already holds a run" in err
