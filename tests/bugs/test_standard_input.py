"""At tp 2 `--prompt-file /dev/stdin` was an empty prompt with exit code 0, `-` the prompt "-", and `<(...)` failed twice.

Ranks read files themselves then, and a pipe can be read once. Now the process that reads the command line reads them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from partita.generation import byte_tokenizer
from tests.cli.models import TINY, write
from tests.support.ranks import ROOT

PARTITA = (sys.executable, "-m", "partita")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from partita.torch.collectives.groups import single_groups
    from partita.torch.new import fresh
    from partita.torch.weights.save import save

    folder = tmp_path_factory.mktemp("model")
    save(fresh(TINY, seed=3, groups=single_groups()), folder / "m", tokenizer=byte_tokenizer())
    return folder / "m"


def run(*command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*PARTITA, *command), cwd=ROOT, input=given, capture_output=True, text=True, timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("prompt", [("--prompt-file", "-"), ("--prompt-file", "/dev/stdin"), ("-",)], ids=str)
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_prompt_comes_from_standard_input(model: Path, prompt: tuple[str, ...], tp: int) -> None:
    ended = run("generate", str(model), *prompt, "--tp", str(tp), "--max-new-tokens", "2", "--json", given="import ös")
    assert ended.returncode == 0, ended.stderr
    (written,) = json.loads(ended.stdout)["generations"]
    assert written["prompt"] == "import ös"
    assert len(written["tokens"]) == 2


@pytest.mark.slow
def test_a_process_substitution_is_read_once(model: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("import sys",))
    writer.start()
    ended = run("generate", str(model), "--prompt-file", str(pipe), "--tp", "2", "--max-new-tokens", "2", "--json")
    writer.join(10)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["generations"][0]["prompt"] == "import sys"


@pytest.mark.slow
def test_text_to_train_on_comes_from_standard_input(tmp_path: Path) -> None:
    options = (
        "--config",
        write(tmp_path, TINY),
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--sequence-length",
        "8",
        "--json",
    )
    text = "import sys\nimport os\n" * 40
    (tmp_path / "text.txt").write_text(text)
    losses = []
    for source in ("-", str(tmp_path / "text.txt")):
        ended = run("train", *options, "--data", source, "--tp", "2", given=text if source == "-" else "")
        assert ended.returncode == 0, ended.stderr
        losses.append([step["loss"] for step in json.loads(ended.stdout)["steps"]])
    assert losses[0] == losses[1]


def test_a_plan_and_a_config_come_from_standard_input(tmp_path: Path) -> None:
    ended = run("plan", "-", "--tp", "2", "--json", given=json.dumps(TINY))
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["mesh"] == {"dp": 1, "pp": 1, "tp": 2}
    twice = run("generate", "x", "-", "--prompt-file", "-", given="a")
    assert twice.returncode == 2
    assert "standard input was read already" in twice.stderr
    assert twice.stderr.count("\n") == 1
