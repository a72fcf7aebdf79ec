"""Errors on the command line name its options, not the arguments of the library or of Megatron-LM."""

from __future__ import annotations

from pathlib import Path

import pytest

from partita.cli.terminal.option_names import as_options
from tests.cli.conftest import Run
from tests.cli.models import TINY, write


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("pp=5 needs at least 5 layers. Use pp=4 or less.", "--pp 5 needs at least 5 layers. Use --pp 4 or less."),
        ("pp x vpp=6 needs at least 6 layers.", "--pp x --vpp = 6 needs at least 6 layers."),
        ("Leave it out, or use tp=1.", "Leave it out, or use --tp 1."),
        ("Use etp=1 with ep=2, or cp=2.", "Use --etp 1 with --ep 2, or --cp 2."),
        ("vpp must be a whole number", "--vpp must be a whole number"),
        ("dp x pp x tp must come to at most 8", "dp x pp x tp must come to at most 8"),
        ("a multiple of `pipeline_model_parallel_size` (2)", "a multiple of --pp (2)"),
        ("Make it with pipeline_model_parallel_size=2.", "Make it with --pp 2."),
        ("runs/pp=2/config.json does not exist", "runs/pp=2/config.json does not exist"),
        ("./pp=2 and a-tp=3 and x.tp=4 do not exist", "./pp=2 and a-tp=3 and x.tp=4 do not exist"),
    ],
)
def test_as_options(message: str, shown: str) -> None:
    assert as_options(message) == shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("layout EttL --pp 2", "The number of stages must be a multiple of --pp (2), but is 1 instead: add 1"),
        ("layout Ett|ttL --pp 3", "or use a --pp of 2"),
        ("layout EttL --pp 0", "--pp must be at least 1, but is 0"),
        ("plan MODEL --pp 2 --layout Et", "The number of stages must be a multiple of --pp (2)"),
        ("plan MODEL --pp 3 ", "--pp 3 needs at least 3 layers, but the model has 2. Use --pp 2 or less"),
        ("plan MODEL --pp 2 --vpp 2 --layout Et|tL", "--vpp 2 needs a layout of 4 stages"),
        ("plan MODEL --pp 2 --layout Et|L", "The layout 'Et|L' does not fit the model"),
        ("schedule --kind 1f1b --pp 0 --microbatches 2", "--pp must be a whole number of at least 1, but is 0."),
    ],
)
def test_commands_name_their_options(partita: Run, tmp_path: Path, command: str, message: str) -> None:
    model = write(tmp_path, TINY)
    said = partita(*(model if word == "MODEL" else word for word in command.split()))
    assert said.code == 2
    assert message in said.err
    assert "parallel_size" not in said.err
    assert "pp=" not in said.err
