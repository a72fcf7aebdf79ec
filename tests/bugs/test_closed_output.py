"""`partita generate ... | head -c 4` hung for 30 s and then reported a lost rank; stdout that is not UTF-8 crashed a
command in the middle of its text."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from partita.cli import main
from partita.cli.terminal import console
from tests.bugs.test_stop_texts_and_spaces import written
from tests.cli.models import TINY, write
from tests.cli.test_launch import gone_by, pids
from tests.support.ranks import ROOT

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(120)]

PARTITA = (sys.executable, "-m", "partita")
CLOSED = 141
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "partita")
MLX_LAUNCH = (str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--", *PARTITA)


def unread(*command: str, stderr: bool = False, **environment: str) -> tuple[int, str]:
    """Run a command of which nobody reads stdout, nor stderr if so wished: its exit code, and what it wrote to stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            command, cwd=ROOT, stdout=writing, stderr=writing if stderr else subprocess.PIPE, timeout=100,
            env={**os.environ, **environment},
        )  # fmt: skip
    finally:
        os.close(writing)
    return ended.returncode, (ended.stderr or b"").decode()


def test_ranks_end_when_the_first_is_not_read_any_more(tmp_path: Path) -> None:
    launcher = f"{sys.executable} -m tests.cli.launcher first_writes_without_end 2"
    ended = subprocess.run(
        ["bash", "-c", f"{launcher} | head -c 4; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, "PIDS": str(tmp_path)},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (CLOSED, "one ", "")
    assert gone_by(pids(tmp_path, 2), 0.0)


COMMANDS = {
    "layout": ("layout", "Et|tL", "--pp", "2"),
    "plan": ("plan", "CONFIG"),
    "plan-json": ("plan", "CONFIG", "--json"),
    "schedule": ("schedule", "--kind", "1f1b", "--pp", "2", "--microbatches", "4"),
    "schedule-csv": ("schedule", "--kind", "1f1b", "--pp", "2", "--microbatches", "4", "--csv"),
}


@pytest.mark.parametrize("name", ["plan", "plan-json", *(pytest.param(c, marks=pytest.mark.slow) for c in COMMANDS)])
def test_commands_end_quietly(tmp_path: Path, name: str) -> None:
    config = write(tmp_path, TINY)
    command = [config if part == "CONFIG" else part for part in COMMANDS[name]]
    assert unread(*PARTITA, *command) == (CLOSED, "")
    assert unread(*PARTITA, *command, stderr=True) == (CLOSED, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "engine", "tp"),
    [
        (PARTITA, "torch", 1), (PARTITA, "torch", 2), (PARTITA, "mlx", 1), (PARTITA, "mlx", 2), (TORCHRUN, "torch", 2),
        (MLX_LAUNCH, "mlx", 2),
    ],
)  # fmt: skip
def test_generating_ends(tmp_path: Path, launcher: tuple[str, ...], engine: str, tp: int) -> None:
    written(tmp_path)
    command = ("generate", str(tmp_path), "a", "--engine", engine, "--tp", str(tp), "--ignore-eos")
    code, said = unread(*launcher, *command)
    assert "was lost" not in said
    if launcher == PARTITA:
        assert (code, said) == (CLOSED, "")
    else:  # the launcher, whose own pipe it is, shows a traceback of its own
        assert code != 0


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("command", ["train", "verify"])
def test_training_and_verifying_end(tmp_path: Path, command: str, tp: int) -> None:
    config = write(tmp_path, TINY)
    (tmp_path / "text.txt").write_text("import sys\n" * 100)
    options = {
        "train": ("--config", config, "--data", str(tmp_path / "text.txt"), "--steps", "2", "--sequence-length", "8",
                  "--out", str(tmp_path / "out")),
        "verify": (config, "--dtype", "float64"),
    }  # fmt: skip
    code, said = unread(*PARTITA, command, *options[command], "--tp", str(tp))
    assert code == CLOSED
    assert "error" not in said


@pytest.mark.parametrize("options", [("--help",), ("train", "--help")])
def test_help_ends(options: tuple[str, ...]) -> None:
    assert unread(*PARTITA, *options) == (CLOSED, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_that_cannot_be_printed(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    command = ("generate", str(tmp_path), "a", "--ignore-eos", "--max-new-tokens", "8")
    assert printed(monkeypatch, encoding, *command) == b"a bc d??\n"
    data = printed(monkeypatch, encoding, *command, "--json")
    assert data.isascii()
    assert json.loads(data)["generations"][0]["text"] == " bc d€\ufffd"


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, *command: str) -> bytes:
    """What a command of this process writes to a stdout of this encoding."""
    written_bytes, before = io.BytesIO(), dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["partita", *command])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written_bytes, encoding=encoding))
    console._console.cache_clear()
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        console._console.cache_clear()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]  # one rank alone sets what a launcher would have set
    assert not ended.value.code
    return written_bytes.getvalue()
