from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from partita.cli import app
from tests.bad_input import models
from tests.cli.conftest import partita

__all__ = ["partita"]

WORDS = "Some words to learn from, and then a few more of them.\n" * 9


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the rows name: models, texts, schedules, and files that are none of these."""
    place = tmp_path_factory.mktemp("bad_input")
    models.write(place / "model")
    models.write(place / "gpt2", models.GPT2, models.weights(models.GPT2))
    (place / "config.json").write_bytes((place / "model" / "config.json").read_bytes())
    (place / "small.json").write_text(json.dumps({**models.LLAMA, "vocab_size": 100, "eos_token_id": 1}))
    for name in ("empty", "notext", "notext/deeper"):
        (place / name).mkdir()
    texts = {
        "words.txt": WORDS, "empty.txt": "", "short.txt": "ab", "not.json": "{model_type: llama}", "notext/a.bin": "xx",
        "cell.csv": "0F0,0Q0\n", "twice.csv": "0F0,0F0,0BW0\n", "late.csv": "0BW0,0F0\n", "gap.csv": "0F0,0BW0,0F2,0BW2\n",
        "homes.csv": "0F0,0BW0\n0F0,0BW0\n", "hole.csv": "0F0,2F0,0BW0,2BW0\n", "huge.csv": "0F999999999\n",
        "page.csv": "<!DOCTYPE html>\n",
    }  # fmt: skip
    for name, text in texts.items():
        (place / name).write_text(text, encoding="utf-8")
    (place / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    (place / "latin.csv").write_bytes(b"0F0,\xff\n")
    return place


COMMANDS = typer.main.get_command(app)
"""The commands as typer makes them of functions, which takes longer than most rows: they are made once."""


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in the folder, alone and without a hub."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("typer.main.get_command", lambda _: COMMANDS)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "PARTITA_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.pop("HF_HUB_OFFLINE", None)
