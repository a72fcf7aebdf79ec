"""Commands over real ranks: train, save, generate, verify. A process each, as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.cli.models import TINY, write
from tests.support.ranks import ROOT

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(120)]

PARTITA = (sys.executable, "-m", "partita")
PROMPT = "import sys\n"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A tiny model that two ranks have trained and saved, and what the command said of it."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("import sys\nimport os\n" * 50)
    ended = run(
        *PARTITA, "train", "--config", write(folder, TINY), "--data", str(text), "--tp", "2", "--steps", "20",
        "--batch-size", "4", "--sequence-length", "16", "--learning-rate", "1e-2", "--out", str(folder / "model"), "--json",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "step 20/20  loss " in ended.stderr
    return folder / "model", json.loads(ended.stdout)


def test_training_learns_and_saves_a_hugging_face_folder(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, said = trained
    losses = [step["loss"] for step in said["steps"]]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    assert said["out"] == str(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}


def test_training_into_a_folder_with_a_model_is_refused_at_once(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    ended = run(*PARTITA, "train", "--model", str(folder), "--data", "stdlib", "--tp", "2", "--out", str(folder))
    assert ended.returncode == 2
    assert "already holds a model" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("axis", ["--tp", pytest.param("--cp", marks=pytest.mark.slow)])
def test_one_rank_and_two_write_the_same(trained: tuple[Path, dict[str, Any]], partita: Run, axis: str) -> None:
    folder, _ = trained
    command = ("generate", str(folder), PROMPT, "--max-new-tokens", "12")
    whole = partita(*command, "--json")
    assert whole.code == 0, whole.err
    written = json.loads(whole.out)["generations"][0]
    assert written["prompt_tokens"] == list(PROMPT.encode())
    assert len(written["tokens"]) == 12
    assert written["finish_reason"] == "length"

    streamed = run(*PARTITA, *command, axis, "2")
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout == PROMPT + written["text"] + "\n"
    assert streamed.stderr.startswith("12 tokens in ")


def test_what_only_the_ranks_can_see_is_said_once(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = trained
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    ended = run(*PARTITA, "generate", str(tmp_path), PROMPT, "--tp", "2")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("error") == 1


def test_what_one_rank_alone_sees(trained: tuple[Path, dict[str, Any]], tmp_path: Path, partita: Run) -> None:
    folder, _ = trained
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    said = partita("generate", str(tmp_path), PROMPT)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert "rank 0" not in said.err
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_ranks_of_torchrun_join(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "partita")
    command = ("generate", str(folder), PROMPT, "--max-new-tokens", "12", "--json")
    joined = run(*torchrun, *command, "--tp", "2")
    assert joined.returncode == 0, joined.stderr
    alone = run(*PARTITA, *command)
    assert json.loads(joined.stdout)["generations"] == json.loads(alone.stdout)["generations"]

    wrong = run(*torchrun, *command, "--tp", "3")
    assert wrong.returncode != 0
    assert wrong.stdout == ""
    assert wrong.stderr.count("has 3 ranks, but torchrun started 2") == 1


@pytest.mark.slow
def test_adapters_are_merged_into_what_is_saved(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = trained
    ended = run(
        *PARTITA, "train", "--model", str(folder), "--data", "stdlib", "--tp", "2", "--steps", "2", "--lora-rank", "2",
        "--out", str(tmp_path / "tuned"),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "are trained" in ended.stderr
    assert run(*PARTITA, "generate", str(tmp_path / "tuned"), PROMPT, "--max-new-tokens", "2").returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_the_demo(tmp_path: Path) -> None:
    command = (*PARTITA, "demo", "--steps", "5", "--out", str(tmp_path / "demo"))
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=470)
    assert ended.returncode == 0, ended.stderr
    assert len(re.findall(r"generated the same \d+ tokens as four ranks", ended.stdout)) >= 3
    assert "Split equals unsplit" in ended.stdout
    assert "All checks passed" in ended.stdout
    assert "Paris" in ended.stdout or "cannot be fetched" in ended.stdout
