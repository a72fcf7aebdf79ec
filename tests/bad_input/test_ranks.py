"""Bad input of which only the ranks can know, told once for all of them; nothing hangs, and nothing is left behind."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input.table import ENGINES, Case, contents, error_of, holds
from tests.cli.conftest import Said
from tests.support.ranks import ROOT

CASES = [
    *(
        Case(
            f"an empty prompt, {engine}",
            f"generate model '' --tp 2 --engine {engine}",
            "prompt 0 is empty: it must have",
        )
        for engine in ENGINES
    ),
    Case(
        "no such device", "generate model hi --tp 2 --device tpu", "device must be available on this machine...'tpu'."
    ),
    Case(
        "a text that is empty",
        "train --config config.json --data empty.txt --tp 2",
        "--data empty.txt: there is no text",
    ),
]


@pytest.mark.fresh
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_all_ranks_refuse_as_one(case: Case, folder: Path) -> None:
    before = contents(folder)
    command = [sys.executable, "-m", "partita", *shlex.split(case.line)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2, ended.stderr
    assert holds(error_of(Said(2, ended.stdout, ended.stderr)), case.says), ended.stderr
    assert contents(folder) == before
