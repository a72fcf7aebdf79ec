"""Ctrl-C left streamed text without a line end, so the message and the shell's prompt followed it on the same line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from partita.generation import byte_tokenizer
from tests.cli.models import TINY
from tests.support.ranks import ROOT
from tests.support.signals import take_signals

MANY = 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from partita.torch.collectives.groups import single_groups
    from partita.torch.new import fresh
    from partita.torch.weights.save import save

    folder = tmp_path_factory.mktemp("model") / "m"
    config = {**TINY, "max_position_embeddings": 2 * MANY}
    save(fresh(config, seed=3, groups=single_groups()), folder, tokenizer=byte_tokenizer())
    return folder


@pytest.mark.fresh
@pytest.mark.parametrize(
    ("engine", "tp"),
    [
        ("torch", 1),
        pytest.param("torch", 2, marks=pytest.mark.slow),
        pytest.param("mlx", 1, marks=pytest.mark.slow),
        pytest.param("mlx", 2, marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_ends_the_line(model: Path, engine: str, tp: int) -> None:
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    command = subprocess.Popen(
        [
            sys.executable, "-m", "partita", "generate", str(model), "import os", "--engine", engine, "--tp", str(tp),
            "--max-new-tokens", str(MANY), "--ignore-eos",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=take_signals, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert command.stdout is not None
    try:
        begun = command.stdout.read(40)  # the prompt, and some tokens
        os.killpg(command.pid, signal.SIGINT)  # as a terminal does
        rest, errors = command.communicate(timeout=90)
    finally:
        command.kill()
    assert begun.startswith(b"import os")
    assert (begun + rest).count(b"\n", -1) == 1
    assert errors == b"interrupted\n"
    assert command.returncode == 130
