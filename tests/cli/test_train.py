"""`partita train` over stages: what is refused before any rank starts, and a run with all that can be asked of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.cli.models import TINY, write
from tests.support.ranks import ROOT

FOUR: dict[str, Any] = {**TINY, "num_hidden_layers": 4}
T5: dict[str, Any] = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 16, "d_kv": 4, "d_ff": 16,
    "num_layers": 2, "num_heads": 4, "vocab_size": 257,
}  # fmt: skip


@pytest.fixture
def train(partita: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `train` on a small model up to where its ranks would start, which it must not reach."""

    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("the ranks were started")

    def run(*options: str) -> object:
        return partita("train", "--config", write(tmp_path, FOUR), "--data", "stdlib", *options)

    monkeypatch.setattr("partita.cli.launch.run", started)
    monkeypatch.chdir(tmp_path)
    return run


BAD: list[tuple[str, str]] = [
    ("--pp 2 --layout Et|tL", "decoder (t): 4 expected, 2 found; add 2"),
    ("--pp 2 --layout Ettt|ttL", "decoder (t): 4 expected, 5 found; remove 1"),
    (
        "--pp 2 --layout EttttL",
        "The number of stages must be a multiple of --pp (2), but is 1",
    ),
    (
        "--pp 3 --layout Ett|ttL",
        "The number of stages must be a multiple of --pp (3), but is 2",
    ),
    ("--pp 2 --layout Ett|ttX", "Pipeline layout, character 7: 'X' is not a symbol"),
    (
        "--pp 5",
        "--pp 5 needs at least 5 layers, but the model has 4. Use --pp 4 or less, or give a layout with empty stages.",
    ),
    ("--pp 2 --vpp 3", "--pp x --vpp = 6 needs at least 6 layers, but the model has 4."),
    (
        "--pp 2 --batch-size 8 --microbatches 3",
        "--microbatches must divide the 8 sequences of a replica (--batch-size 8 / --dp 1), but is 3.",
    ),
    (
        "--pp 2 --dp 2 --batch-size 8 --microbatches 8",
        "must divide the 4 sequences of a replica (--batch-size 8 / --dp 2)",
    ),
    ("--pp 2 --dp 3", "--batch-size must be a multiple of --dp (3), but is 8."),
    ("--pp 2 --schedule zb-v --vpp 1", "zb-v has two stages on every rank, but vpp is 1."),
    ("--pp 2 --schedule zb-v --layout Ett|ttL", "zb-v has two stages on every rank, but vpp is 1."),
    ("--pp 2 --schedule 1f1b --vpp 2", "1f1b has one stage on every rank, but vpp is 2."),
    ("--pp 2 --schedule zb-h1 --layout Et|t|t|tL", "zb-h1 has one stage on every rank, but vpp is 2."),
    (
        "--schedule zb-v",
        "--schedule zb-v needs at least two pipeline ranks, but --pp is 1. Give --pp 2 or more, or leave it out.",
    ),
    ("--pp 2 --schedule interleaved", "kind 'interleaved' is not known. Did you mean interleaved-1f1b?"),
    ("--pp 2 --schedule forward-only", "--schedule forward-only has no backward, so it cannot train. Use 1f1b."),
    (
        "--pp 2 --vpp 3 --layout Et|t|t|tL",
        "--vpp 3 and --layout Et|t|t|tL, which has 2 stages a rank, exclude each other. Leave --vpp out.",
    ),
    ("--pp 2 --group-size 2", "is for interleaved-1f1b only"),
    ("--pp 2 --vpp 2 --group-size 1", "group_size must be at least pp (2), or ranks would wait for their own outputs"),
    ("--pp 2 --schedule zb-h1 --group-size 2", "group_size (2) is for interleaved-1f1b only, and the kind is zb-h1."),
    ("--pp 2 --picture x.gif", "--picture must name a file that ends in .svg or .png, but is x.gif."),
    ("--pp 2 --picture x.json", "--picture must name a file that ends in .svg or .png, but is x.json."),
    ("--pp 2 --picture nowhere/x.svg", "nowhere/x.svg cannot be written: there is no folder nowhere. Create it first."),
    ("--report-to jsonl", "--report-to writes into the run's folder. Give --out."),
    ("--report-to csv --out runs", "--report-to must be one of jsonl, tensorboard, wandb or none, but is 'csv'."),
    ("--profile 3:2 --out runs", "--profile must be FIRST:LAST, steps counted from 1 and both included, but is '3:2'."),
    ("--checkpointing 0", "--checkpointing must be full, selective, none or a number of at least 1, but is '0'."),
    ("--decay-steps 3", "decay_steps is for lr_schedule wsd, but that is cosine. Leave it out."),
    ("--optimizer adafactor", "optimizer adafactor is not supported: its row and column means are not tensors of"),
    ("--optimizer adamw-8bit", "optimizer adamw-8bit is not supported: bitsandbytes quantizes moments in blocks"),
    ("--beta2 1", "beta2 must be at least 0 and below 1, but is 1.0."),
    ("--pp 2 --trace x.svg", "--trace must name a file that ends in .json, but is x.svg."),
    ("--pp 2 --trace nowhere/x.json", "nowhere/x.json cannot be written: there is no folder nowhere. Create it first."),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_cannot_be_is_told_before_a_rank_starts(train: Run, options: str, message: str) -> None:
    said = train(*options.split())
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert message in said.err
    assert "Traceback" not in said.err
    # A layout's faults have a line each, and its text one with an arrow.
    assert said.err.count("\n") == 1 or "layout" in said.err


@pytest.mark.fresh
def test_a_v_of_stages_on_mlx_trains_like_1f1b_and_one_rank(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("import sys\nimport os\n" * 50)
    command = (
        sys.executable, "-m", "partita", "train", "--config", write(tmp_path, FOUR), "--data", str(tmp_path / "text.txt"),
        "--engine", "mlx", "--steps", "4", "--batch-size", "4", "--microbatches", "4", "--sequence-length", "16",
        "--learning-rate", "1e-2", "--json",
    )  # fmt: skip
    losses = []
    for name, split in (("v", "--pp 2 --schedule zb-v"), ("1f1b", "--pp 2 --schedule 1f1b"), ("unsplit", "--tp 1")):
        out = ("--out", str(tmp_path / name))
        ended = subprocess.run((*command, *split.split(), *out), cwd=ROOT, capture_output=True, text=True, timeout=110)
        assert ended.returncode == 0, ended.stderr
        losses.append([step["loss"] for step in json.loads(ended.stdout)["steps"]])
    # float32, whose sums over micro-batches and stages are rounded in another order.
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)


@pytest.mark.parametrize("command", ["train", "generate", "verify"])
def test_an_encoder_and_a_decoder_are_not_cut_into_stages(
    partita: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.setattr("partita.cli.launch.run", lambda *_, **__: pytest.fail("the ranks were started"))
    config = write(tmp_path, T5)
    given = {"train": ("--config", config, "--data", "stdlib"), "generate": (config, "hello"), "verify": (config,)}
    said = partita(command, *given[command], "--pp", "2")
    assert said.code == 2
    assert said.err.splitlines()[-1] == (
        "error: T5ForConditionalGeneration has two lists of layers, an encoder and a decoder, so it cannot be split into "
        "stages. Use --tp and --pp 1."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--pp 2 --layout Et|tL", "decoder (t): 4 expected, 2 found; add 2"),
        ("--pp 2 --vpp 2 --layout Ett|ttL", "--vpp 2 needs a layout of 4 stages (pp x vpp)"),
        ("--pp 5", "--pp 5 needs at least 5 layers"),
    ],
)
def test_generate_refuses_before_a_rank_starts(
    partita: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str, message: str
) -> None:
    monkeypatch.setattr("partita.cli.launch.run", lambda *_, **__: pytest.fail("the ranks were started"))
    said = partita("generate", write(tmp_path, FOUR), "hello", *options.split())
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert "Traceback" not in said.err


@pytest.mark.fresh
@pytest.mark.timeout(120)
def test_two_stages_in_a_v_train_draw_and_save_what_one_rank_reads(partita: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("import sys\nimport os\n" * 50)
    command = (
        sys.executable, "-m", "partita", "train", "--config", write(tmp_path, FOUR), "--data", str(tmp_path / "text.txt"),
        "--pp", "2", "--schedule", "zb-v", "--steps", "6", "--batch-size", "4", "--microbatches", "4",
        "--sequence-length", "16", "--learning-rate", "1e-2", "--picture", str(tmp_path / "step.svg"), "--trace",
        str(tmp_path / "step.json"), "--out", str(tmp_path / "model"),
    )  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    assert "on pp 2" in ended.stderr
    assert "step 6/6  loss " in ended.stderr
    rows = ended.stdout.splitlines()
    assert [row.split("  ")[0] for row in rows[:2]] == ["last step measured", "last step predicted"]
    assert all("bubble" in row for row in rows[:2])
    assert "<svg" in (tmp_path / "step.svg").read_text()
    trace = json.loads((tmp_path / "step.json").read_text())
    named = {event["name"] for event in trace["traceEvents"]}
    assert {"0F0", "3F0"} <= named or {"F0", "W0"} <= named or any("F0" in name for name in named)
    alone = partita("generate", str(tmp_path / "model"), "import", "--max-new-tokens", "3", "--json")
    assert alone.code == 0, alone.err
    assert len(json.loads(alone.out)["generations"][0]["tokens"]) == 3
