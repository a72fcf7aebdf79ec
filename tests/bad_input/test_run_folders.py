"""The checkpoints of a run with one broken: generating says so and names the one before, resuming goes on from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.table import error_of
from tests.cli.conftest import Run

LAST = "step-000002"
NEW = "train --config config.json --data words.txt --steps 2 --save-every 1 --batch-size 1 --sequence-length 8 --out"

Break = Callable[[Path], Any]


@pytest.fixture
def run_folder(tmp_path: Path, folder: Path, partita: Run) -> Path:
    """A run of two steps, each with its checkpoint."""
    made = folder / "run"
    if not made.exists():
        said = partita(*NEW.split(), "run")
        assert said.code == 0, said.err
    return Path(shutil.copytree(made, tmp_path / "run", symlinks=True))


def text(name: str, content: str) -> Break:
    return lambda folder: (folder / LAST / name).write_text(content)


def gone(name: str) -> Break:
    return lambda folder: (folder / LAST / name).unlink()


def cut_short(folder: Path) -> None:
    file = folder / LAST / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def empty(folder: Path) -> None:
    shutil.rmtree(folder / LAST)
    (folder / LAST).mkdir()


BROKEN: dict[str, tuple[Break, str]] = {
    "manifest gone": (gone("manifest.json"), "has no manifest.json"),
    "manifest not JSON": (text("manifest.json", "{"), "manifest.json: the manifest must be plain JSON"),
    "manifest a list": (text("manifest.json", "[]"), "manifest.json: the manifest must be a JSON object"),
    "manifest of another kind": (text("manifest.json", "{}"), "must be a manifest with `partita_manifest: 1`"),
    "manifest without a size": (
        text("manifest.json", '{"partita_manifest": 1, "files": {"model.safetensors": 5}}'),
        "'model.safetensors' must have a size and a sha256, but has 5",
    ),
    "state gone": (gone("training_state.json"), "training_state.json"),
    "state not JSON": (text("training_state.json", "{"), "training_state.json"),
    "state of another kind": (text("training_state.json", '{"partita_training": 2}'), "training_state.json"),
    "weights gone": (gone("model.safetensors"), "model.safetensors: is in the manifest, but cannot be found"),
    "weights cut short": (cut_short, "model.safetensors: must have"),
    "moments gone": (gone("optimizer.safetensors"), "optimizer.safetensors: is in the manifest, but cannot be found"),
    "all gone": (empty, "step-000002"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint(kind: str, run_folder: Path, partita: Run) -> None:
    make, says = BROKEN[kind]
    make(run_folder)
    said = partita("generate", str(run_folder), "hi", "--max-new-tokens", "1")
    assert said.code == 2
    assert says in error_of(said)
    assert error_of(said).endswith(f"Name an older one: {run_folder}/step-000001")
    said = partita("train", "--resume", "--out", str(run_folder), "--steps", "3")
    assert said.code == 0, said.err
    assert f"resuming from {run_folder}/step-000001" in said.err


@pytest.mark.parametrize("target", ["step-000099", "/etc", "."])
def test_a_link_to_elsewhere_is_not_followed(target: str, run_folder: Path, partita: Run) -> None:
    (run_folder / "latest").unlink()
    (run_folder / "latest").symlink_to(target)
    assert partita("generate", str(run_folder), "hi", "--max-new-tokens", "1").code == 0


def test_no_checkpoint_is_whole(run_folder: Path, partita: Run) -> None:
    for step in run_folder.glob("step-*"):
        (step / "model.safetensors").unlink()
    said = partita("train", "--resume", "--out", str(run_folder), "--steps", "3")
    assert said.code == 2
    assert f"{run_folder}: holds no complete checkpoint to resume from" in error_of(said, after=True)


def test_a_run_is_not_begun_over_another(run_folder: Path, partita: Run) -> None:
    said = partita(*NEW.split(), str(run_folder))
    assert said.code == 2
    assert "already holds a run (its last checkpoint is of step 2). Continue it with --resume" in error_of(said)
