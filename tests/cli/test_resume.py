"""`train --save-every` and `--resume`: a run that is killed goes on as if it had not been, and what cannot be is told."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from partita.checkpoint.run_folder import RunFolder
from tests.cli.conftest import Run
from tests.cli.models import TINY, write
from tests.support.ranks import ROOT

GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 257,
    "n_positions": 64, "attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
STEPS = 240


def command(*arguments: str) -> tuple[list[str], dict[str, Any]]:
    """A command line to start, and how."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "partita", *arguments], {"cwd": ROOT, "env": env}


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def wait_until_nothing_changes(folder: Path) -> None:
    """Ranks end with their launcher, but not in the same moment."""
    before: list[Path] = []
    while before != (before := sorted(folder.rglob("*"))):
        time.sleep(0.5)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("import sys\nimport os\nprint(os.getcwd(), sys.argv)\n" * 60)
    return str(tmp_path / "text.txt")


def options(config: str, text: str) -> list[str]:
    return [
        "--config",
        config,
        "--data",
        text,
        "--batch-size",
        "4",
        "--sequence-length",
        "16",
        "--learning-rate",
        "1e-2",
    ]


@pytest.mark.slow
@pytest.mark.fresh
@pytest.mark.timeout(120)
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path: Path, text: str) -> None:
    """kill -9 in the middle, with dropout; then the same losses and the same bytes."""
    begin = ["train", *options(write(tmp_path, GPT2), text), "--steps", str(STEPS), "--save-every", "20"]
    line, how = command(*begin, "--out", str(tmp_path / "whole"), "--json")
    whole = subprocess.run(line, **how, capture_output=True, text=True, timeout=100)
    assert whole.returncode == 0, whole.stderr

    run = RunFolder(tmp_path / "killed")
    line, how = command(*begin, "--out", str(run.path))
    process = subprocess.Popen(line, **how, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while len(run.steps()) < 2 and time.monotonic() < until:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    last = run.steps()[-1]
    assert 40 <= last < STEPS

    line, how = command("train", "--resume", "--out", str(run.path), "--json")
    again = subprocess.run(line, **how, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert f"resuming from {run.path}/step-{last:06d}" in again.stderr
    expected, found = json.loads(whole.stdout), json.loads(again.stdout)
    assert found["steps"][0]["step"] == last + 1
    keys = ("step", "loss", "grad_norm", "learning_rate")
    assert [[step[key] for key in keys] for step in found["steps"]] == [
        [step[key] for key in keys] for step in expected["steps"][last:]
    ]
    assert run.steps() == RunFolder(tmp_path / "whole").steps() == list(range(20, STEPS + 1, 20))
    end = f"step-{STEPS:06d}"
    mine, theirs = (digest(folder / end) for folder in (run.path, tmp_path / "whole"))
    # transformers writes into a tokenizer's config that it was read from a folder.
    changed = {"tokenizer_config.json", "manifest.json"}
    assert {name for name in theirs if mine[name] != theirs[name]} <= changed
    assert sorted(os.listdir(run.path)) == sorted(["config.json", "latest", *(p.name for p in run.path.glob("step-*"))])


@pytest.mark.fresh
@pytest.mark.timeout(120)
def test_ranks_that_were_killed_go_on_as_others(partita: Run, tmp_path: Path, text: str) -> None:
    """Two ranks are killed, and one rank, then two stages, go on; the loss is that of a run of one rank alone."""
    config = write(tmp_path, TINY)
    begin = ["train", *options(config, text), "--save-every", "10"]
    alone = partita(*begin, "--steps", "40", "--out", str(tmp_path / "alone"), "--json")
    assert alone.code == 0, alone.err
    losses = [step["loss"] for step in json.loads(alone.out)["steps"]]
    run = RunFolder(tmp_path / "killed")
    line, how = command(*begin, "--steps", "40", "--tp", "2", "--out", str(run.path))
    process = subprocess.Popen(line, **how, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not run.steps() and time.monotonic() < until:
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    wait_until_nothing_changes(run.path)
    for step in run.steps()[1:]:  # however far it came
        shutil.rmtree(run.step_folder(step))
    (run.path / "latest").unlink(missing_ok=True)
    (run.path / ".step-000020.partial").mkdir(exist_ok=True)
    line, how = command(
        "train", "--resume", "--out", str(run.path), "--pp", "2", "--microbatches", "2", "--keep", "3", "--json"
    )
    again = subprocess.run(line, **how, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert [step["loss"] for step in found["steps"]] == pytest.approx(losses[10:], rel=1e-5)
    # What was not given again was as in the first command.
    assert [one["step"] for one in found["checkpoints"]] == [20, 30, 40]
    assert run.steps() == [20, 30, 40]
    assert found["checkpoints"][-1]["folder"] == found["out"] == str(run.step_folder(40))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints at 4 and 8, in `run`, on `text.txt`."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "text.txt").write_text("import sys\nimport os\n" * 60)
    line, how = command(
        "train", *options(write(folder, TINY), str(folder / "text.txt")), "--steps", "8", "--save-every", "4", "--out",
        str(folder / "run"),
    )  # fmt: skip
    ended = subprocess.run(line, **how, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert "step 4 saved to" in ended.stderr
    assert "of which training was paused for" in ended.stderr
    assert ended.stdout.splitlines()[-1] == f"saved to {folder}/run/step-000008"
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(begun / "run", tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_generate_takes_the_newest_of_a_run(partita: Run, run: Path) -> None:
    said = [
        partita("generate", str(place), "import", "--max-new-tokens", "3", "--json")
        for place in (run, run / "latest", run / "step-000008", run / "step-000004")
    ]
    assert [one.code for one in said] == [0] * 4, said
    tokens = [json.loads(one.out)["generations"][0]["tokens"] for one in said]
    assert tokens[0] == tokens[1] == tokens[2]
    (run / "step-000008" / "model.safetensors").write_bytes(b"")
    cut = partita("generate", str(run), "import")
    assert cut.code == 2
    assert "step-000008/model.safetensors: must have" in cut.err
    assert cut.err.count("\n") == 1


def test_verify_takes_the_newest_of_a_run(partita: Run, run: Path) -> None:
    said = partita("verify", str(run), "--steps", "0")
    assert said.code == 0, said.err


def test_a_broken_one_is_passed_over(partita: Run, run: Path) -> None:
    with (run / "step-000008" / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff\xff\xff")
    said = partita("train", "--resume", "--out", str(run), "--json")
    assert said.code == 0, said.err
    assert "step-000008/model.safetensors: must have the SHA-256" in said.err
    assert f"resuming from {run}/step-000004" in said.err
    assert [step["step"] for step in json.loads(said.out)["steps"]] == [5, 6, 7, 8]
    assert sorted(os.listdir(run)) == ["config.json", "latest", "step-000004", "step-000008"]
    # Now it is whole again.
    assert partita("generate", str(run), "import", "--max-new-tokens", "1").code == 0


def test_the_other_engine_goes_on(partita: Run, begun: Path, run: Path) -> None:
    pytest.importorskip("mlx_lm")
    expected = partita("train", *options(str(begun / "config.json"), str(begun / "text.txt")), "--steps", "8", "--json")
    shutil.rmtree(run / "step-000008")
    said = partita("train", "--resume", "--out", str(run), "--engine", "mlx", "--json")
    assert (expected.code, said.code) == (0, 0), said.err
    losses = [[step["loss"] for step in json.loads(one.out)["steps"]] for one in (expected, said)]
    assert losses[1] == pytest.approx(losses[0][4:], rel=1e-5)
    assert RunFolder(run).steps() == [4, 8]
    # And torch reads what it has written.
    assert partita("generate", str(run), "import", "--max-new-tokens", "1", "--engine", "torch").code == 0


def test_more_steps(partita: Run, run: Path) -> None:
    said = partita("train", "--resume", "--out", str(run), "--steps", "10", "--keep", "1", "--no-verify", "--json")
    assert said.code == 0, said.err
    assert [step["step"] for step in json.loads(said.out)["steps"]] == [9, 10]
    assert RunFolder(run).steps() == [10]


def test_a_complete_run_is_no_error(partita: Run, run: Path) -> None:
    before = sorted(file.name for file in run.rglob("*"))
    said = partita("train", "--resume", "--out", str(run))
    assert said.code == 0, said.err
    assert "the run is complete: all 8 steps are done. Give more --steps to continue it." in said.err
    assert said.out == f"saved to {run / 'step-000008'}\n"
    assert sorted(file.name for file in run.rglob("*")) == before


REFUSED: list[tuple[str, str]] = [
    ("--seed 1", "which differs in seed (0 then, 1 now)"),
    ("--batch-size 8", "which differs in batch_size (4 then, 8 now)"),
    ("--sequence-length 8", "which differs in sequence_length (16 then, 8 now)"),
    ("--learning-rate 1", "which differs in learning_rate (0.01 then, 1.0 now)"),
    ("--warmup-steps 3", "which differs in warmup_steps (10 then, 3 now)"),
    ("--steps 7", "which differs in steps (8 then, 7 now; more are allowed)"),
    ("--autocast bfloat16", "which differs in autocast (None then, 'bfloat16' now)"),
    ("--master-dtype model", "which differs in master_dtype ('float32' then, 'model' now)"),
    ("--config other.json", "not --config other.json, and its weights are those of the checkpoint. Leave it out."),
    ("--model other", "no --model, not --model other, and its weights are those of the checkpoint. Leave it out."),
    (
        "--dtype float64",
        "not --dtype float64, and its weights and the optimizer's state have their dtype. Leave it out.",
    ),
    ("--lora-rank 2", "no --lora-rank, not --lora-rank 2, and its adapters have their rank. Leave it out."),
    ("--data nowhere.txt", "--data nowhere.txt: there is no such file or folder."),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_would_be_another_run_is_refused(partita: Run, begun: Path, given: str, message: str) -> None:
    before = sorted(begun.rglob("*"))
    said = partita("train", "--resume", "--out", str(begun / "run"), *given.split())
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert sorted(begun.rglob("*")) == before


def test_another_text_is_refused(partita: Run, run: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("something else\n" * 100)
    said = partita("train", "--resume", "--out", str(run), "--steps", "9", "--data", str(tmp_path / "other.txt"))
    assert said.code == 2
    assert "differs in the text (1261 tokens then, 1501 now, of other content)" in said.err


NOT_SO: list[tuple[str, str]] = [
    ("--save-every 2", "--save-every needs a folder for its checkpoints. Give --out."),
    ("--keep 2 --out x", "--keep limits the checkpoints that --save-every saves."),
    ("--no-verify", "--no-verify is for --resume. Leave it out."),
    ("--resume", "--resume continues from the newest checkpoint in --out DIR. Give --out."),
    ("--resume --out nowhere", "--out nowhere holds no checkpoint to resume from."),
    (
        "--save-every 2 --lora-rank 2 --out x",
        "saves only adapters, so resuming needs their model on disk. Give --model,",
    ),
]


@pytest.mark.parametrize(("given", "message"), NOT_SO)
def test_what_does_not_go_together(
    partita: Run, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = partita("train", *options(write(tmp_path, TINY), text), *given.split())
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert said.err.count("\n") == 1


def test_a_run_is_not_begun_in_the_folder_of_another(partita: Run, begun: Path, tmp_path: Path, text: str) -> None:
    said = partita("train", *options(write(tmp_path, TINY), text), "--out", str(begun / "run"))
    assert said.code == 2
    assert (
        "already holds a run (its last checkpoint is of step 8). Continue it with --resume, or name another" in said.err
    )


def test_there_must_be_data(partita: Run, tmp_path: Path) -> None:
    said = partita("train", "--config", write(tmp_path, TINY))
    assert said.code == 2
    assert "there is no training data. Give --data" in said.err


def test_without_save_every_there_is_one_model_as_ever(partita: Run, tmp_path: Path, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    said = partita("train", *options(write(tmp_path, TINY), text), "--steps", "2", "--out", str(tmp_path / "model"))
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] == f"saved to {tmp_path}/model"
    names = set(os.listdir(tmp_path / "model"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"manifest.json", "optimizer.safetensors", "latest", ".partial"}
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not list(tmp_path.glob(".*"))


def test_adapters_lie_beside_the_model_that_they_are_merged_into(partita: Run, tmp_path: Path, text: str) -> None:
    said = partita(
        "train",
        *options(write(tmp_path, TINY), text),
        "--steps",
        "2",
        "--lora-rank",
        "2",
        "--out",
        str(tmp_path / "model"),
    )
    assert said.code == 0, said.err
    assert sorted(os.listdir(tmp_path / "model" / "adapters")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert partita("generate", str(tmp_path / "model"), "import", "--max-new-tokens", "1").code == 0


def test_a_loss_that_is_no_number_is_one_line(partita: Run, tmp_path: Path, text: str) -> None:
    said = partita(
        "train", *options(write(tmp_path, TINY), text), "--steps", "50", "--learning-rate", "1e30", "--warmup-steps", "0",
        "--grad-clip", "0", "--save-every", "1", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert said.code == 1
    assert any(line.startswith("error: step 2: the loss is ") for line in said.err.splitlines())
    assert "Traceback" not in said.err
    assert RunFolder(tmp_path / "run").newest() == tmp_path / "run" / "step-000001"


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_a_changed_checkpoint_is_no_model(engine: str, partita: Run, run: Path) -> None:
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    newest = RunFolder(run).newest()
    file = newest / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    asks = ["import", "--max-new-tokens", "2", "--engine", engine]
    for model in (run, newest):
        said = partita("generate", str(model), *asks)
        assert said.code == 2
        assert "model.safetensors: must have the SHA-256" in said.err
        assert said.err.count("\n") == 1
    assert partita("generate", str(run), *asks, "--no-verify").code == 0
    (newest / "optimizer.safetensors").write_bytes(b"")  # which has nothing to do with the model
    file.write_bytes(bytes([*raw[:-3], raw[-3] ^ 1, *raw[-2:]]))
    assert partita("generate", str(newest), *asks).code == 0
