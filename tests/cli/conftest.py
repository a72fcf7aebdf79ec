from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from partita.cli import main
from partita.cli.terminal import console


class Said(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def partita(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def run(*arguments: str) -> Said:
        before = dict(os.environ)
        monkeypatch.setattr(sys, "argv", ["partita", *arguments])
        console._console.cache_clear()
        with pytest.raises(SystemExit) as ended:
            main()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]  # one rank alone sets what a launcher would have set
        said = capfd.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return run
