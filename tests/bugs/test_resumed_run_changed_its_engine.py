"""A run on MLX was resumed on torch, `--zero`, `--checkpointing` and the layout of `--plan` were lost, and nothing told it.

Now a resumed run keeps them, and a line on stderr tells each option that differs from the run's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from partita.checkpoint.run_folder import RunFolder
from partita.cli.arguments.resume import changes
from partita.training import TrainSettings
from partita.training.state import TrainingState, read_state
from tests.cli.conftest import Run, partita  # noqa: F401
from tests.cli.models import TINY, write

LAYOUT: dict[str, Any] = {
    "tp": 2, "pp": 1, "dp": 1, "layout": None, "vpp": None, "schedule": None, "microbatches": 2, "group_size": None,
}  # fmt: skip
NOTES: dict[str, Any] = {
    "data": "a.txt", "save_every": 2, "keep": None, "engine": "torch", "zero": True, "checkpointing": False,
    "layout": LAYOUT,
}  # fmt: skip


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        ({}, []),
        ({"tp": 1}, ["--tp 1 (the run used 2)"]),
        (
            {"pp": 2, "tp": 1, "microbatches": None},
            [
                "--tp 1 (the run used 2): options of the layout replace all of the run's own",
                "--pp 2 (the run used 1)",
                "no --microbatches (the run used 2): options of the layout replace all of the run's own",
            ],
        ),
        (
            {"engine": "mlx", "zero": False},
            ["--engine mlx (the run used torch)", "no --zero (the run used it)"],
        ),
        ({"checkpointing": True}, ["--checkpointing (the run used none)"]),
        ({"layout": "Et|tL"}, ["--layout Et|tL (the run used its default)"]),
        ({"data": "b.txt", "keep": 3}, ["--data b.txt (the run used a.txt)", "--keep 3 (the run used its default)"]),
        ({"steps": 8}, ["--steps 8 (the run used 4): the learning rate now decays over all of them"]),
    ],
)
def test_lines(now: dict[str, Any], lines: list[str]) -> None:
    state = TrainingState(2, TrainSettings(steps=4), 100, "", NOTES)
    kept = {**NOTES, **LAYOUT, "steps": 4}
    given = frozenset(now) if set(now) != {"pp", "tp", "microbatches"} else frozenset(["pp"])
    assert changes(state, {**kept, **now}, given) == lines
    before = TrainingState(2, TrainSettings(steps=4), 100, "", {"data": "a.txt"})
    assert changes(before, kept, frozenset()) == []


def begin(folder: Path, *options: str) -> list[str]:
    (folder / "text.txt").write_text("import sys\nimport os\nprint(os.getcwd(), sys.argv)\n" * 60)
    return [
        "train", "--config", write(folder, TINY), "--data", str(folder / "text.txt"), "--batch-size", "4",
        "--sequence-length", "16", "--steps", "4", "--save-every", "2", "--out", str(folder / "run"), "--json", *options,
    ]  # fmt: skip


def stop(run: Path) -> None:
    """Make it the run that it was after two steps."""
    shutil.rmtree(run / "step-000004")
    (run / "latest").unlink()


def losses(out: str) -> list[float]:
    return [step["loss"] for step in json.loads(out)["steps"]]


def test_the_engine_is_kept(partita: Run, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("mlx_lm")
    whole = partita(*begin(tmp_path, "--engine", "mlx"))
    assert whole.code == 0, whole.err
    run = tmp_path / "run"
    stop(run)
    again = partita("train", "--resume", "--out", str(run), "--json")
    assert again.code == 0, again.err
    assert losses(again.out) == losses(whole.out)[2:]
    assert "(the run used" not in again.err
    assert read_state(run / "step-000004").notes["engine"] == "mlx"
    stop(run)
    other = partita("train", "--resume", "--out", str(run), "--engine", "torch", "--json")
    assert other.code == 0, other.err
    assert "--engine torch (the run used mlx)\n" in other.err
    assert losses(other.out) == pytest.approx(losses(whole.out)[2:], rel=1e-5)
    assert read_state(run / "step-000004").notes["engine"] == "torch"


def test_memory_options_are_kept(partita: Run, tmp_path: Path) -> None:  # noqa: F811
    whole = partita(*begin(tmp_path, "--zero", "--checkpointing"))
    assert whole.code == 0, whole.err
    run = tmp_path / "run"
    stop(run)
    again = partita("train", "--resume", "--out", str(run), "--no-zero", "--json")
    assert again.code == 0, again.err
    assert [line for line in again.err.splitlines() if "the run used" in line] == ["no --zero (the run used it)"]
    notes = read_state(run / "step-000004").notes
    assert (notes["zero"], notes["checkpointing"]) == (False, True)
    assert losses(again.out) == losses(whole.out)[2:]


def test_a_torch_run_leaves_out_on_mlx_what_mlx_lacks(partita: Run, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("mlx_lm")
    whole = partita(*begin(tmp_path, "--zero"))
    stop(tmp_path / "run")
    again = partita("train", "--resume", "--out", str(tmp_path / "run"), "--engine", "mlx", "--json")
    assert again.code == 0, again.err
    assert "--engine mlx (the run used torch)\nno --zero (the run used it)\n" in again.err
    assert losses(again.out) == pytest.approx(losses(whole.out)[2:], rel=1e-5)


@pytest.mark.fresh
@pytest.mark.slow
def test_the_layout_of_a_plan_is_kept(partita: Run, tmp_path: Path) -> None:  # noqa: F811
    config = write(tmp_path, TINY)
    plan = str(tmp_path / "plan.json")
    assert partita("plan", config, "--pp", "2", "--layout", "Ett|L", "--save", plan).code == 0
    import subprocess
    import sys

    from tests.support.ranks import ROOT

    for line in (
        begin(tmp_path, "--plan", plan),
        ["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "6"],
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "partita", *line], cwd=ROOT, capture_output=True, text=True, timeout=100
        )
        assert ended.returncode == 0, ended.stderr
    run = RunFolder(tmp_path / "run")
    assert read_state(run.step_folder(6)).notes["layout"]["layout"] == "Ett|L"
    assert "the run used its default" not in ended.stderr
