"""What `verify` shows of a report, and its exit code. The report itself is tested with the engine."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from partita.cli.verify import VerifyJob
from partita.core.mesh import Mesh
from partita.proof.report import Report, Row
from tests.cli.conftest import Run
from tests.cli.models import TINY, write
from tests.support.ranks import ROOT


def report(*wrong: str) -> Report:
    names = [f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn", "mlp")]
    rows = [Row("module", name, math.inf if name in wrong else 2e-16, 1e-12) for name in names]
    rows += [Row("output", "the model", 0.0, 1e-12), Row("tokens", "6 tokens continued by 12", 0.0, 0.5)]
    return Report(tuple(rows), "A model on a mesh")


@pytest.fixture
def verify(partita: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `verify` with a given report of the engine, in this process."""

    def run(found: Report, *options: str) -> object:
        monkeypatch.setattr("partita.torch.verify", lambda model, **_: found)
        return partita("verify", write(tmp_path, TINY), "--tp", "1", *options)

    return run


def test_layers_that_are_alike_share_a_row(verify: Run) -> None:
    said = verify(report())
    assert said.code == 0
    rows = [line.split() for line in said.out.splitlines()]
    assert ["module", "model.layers.*.self_attn", "0-2", "2.0e-16", "1e-12", "equal"] in rows
    assert ["model.layers.*.mlp", "0-2", "2.0e-16", "1e-12", "equal"] in rows
    assert (
        "Split equals unsplit in 8 comparisons. The largest error is 2.0e-16 (module model.layers.0.self_attn)."
        in said.out
    )


def test_all_has_a_row_for_every_layer(verify: Run) -> None:
    said = verify(report(), "--all")
    assert "model.layers.2.mlp" in said.out
    assert "*" not in said.out


def test_a_difference_is_named_and_is_exit_code_1(verify: Run) -> None:
    said = verify(report("model.layers.1.mlp", "model.layers.2.self_attn", "model.layers.2.mlp"))
    assert said.code == 1
    rows = [line.split() for line in said.out.splitlines()]
    assert ["model.layers.*.mlp", "0-2", "inf", "1e-12", "DIFFERS", "1-2"] in rows
    assert "Split DIFFERS from unsplit in 3 of 8 comparisons. The first difference is model.layers.1.mlp." in said.out


def test_json_is_json(verify: Run) -> None:
    said = verify(report("model.layers.1.mlp"), "--json")
    assert said.code == 1
    data = json.loads(said.out, parse_constant=pytest.fail)
    assert (data["equal"], data["first_wrong"]) == (False, "model.layers.1.mlp")
    wrong = [row for row in data["rows"] if not row["ok"]]
    assert wrong == [
        {"kind": "module", "name": "model.layers.1.mlp", "error": None, "tolerance": 1e-12, "dtype": "", "ok": False}
    ]


# --- over stages ------------------------------------------------------------------------------------------------------


def asked(partita: Run, monkeypatch: pytest.MonkeyPatch, file: str, engine: str, options: str) -> dict[str, Any]:
    """What `verify` asks of the engine for these options, and of the plan."""
    given: dict[str, Any] = {}

    def run(job: VerifyJob) -> None:
        layout = None if job.request.layout is None else str(job.request.layout)
        given.update({**vars(job.request), **vars(job.request.mesh), **job.training, "layout": layout})
        raise typer.Exit(job.work())

    monkeypatch.setattr("partita.cli.launch.run", run)
    monkeypatch.setattr(f"partita.{engine}.verify", lambda model, **options: (given.update(options), report())[1])
    said = partita("verify", file, "--engine", engine, *options.split())
    assert said.code == 0, said.err
    return given


