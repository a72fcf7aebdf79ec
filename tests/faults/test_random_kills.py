"""A run whose ranks are killed at random, again and again, ends with the bytes of the run that was left alone.

Dropout, adapters, their moments, the order of the data and what is saved while a rank dies are all in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from partita.checkpoint.run_folder import RunFolder
from tests.support.ranks import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.fresh, pytest.mark.timeout(900)]

GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 257,
    "n_positions": 64, "attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
STEPS = int(os.environ.get("PARTITA_KILLS_STEPS", "200"))
SAVE_EVERY = 5
KILLS = 3
SEED = int(os.environ.get("PARTITA_KILLS_SEED", "0"))
"""Of when which rank is killed."""

LOST = 75


def start(arguments: list[str]) -> Any:
    # A killed rank is detected at once; only busy machines need the longer limit for silence.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "PARTITA_LOST_AFTER": "120"}
    return subprocess.Popen(
        [sys.executable, "-m", "partita", *arguments], cwd=ROOT, env=env, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def end(process: Any) -> tuple[int, str]:
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def ranks_of(launcher: Any) -> list[int]:
    """The processes of the ranks that a command has started; what Open MPI starts beside them is none."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(launcher.pid)], capture_output=True, text=True, check=True
    ).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "-m partita train" in line]


def kill_one(run: RunFolder, launcher: Any, at_step: int, chance: random.Random) -> None:
    """End some rank with SIGKILL at some time behind the checkpoint of a step."""
    until_s = time.monotonic() + 300
    while not [step for step in run.steps() if step >= at_step]:
        assert launcher.poll() is None, end(launcher)
        assert time.monotonic() < until_s
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.3))
    os.kill(chance.choice(ranks_of(launcher)), signal.SIGKILL)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.suffix == ".safetensors" or file.name == "training_state.json"
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from partita.generation import byte_tokenizer
    from partita.torch.collectives.groups import single_groups
    from partita.torch.new import fresh
    from partita.torch.weights.save import save

    folder = tmp_path_factory.mktemp("base")
    save(fresh(GPT2, seed=3, groups=single_groups()), folder / "base", tokenizer=byte_tokenizer())
    (folder / "text.txt").write_text("import sys\nimport os\nprint(os.getcwd(), sys.argv)\n" * 60)
    return folder


@pytest.mark.parametrize("layout", ["--tp 2 --pp 2", "--dp 2"])
def test_it_ends_with_the_bytes_of_the_run_that_was_left_alone(layout: str, base: Path, tmp_path: Path) -> None:
    begin = [
        "train", "--model", str(base / "base"), "--data", str(base / "text.txt"), "--batch-size", "4", "--sequence-length",
        "16", "--learning-rate", "1e-2", "--steps", str(STEPS), "--lora-rank", "2", "--save-every", str(SAVE_EVERY),
        *layout.split(),
    ]  # fmt: skip
    code, err = end(start([*begin, "--out", str(tmp_path / "whole")]))
    assert code == 0, err

    run, chance = RunFolder(tmp_path / "killed"), random.Random(f"{SEED} {layout}")
    command = [*begin, "--out", str(run.path)]
    reached = 0
    for part in range(KILLS):
        at_step = max(STEPS * part // KILLS, reached) + chance.randint(1, STEPS // (2 * KILLS))
        assert at_step < STEPS - SAVE_EVERY
        launcher = start(command)
        try:
            kill_one(run, launcher, at_step, chance)
            code, err = end(launcher)
        finally:
            launcher.kill()
            launcher.communicate()
        assert code == LOST, err
        assert "was ended by SIGKILL" in err
        reached = run.steps()[-1]
        command = ["train", "--resume", "--out", str(run.path)]
    code, err = end(start(command))
    assert code == 0, err
    assert f"resuming from {run.path}/step-{reached:06d}" in err
    assert run.steps() == list(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY))
    assert digest(run.path) == digest(tmp_path / "whole")
    assert sorted(path.name for path in run.path.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    state = json.loads((run.step_folder(STEPS) / "training_state.json").read_text())
    assert state["step"] == STEPS
