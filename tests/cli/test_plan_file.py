"""`--plan FILE`: a plan that `partita plan --save` wrote drives every command, on either engine and under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from partita.core.plan import Plan
from tests.cli.conftest import Run
from tests.cli.models import TINY, write
from tests.support.ranks import ROOT

FOUR: dict[str, Any] = {**TINY, "num_hidden_layers": 4}
LAYOUT = "Ettt|tL"


@pytest.fixture
def plan(partita: Run, tmp_path: Path) -> Path:
    file = tmp_path / "plan.json"
    assert partita("plan", write(tmp_path, FOUR), "--pp", "2", "--layout", LAYOUT, "--save", str(file)).code == 0
    return file


def test_a_plan_is_shown_without_its_model(partita: Run, plan: Path, tmp_path: Path) -> None:
    alone, beside = (
        partita("plan", "--plan", str(plan), "--json"),
        partita("plan", write(tmp_path, FOUR), "--plan", str(plan)),
    )
    assert alone.code == beside.code == 0
    shown = json.loads(alone.out)
    assert (shown["layout"], shown["mesh"]) == (LAYOUT, {"dp": 1, "pp": 2, "tp": 1})
    assert f"layout {LAYOUT}" in beside.out


@pytest.mark.parametrize("command", ["generate", "train", "verify"])
def test_the_job_has_the_plan_of_the_file(
    partita: Run, monkeypatch: pytest.MonkeyPatch, plan: Path, tmp_path: Path, command: str
) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr("partita.cli.launch.run", jobs.append)
    model = write(tmp_path, FOUR)
    given = {"generate": (model, "hello"), "verify": (model,), "train": ("--config", model, "--data", "stdlib")}
    monkeypatch.setattr("partita.cli.generate.open_checkpoint", lambda folder: None)
    said = partita(command, *given[command], "--plan", str(plan))
    assert said.code == 0, said.err
    assert jobs[0].plan == Plan.from_json(plan.read_text())
    assert str(jobs[0].request.layout) == LAYOUT


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (
            (),
            {"hidden_size": 64},
            "the plan is for another model: lm_head.weight has the shape (257, 32) in the plan and (257, 64)",
        ),
        ((), {"num_hidden_layers": 5}, "the plan is for another model: its num_layers is 4, but the model's is 5."),
        (
            (),
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
            "the plan is for another model: its family is llama, but the model's is mistral.",
        ),
        (("--tp", "2"), {}, "which specifies the split, exclude each other. Leave one out."),
        (("--layout", LAYOUT), {}, "which specifies the split, exclude each other. Leave one out."),
    ],
)
@pytest.mark.parametrize("command", ["plan", "generate", "verify"])
def test_what_does_not_fit_the_plan_is_refused_before_a_rank_starts(
    partita: Run, monkeypatch: pytest.MonkeyPatch, plan: Path, tmp_path: Path, command: str, options: tuple[str, ...],
    change: dict[str, Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("partita.cli.launch.run", lambda job: pytest.fail("the ranks were started"))
    prompt = ("hello",) if command == "generate" else ()
    said = partita(command, write(tmp_path, {**FOUR, **change}), *prompt, "--plan", str(plan), *options)
    assert said.code == 2
    assert message in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{}", '{"partita_plan": 1}', "[1]"])
def test_a_file_that_is_no_plan_is_refused(partita: Run, tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    said = partita("plan", "--plan", str(file))
    assert said.code == 2
    assert said.err.startswith(f"error: --plan {file}: ")


def test_a_schedule_that_places_stages_otherwise_is_refused(partita: Run, plan: Path, tmp_path: Path) -> None:
    said = partita("verify", write(tmp_path, FOUR), "--plan", str(plan), "--schedule", "zb-v")
    assert said.code == 2
    assert "zb-v has two stages on every rank" in said.err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_plan_drives_both_engines_and_torchrun(partita: Run, plan: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("import sys\nimport os\n" * 60)
    model = tmp_path / "model"

    def run(*command: str) -> str:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    program = (sys.executable, "-m", "partita")
    run(
        *program, "train", "--config", write(tmp_path, FOUR), "--data", str(tmp_path / "text.txt"), "--plan", str(plan),
        "--steps", "2", "--batch-size", "4", "--sequence-length", "16", "--out", str(model),
    )  # fmt: skip
    how = ("generate", str(model), "import", "--max-new-tokens", "6", "--json")
    alone = partita(*how)
    expected = json.loads(alone.out)["generations"]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "partita")
    for started in (program, torchrun):
        assert json.loads(run(*started, *how, "--plan", str(plan)))["generations"] == expected
    assert json.loads(run(*program, *how, "--plan", str(plan), "--engine", "mlx"))["generations"] == expected
    assert json.loads(run(*program, "verify", str(model), "--plan", str(plan), "--json"))["equal"]
