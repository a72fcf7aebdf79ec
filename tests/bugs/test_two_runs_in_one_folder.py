"""Two runs with one `--out` wrote their weights into one checkpoint, which passed its checksums and was resumed.

So did two saves to one folder. Now one at a time holds a folder; the other is refused, whether it begins or resumes.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from partita.checkpoint.durable import partial_of
from partita.checkpoint.run_folder import RunFolder
from partita.checkpoint.run_lock import LOCK_NAME, RunLock
from partita.errors import CheckpointError
from tests.cli.conftest import Run, partita  # noqa: F401
from tests.cli.models import TINY, write
from tests.support.ranks import ROOT

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(120)]


def options(folder: Path, seed: int) -> list[str]:
    """A run in `folder`/run."""
    text = folder / "text.txt"
    text.write_text("import sys\nimport os\nprint(os.getcwd(), sys.argv)\n" * 60)
    return [
        "train", "--config", write(folder, TINY), "--data", str(text), "--batch-size", "2", "--sequence-length", "16",
        "--seed", str(seed), "--save-every", "1", "--out", str(folder / "run"),
    ]  # fmt: skip


def start(*arguments: str) -> Any:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "partita", *arguments], cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def wait_for_lock(folder: Path, process: Any) -> None:
    until_s = time.monotonic() + 100
    while not (folder / LOCK_NAME).exists() or not (folder / LOCK_NAME).read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until_s
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("engine", ["torch", pytest.param("mlx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["begin", "resume"])
def test_a_live_run_refuses_a_second_and_a_killed_one_does_not(
    how: str,
    engine: str,
    partita: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    run = RunFolder(tmp_path / "run")
    command = [*options(tmp_path, 0), "--steps", "2"]
    if how == "resume":
        assert partita(*command).code == 0
        command = ["train", "--resume", "--out", str(run.path), "--steps", "4"]
    first = start(*command, "--engine", engine)
    try:
        wait_for_lock(run.path, first)
        os.kill(first.pid, signal.SIGSTOP)
        before = contents(run.path)
        said = partita(*command)
        assert said.code == 2
        assert said.err.startswith(f"error: {run.path}: is in use by run ")
        assert f"process {first.pid}, since " in said.err
        assert said.err.endswith("Wait for that run to end, end it, or save elsewhere.\n")
        assert said.err.count("\n") == 1
        assert contents(run.path) == before
    finally:
        first.kill()
        first.communicate()
    said = partita(*command, "--engine", engine)
    assert said.code == 0, said.err
    steps = [1, 2, 3, 4] if how == "resume" else [1, 2]
    assert run.steps() == steps
    assert sorted(os.listdir(run.path)) == ["config.json", "latest", *(f"step-{step:06d}" for step in steps)]


@pytest.mark.parametrize("engine", ["torch", "mlx"])
@pytest.mark.parametrize("there", [False, True])
def test_a_save_to_the_place_of_another_is_refused(engine: str, there: bool, tmp_path: Path) -> None:
    """A thread plays the other process: it holds the lock of a save under way."""
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    model = importlib.import_module(f"partita.{engine}.new").fresh(TINY)
    save = importlib.import_module(f"partita.{engine}.weights.save").save
    place = tmp_path / "model"
    if there:
        place.mkdir()
    partial = partial_of(place)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with RunLock(place, file=partial.with_name(f"{partial.name}.lock")):
            partial.mkdir()
            (partial / "model.safetensors").write_bytes(b"of the other")
            held.set()
            release.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(CheckpointError, match=r"model: is in use by run [0-9a-f]{8} \(host "):
            save(model, place)
        assert (partial / "model.safetensors").read_bytes() == b"of the other"
    finally:
        release.set()
        other.join()
    save(model, place)
    assert {"config.json", "model.safetensors"} == set(os.listdir(place)) - {"generation_config.json"}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("where", [["--tp", "2"], ["--dp", "2"], ["--pp", "2", "--engine", "mlx"]], ids=" ".join)
def test_of_two_that_begin_at_once_one_is_alone(where: list[str], tmp_path: Path) -> None:
    """Each holds the weights of one seed, those of the run that was not refused."""
    if "mlx" in where:
        pytest.importorskip("mlx_lm")
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        alone = start(*options(tmp_path / str(seed), seed), "--steps", "3", *where)
        said = alone.communicate(timeout=100)
        assert alone.returncode == 0, said
    (tmp_path / "both").mkdir()
    both = [start(*options(tmp_path / "both", seed), "--steps", "3", *where) for seed in (0, 1)]
    ended = [process.communicate(timeout=100)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], ended
    winner = codes.index(0)
    assert "run: is in use by run " in ended[1 - winner] or "already holds a run" in ended[1 - winner]
    expected, found = RunFolder(tmp_path / str(winner) / "run"), RunFolder(tmp_path / "both" / "run")
    assert found.steps() == [1, 2, 3]
    assert [weights(found.step_folder(step)) for step in (1, 2, 3)] == [
        weights(expected.step_folder(step)) for step in (1, 2, 3)
    ]
    assert sorted(os.listdir(found.path)) == sorted(os.listdir(expected.path))