@pytest.mark.parametrize(
    ("options", "mesh", "expected"),
    [
        ("--pp 2", Mesh(pp=2), {"vpp": 1, "placement": "loop", "schedule": None, "microbatches": 4}),
        ("--pp 2 --tp 2", Mesh(pp=2, tp=2), {"vpp": 1, "microbatches": 4}),
        ("--pp 2 --dp 2", Mesh(pp=2, dp=2), {"vpp": 1, "microbatches": 4}),
        ("--pp 2 --vpp 2", Mesh(pp=2), {"vpp": 2, "placement": "loop", "schedule": None}),
        ("--pp 2 --schedule zb-v", Mesh(pp=2), {"vpp": 2, "placement": "v", "schedule": "zb-v"}),
        ("--pp 2 --schedule interleaved-1f1b", Mesh(pp=2), {"vpp": 2, "placement": "loop"}),
        ("--pp 2 --layout E|t|tt|tL", Mesh(pp=2), {"vpp": 2, "layout": "E|t|tt|tL"}),
        ("--pp 2 --microbatches 3", Mesh(pp=2), {"microbatches": 3}),
        ("", Mesh(tp=2), {"vpp": 1, "layout": None, "microbatches": 1, "zero": None}),
        ("--dp 2 --zero", Mesh(dp=2), {"zero": 1}),
        ("--cp 2 --zero 3", Mesh(cp=2, tp=2), {"zero": 3}),
    ],
)
def test_options_of_stages_reach_the_engine(
    partita: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str, mesh: Mesh, expected: dict[str, Any]
) -> None:
    file = write(tmp_path, {**TINY, "num_hidden_layers": 4})
    given = asked(partita, monkeypatch, file, "torch", options)
    assert given["mesh"] == given["plan"].mesh == mesh
    assert given["plan"].placement == given["placement"]
    assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--pp 2 --layout Et|tL", "decoder (t): 4 expected, 2 found; add 2"),
        ("--pp 2 --schedule zb-v --vpp 1", "zb-v has two stages on every rank, but vpp is 1."),
        ("--pp 2 --schedule 1f1b --vpp 2", "1f1b has one stage on every rank, but vpp is 2."),
        ("--pp 2 --vpp 3 --layout Et|t|t|tL", "exclude each other. Leave --vpp out."),
        ("--pp 2 --schedule forward-only", "cannot train"),
        ("--pp 5", "--pp 5 needs at least 5 layers, but the model has 4."),
    ],
)
def test_stages_that_cannot_be(
    partita: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str, message: str
) -> None:
    monkeypatch.setattr("partita.cli.launch.run", lambda *_, **__: pytest.fail("the ranks were started"))
    said = partita("verify", write(tmp_path, {**TINY, "num_hidden_layers": 4}), *options.split())
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert message in said.err
    assert "Traceback" not in said.err


@pytest.mark.fresh
@pytest.mark.timeout(120)
def test_two_ranks_prove_a_v_of_stages(tmp_path: Path) -> None:
    command = (
        sys.executable, "-m", "partita", "verify", write(tmp_path, {**TINY, "num_hidden_layers": 4}), "--pp", "2",
        "--schedule", "zb-v", "--microbatches", "3", "--dtype", "float64", "--json",
    )  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    data = json.loads(ended.stdout)
    assert data["equal"]
    assert data["mesh"] == {"dp": 1, "pp": 2, "tp": 1}
    kinds = {"module", "output", "gradient", "tokens", "loss", "norm", "parameter"}
    assert {row["kind"] for row in data["rows"] if row["dtype"] == "float64"} == kinds
    assert {row["tolerance"] for row in data["rows"] if row["dtype"] == "float64"} == {1e-12, 0.5}
    assert {row["dtype"] for row in data["rows"]} == {"float64"}
    assert (data["skipped"], data["substituted"]) == ([], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tp 2 --zero 2", "distributes states over replicas (dp and cp)"),
        ("--dp 2 --zero 4", "--zero must be 0, 1, 2 or 3"),
    ],
)
def test_shards_that_cannot_be_are_refused_before_ranks_start(
    partita: Run, tmp_path: Path, options: str, message: str
) -> None:
    said = partita("verify", write(tmp_path, TINY), *options.split())
    assert said.code == 2
    assert message in " ".join(said.err.split())


# --- on MLX -----------------------------------------------------------------------------------------------------------

ON_MLX = {**TINY, "num_hidden_layers": 4, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {"vpp": 1, "layout": None, "steps": 3, "microbatches": 1, "dtype": None}),
        ("--steps 0", {"steps": 0}),
        ("--dtype float64 --dp 2", {"dp": 2, "tp": 1, "dtype": ["float64"]}),
        ("--pp 2 --schedule zb-v", {"vpp": 2, "placement": "v", "schedule": "zb-v", "microbatches": 4}),
        ("--pp 2 --layout E|t|tt|tL --microbatches 2", {"vpp": 2, "layout": "E|t|tt|tL", "microbatches": 2}),
    ],
)
def test_options_reach_mlx(
    partita: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str, expected: dict[str, Any]
) -> None:
    pytest.importorskip("mlx_lm")
    given = asked(partita, monkeypatch, write(tmp_path, ON_MLX), "mlx", options)
    assert {name: given[name] for name in expected} == expected


@pytest.mark.fresh
@pytest.mark.timeout(120)
def test_two_ranks_of_mlx_prove_a_v_of_stages_without_torch(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    file = write(tmp_path, ON_MLX)
    # What is None in sys.modules cannot be imported: as on a machine without torch.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    command = (
        sys.executable, "-m", "partita", "verify", file, "--engine", "mlx", "--pp", "2", "--schedule", "zb-v",
        "--microbatches", "3", "--steps", "2", "--dtype", "float64", "--json",
    )  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, env=env)
    assert ended.returncode == 0, ended.stderr
    data = json.loads(ended.stdout)
    assert data["equal"]
    assert {(row["kind"], row["tolerance"]) for row in data["rows"]} == {
        ("module", 1e-6), ("output", 1e-6), ("gradient", 1e-6), ("tokens", 0.5), ("loss", 1e-12), ("parameter", 1e-12),
    }  # fmt: skip
