"""`--help` of every command fits 80 columns: short metavars, whole words, defaults, and examples that can be copied."""

from __future__ import annotations

import re
import shlex

import pytest
from typer.main import get_command

from partita.cli.app import app
from tests.cli.conftest import Run

COMMANDS = [name for name, command in get_command(app).commands.items() if not command.hidden]  # type: ignore[attr-defined]


def shown(partita: Run, *arguments: str) -> str:
    said = partita(*arguments, "--help")
    assert (said.code, said.err) == (0, "")
    return said.out


@pytest.mark.parametrize("columns", [None, "80", "200"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_fits(partita: Run, monkeypatch: pytest.MonkeyPatch, command: str, columns: str | None) -> None:
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    lines = shown(partita, *([command] if command else [])).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(re.search(r"<int|<str|<bool|\[x|x>=|\x1b", line) for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_short_metavar_and_whole_words(partita: Run, command: str) -> None:
    lines = shown(partita, command).splitlines()
    inside = " ".join(line.strip("│ ") for line in lines if line.startswith("│"))
    words = set(inside.split())
    for param in get_command(app).commands[command].params:  # type: ignore[attr-defined]
        if param.name == "help":
            continue
        metavar = param.metavar or ""
        assert len(metavar) <= 12, param.name
        label = metavar if param.param_type_name == "argument" else f"{max(param.opts, key=len)} {metavar}".strip()
        assert label in inside
        text = re.sub(r"\[/?bold\]", "", param.help or "")
        assert {word.rstrip(".") for word in text.split()} <= {word.rstrip(".") for word in words}, param.name


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("plan", "--tp N"), ("plan", "ranks (default: 1)."), ("train", "--learning-rate X"), ("schedule", "--comm TIME"),
        ("train", "rate (default: 0.0003)."), ("schedule", "ranks (default: 0.0)."), ("generate", "--engine torch|mlx"),
        ("verify", "One of float64, float32, bfloat16, float16."), ("layout", "ranks (required)."),
        ("verify", "Usage: partita verify [OPTIONS] MODEL\n"), ("plan", "Usage: partita plan [OPTIONS] [MODEL]\n"),
        ("generate", "Usage: partita generate [OPTIONS] MODEL [PROMPT...]\n"),
    ],
)  # fmt: skip
def test_names_and_defaults(partita: Run, command: str, text: str) -> None:
    shown_text = shown(partita, command)
    assert text in shown_text or text in " ".join(shown_text.replace("│", " ").split())


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_can_be_copied(partita: Run, command: str) -> None:
    """Each is a command line for a shell whose options exist."""
    text = shown(partita, command).partition("\nExamples\n")[2]
    names = {name for param in get_command(app).commands[command].params for name in param.opts}  # type: ignore[attr-defined]
    found = [shlex.split(line) for line in text.replace(" \\\n", " ").splitlines()]
    assert found
    for dollar, *words in found:
        assert dollar == "$"
        options = words[words.index("partita") + 1 :]
        assert options[0] == command
        assert {word for word in options if word.startswith("--")} <= names


def test_panels_group_the_options(partita: Run) -> None:
    titles = re.findall(r"╭─ (.+?) ─", shown(partita, "generate"))
    assert titles == [
        "Arguments", "Split", "Text", "Sampling", "Weights", "Ranks and engine", "Output", "A file of prompts",
        "Requests and cache", "General",
    ]  # fmt: skip
    general = shown(partita, "generate").partition("─ General ")[2]
    assert re.findall(r"--[a-z-]+", general.partition("╰")[0]) == ["--help"]


def test_without_arguments_the_commands_are_listed(partita: Run) -> None:
    said = partita()
    assert all(f" {command} " in said.out + said.err for command in COMMANDS)


def test_borders_are_ascii_where_stdout_is(partita: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    from partita.cli.terminal import console, help

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    console._console.cache_clear()
    command = get_command(app)
    try:
        with command.make_context("partita", ["plan"], resilient_parsing=True) as context:
            assert help.help_text(command, context).isascii()
    finally:
        console._console.cache_clear()
