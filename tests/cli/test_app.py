"""What all commands share: help, the version, usage errors, tracebacks, and what is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from partita import __version__
from partita.cli.terminal.console import sparkline
from partita.errors import DivergedError
from tests.cli.conftest import Run
from tests.support.ranks import ROOT

COMMANDS = ("layout", "plan", "schedule", "generate", "train", "verify", "convert", "demo")


def test_version(partita: Run) -> None:
    assert partita("--version").out == f"partita {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(partita: Run, command: str) -> None:
    said = partita(command, "--help")
    assert said.code == 0
    assert "Examples" in said.out
    assert f"$ partita {command}" in said.out


def test_help_names_every_command(partita: Run) -> None:
    said = partita("--help")
    assert all(f" {command} " in said.out for command in COMMANDS)
    assert "reference" not in said.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",), ("plan",), ("plan", "x", "--tp", "0"), ("plan", "x", "--tp", "two"), ("layout", "EtL"),
        ("layout", "EtL", "--pp", "1", "--no-such-option"), ("generate", "x", "y", "--dtype", "int3"),
        ("train", "--config", "x", "--data", "stdlib", "--steps", "0"),
    ],
)  # fmt: skip
def test_usage_errors(partita: Run, arguments: tuple[str, ...]) -> None:
    said = partita(*arguments)
    assert said.code == 2
    assert "Traceback" not in said.err + said.out
    assert "Usage: partita" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "./nowhere", "hello", "--tp", "2"), "./nowhere does not exist"),
        (("generate", "./nowhere"), "there is no prompt"),
        (("train", "--data", "stdlib"), "either --config"),
        (("train", "--config", "a.json", "--model", "b", "--data", "stdlib"), "Give one of them"),
        (("train", "--config", "a.json", "--data", "stdlib"), "a.json does not exist"),
        (("verify", "./nowhere", "--tp", "2"), "./nowhere does not exist"),
    ],
)
def test_mistakes_are_told_before_anything_starts(partita: Run, arguments: tuple[str, ...], message: str) -> None:
    said = partita(*arguments)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1


def test_a_prompt_file_that_is_not_text(partita: Run, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"ab\xff")
    said = partita("generate", "x", "--prompt-file", str(tmp_path / "prompt"))
    assert said.code == 2
    assert said.err == f"error: --prompt-file {tmp_path}/prompt is not UTF-8 text: invalid start byte at byte 2.\n"


def test_debug_shows_the_traceback_and_the_message_once(partita: Run) -> None:
    said = partita("--debug", "plan", "./nowhere")
    assert said.code == 2
    assert said.err.count("Traceback") == 1
    assert said.err.count("error: ./nowhere does not exist") == 1


def test_a_mistake_of_ours_is_one_line_that_names_debug(partita: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partita.cli.layout.Layout", None)
    said = partita("layout", "EtL", "--pp", "1")
    assert said.code == 1
    assert said.err.splitlines() == [
        "error: TypeError: 'NoneType' object is not callable",
        "`partita --debug ...` shows where it was raised.",
    ]


def test_a_run_that_diverges_is_one_line(partita: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object) -> None:
        raise DivergedError("the loss is not finite")

    monkeypatch.setattr("partita.cli.layout.Layout", diverge)
    said = partita("layout", "EtL", "--pp", "1")
    assert (said.code, said.err) == (1, "error: the loss is not finite\n")


def test_ctrl_c(partita: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("partita.cli.layout.Layout", interrupt)
    said = partita("layout", "EtL", "--pp", "1")
    assert (said.code, said.err) == (130, "interrupted\n")


@pytest.mark.parametrize("world", ["3", "", "x"])
def test_a_launcher_with_another_number_of_ranks(
    partita: Run, monkeypatch: pytest.MonkeyPatch, world: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.cli.models import TINY, write

    config = write(tmp_path_factory.mktemp("tiny"), TINY)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", world)
    said = partita("verify", config, "--tp", "2")
    assert said.code == 2
    assert ("the launcher started 3" if world == "3" else "WORLD_SIZE") in said.err
    assert said.err.count("\n") == 1


@pytest.mark.fresh
def test_help_loads_no_framework() -> None:
    program = (
        "import sys; from partita.cli import main; sys.argv = ['partita', 'train', '--help']\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 0, ended.stderr
    assert "Examples" in ended.stdout


def test_the_demo_writes_into_new_folders_only(partita: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    said = partita("demo", "--out", str(tmp_path))
    assert said.code == 2
    assert said.err == f"error: --out {tmp_path} already exists and is not empty. Name a new folder.\n"
    assert (tmp_path / "config.json").read_text() == "{}"


def test_the_loss_is_drawn_as_a_line_of_bars() -> None:
    assert sparkline([8, 4, 4, 1]) == "█▄▄▁"
    assert sparkline([float(i) for i in range(80)], width=8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁!█"
    assert sparkline([3.0]) == "▁"
