"""What `verify` shows of a report, and its exit code. The report itself is tested with the engine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from partita.verify import Report, Row
from tests.cli.conftest import Run
from tests.cli.models import TINY, write


def report(*wrong: str) -> Report:
    names = [f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn", "mlp")]
    rows = [Row("module", name, math.inf if name in wrong else 2e-16, 1e-12) for name in names]
    rows += [Row("output", "the model", 0.0, 1e-12), Row("tokens", "6 tokens continued by 12", 0.0, 0.5)]
    return Report(tuple(rows), "A model on a mesh", shrunk=False)


@pytest.fixture
def verify(partita: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `verify` with a given report of the engine, in this process."""

    def run(found: Report, *options: str) -> object:
        monkeypatch.setattr("partita.verify.verify", lambda model, **_: found)
        return partita("verify", write(tmp_path, TINY), "--tp", "1", *options)

    return run


def test_layers_that_are_alike_share_a_row(verify: Run) -> None:
    said = verify(report())
    assert said.code == 0
    rows = [line.split() for line in said.out.splitlines()]
    assert ["module", "model.layers.*.self_attn", "0-2", "2.0e-16", "1e-12", "equal"] in rows
    assert ["model.layers.*.mlp", "0-2", "2.0e-16", "1e-12", "equal"] in rows
    assert "Split equals unsplit in 8 comparisons; the largest error is 2.0e-16." in said.out


def test_all_has_a_row_for_every_layer(verify: Run) -> None:
    said = verify(report(), "--all")
    assert "model.layers.2.mlp" in said.out
    assert "*" not in said.out


def test_a_difference_is_named_and_is_exit_code_1(verify: Run) -> None:
    said = verify(report("model.layers.1.mlp", "model.layers.2.self_attn", "model.layers.2.mlp"))
    assert said.code == 1
    rows = [line.split() for line in said.out.splitlines()]
    assert ["model.layers.*.mlp", "0-2", "inf", "1e-12", "DIFFERS", "1-2"] in rows
    assert "Split DIFFERS from unsplit in 3 of 8 comparisons. The first is model.layers.1.mlp." in said.out


def test_json_is_json(verify: Run) -> None:
    said = verify(report("model.layers.1.mlp"), "--json")
    assert said.code == 1
    data = json.loads(said.out, parse_constant=pytest.fail)
    assert (data["equal"], data["first_wrong"]) == (False, "model.layers.1.mlp")
    wrong = [row for row in data["rows"] if not row["ok"]]
    assert wrong == [{"kind": "module", "name": "model.layers.1.mlp", "error": None, "tolerance": 1e-12, "ok": False}]
