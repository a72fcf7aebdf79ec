"""`train --lora-rank` with `--save-every` and `--resume`: adapters alone are kept, beside a model that must still be there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from partita.checkpoint.run_folder import RunFolder
from tests.cli.conftest import Run
from tests.cli.models import TINY
from tests.cli.test_resume import command, digest

ADAPTERS = [
    "adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.safetensors", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json", "training_state.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in `base`, its text, and a run over two tensor ranks of 8 steps, each fourth kept, in `run`."""
    from partita.generation import byte_tokenizer
    from partita.torch.collectives.groups import single_groups
    from partita.torch.new import fresh
    from partita.torch.weights.save import save

    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text("import sys\nimport os\n" * 60)
    save(fresh(TINY, seed=3, groups=single_groups()), folder / "base", tokenizer=byte_tokenizer())
    line, how = command("train", *begin(folder), "--tp", "2", "--save-every", "4", "--out", str(folder / "run"))
    ended = subprocess.run(line, **how, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert "step 4 saved to" in ended.stderr
    assert ended.stdout.splitlines()[-1] == f"saved to {folder}/run"
    return folder


def begin(folder: Path) -> list[str]:
    return [
        "--model", str(folder / "base"), "--data", str(folder / "text.txt"), "--batch-size", "4", "--sequence-length", "16",
        "--learning-rate", "1e-2", "--steps", "8", "--lora-rank", "3",
    ]  # fmt: skip


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(place / "run", tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def losses(said: str) -> list[float]:
    return [step["loss"] for step in json.loads(said)["steps"]]


def test_what_is_kept_and_what_is_left_at_the_end(partita: Run, place: Path) -> None:
    run = place / "run"
    assert RunFolder(run).steps() == [4, 8]
    for step in (4, 8):
        assert set(os.listdir(RunFolder(run).step_folder(step))) <= set(ADAPTERS)
    state = json.loads((run / "step-000008" / "training_state.json").read_text())
    assert state["base"]["path"] == str(place / "base")
    config = json.loads((run / "step-000008" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (str(place / "base"), 3)
    # At the end the last checkpoint's adapters, and the model that they are merged into.
    last = {name: one for name, one in digest(run / "step-000008").items() if name.startswith("adapter")}
    assert digest(run / "adapters") == last
    said = [partita("generate", str(run / one), "import", "--max-new-tokens", "4", "--json") for one in ("", "../base")]
    assert [one.code for one in said] == [0, 0], said
    tokens = [json.loads(one.out)["generations"][0]["tokens"] for one in said]
    assert tokens[0] != tokens[1]


def test_it_goes_on_as_if_it_had_not_been_stopped(partita: Run, place: Path, run: Path) -> None:
    alone = partita("train", *begin(place), "--json")
    assert alone.code == 0, alone.err
    shutil.rmtree(run / "step-000008")
    said = partita("train", "--resume", "--tp", "1", "--out", str(run), "--json")
    assert said.code == 0, said.err
    assert losses(said.out) == pytest.approx(losses(alone.out)[4:], rel=1e-5)
    assert RunFolder(run).steps() == [4, 8]
    assert json.loads(said.out)["out"] == str(run)


def test_more_steps_of_a_model_that_was_moved(partita: Run, place: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "moved")
    before = digest(run / "adapters")
    said = partita(
        "train",
        "--resume",
        "--tp",
        "1",
        "--out",
        str(run),
        "--model",
        str(tmp_path / "moved"),
        "--steps",
        "10",
        "--keep",
        "1",
        "--json",
    )
    assert said.code == 0, said.err
    assert [step["step"] for step in json.loads(said.out)["steps"]] == [9, 10]
    assert RunFolder(run).steps() == [10]
    # What is at the end is newer too.
    assert digest(run / "adapters").keys() == before.keys()
    assert digest(run / "adapters") != before
    state = json.loads((run / "step-000010" / "training_state.json").read_text())
    assert state["base"]["path"] == str(tmp_path / "moved")
    assert partita("generate", str(run), "import", "--max-new-tokens", "1").code == 0


def test_one_that_was_ended_before_it_had_merged(partita: Run, run: Path) -> None:
    done = partita("train", "--resume", "--tp", "1", "--out", str(run))
    assert done.code == 0
    assert "the run is complete: all 8 steps are done" in done.err
    before = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    said = partita("train", "--resume", "--tp", "1", "--out", str(run))
    assert (said.code, said.out) == (0, f"saved to {run}\n"), said.err
    after = load_file(run / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(np.allclose(after[name], tensor, rtol=1e-6, atol=1e-7) for name, tensor in before.items())


def test_the_other_engine_goes_on(partita: Run, place: Path, run: Path) -> None:
    pytest.importorskip("mlx_lm")
    expected = partita("train", *begin(place), "--json")
    shutil.rmtree(run / "step-000008")
    by_mlx = partita("train", "--resume", "--tp", "1", "--out", str(run), "--engine", "mlx", "--json")
    assert (expected.code, by_mlx.code) == (0, 0), by_mlx.err
    assert losses(by_mlx.out) == pytest.approx(losses(expected.out)[4:], rel=1e-5)
    assert RunFolder(run).steps() == [4, 8]
    assert {name for name in os.listdir(run) if not name.startswith("step-")} >= {
        "adapters",
        "model.safetensors",
        "latest",
    }
    # And torch goes on with what it has written.
    by_torch = partita(
        "train", "--resume", "--tp", "1", "--out", str(run), "--engine", "torch", "--steps", "9", "--json"
    )
    assert by_torch.code == 0, by_torch.err
    assert partita("generate", str(run), "import", "--max-new-tokens", "1", "--engine", "torch").code == 0


def test_on_mlx(partita: Run, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    said = partita("train", *begin(place), "--engine", "mlx", "--out", str(tmp_path / "model"), "--json")
    assert said.code == 0, said.err
    assert losses(said.out)[-1] < losses(said.out)[0]
    assert sorted(os.listdir(tmp_path / "model" / "adapters")) == ["adapter_config.json", "adapter_model.safetensors"]
    tokens = [
        json.loads(partita("generate", str(one), "import", "--max-new-tokens", "4", "--json").out)["generations"][0][
            "tokens"
        ]
        for one in (tmp_path / "model", place / "base")
    ]
    assert tokens[0] != tokens[1]


def test_a_base_that_is_gone_or_another(partita: Run, place: Path, run: Path, tmp_path: Path) -> None:
    state = run / "step-000008" / "training_state.json"
    data: dict[str, Any] = json.loads(state.read_text())
    state.write_text(json.dumps({**data, "base": {**data["base"], "path": str(tmp_path / "gone")}}))
    for given, message in (
        ([], f"belong to {tmp_path}/gone, but it cannot be read: {tmp_path}/gone does not exist."),
        (
            ["--model", str(place / "run")],
            f"but {place}/run is another model: its config, its tensors or their data differ.",
        ),
        (
            ["--lora-rank", "2"],
            "started with --lora-rank 3, not --lora-rank 2, and its adapters have their rank. Leave it out.",
        ),
    ):
        said = partita("train", "--resume", "--tp", "1", "--out", str(run), "--steps", "9", *given)
        assert (said.code, said.out) == (2, "")
        assert message in said.err
        assert said.err.count("\n") == 1


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_adapters_are_put_on_to_generate(engine: str, partita: Run, place: Path, run: Path) -> None:
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    asks = ["import", "--max-new-tokens", "6", "--json", "--engine", engine]
    merged = partita("generate", str(run), *asks)
    for folder in ("", "adapters", "step-000008"):
        apart = partita("generate", str(place / "base"), "--adapters", str(run / folder), *asks)
        assert (merged.code, apart.code) == (0, 0), merged.err + apart.err
        assert json.loads(merged.out)["generations"] == json.loads(apart.out)["generations"]
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "adapters")
    unfinished = partita("generate", str(place / "base"), "--adapters", str(run), *asks)
    assert json.loads(unfinished.out)["generations"] == json.loads(merged.out)["generations"]
    unmerged = partita("generate", str(run), *asks)
    assert unmerged.code == 2
    assert f"holds adapters, but no model. Give the model, and --adapters {run}/step-000008" in unmerged.err


def test_a_resumed_run_keeps_the_options_of_its_adapters(partita: Run, place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--lora-alpha", "9", "--lora-dropout", "0.2", "--lora-targets", "q_proj,down_proj", "--lora-rslora"]
    alone = partita("train", *begin(place), *options, "--json")
    first = partita("train", *begin(place), *options, "--save-every", "4", "--out", str(run))
    assert (alone.code, first.code) == (0, 0), alone.err + first.err
    config = json.loads((run / "adapters" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["lora_alpha"], config["lora_dropout"]) == (pytest.approx(9 * 3**0.5), 0.2)
    shutil.rmtree(run / "step-000008")
    other = partita("train", "--resume", "--lora-alpha", "8", "--out", str(run))
    assert other.code != 0
    reason = "the run started with --lora-alpha 9.0, not --lora-alpha 8.0, and its adapters were created with it."
    assert reason in " ".join(other.err.split())
    said = partita("train", "--resume", "--out", str(run), "--json")
    assert said.code == 0, said.err
    assert losses(said.out) == pytest.approx(losses(alone.out)[4:], rel=1e-5)
