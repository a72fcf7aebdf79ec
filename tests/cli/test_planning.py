"""`partita plan` as a search: its answers for published models, its files, and what it says when nothing fits."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from partita.core.plan import Plan
from partita.core.plan_settings import PlanSettings
from tests.cli.conftest import Run
from tests.cli.models import DEEPSEEK_V3, LLAMA_8B, TINY, write
from tests.cost.published import ROWS
from tests.support.serve_command import PARTITA, started

LLAMA_70B: dict[str, Any] = {
    **LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 32000, "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12,
    "n_positions": 1024, "vocab_size": 50257,
}  # fmt: skip
FIXED = ("--hardware", "h100", "--batch-size", "64", "--sequence-length", "4096", "--schedule", "1f1b")


def _plans(partita: Run, folder: Path, config: dict[str, Any], *options: str) -> list[dict[str, Any]]:
    said = partita("plan", write(folder, config), *options, "--json")
    assert said.code == 0, said.err
    plans: list[dict[str, Any]] = json.loads(said.out)["plans"]
    return plans


@pytest.mark.parametrize(
    ("config", "options", "ranks"),
    [
        (LLAMA_70B, (*FIXED, "--ranks", "64", "--tp", "8"), 64),
        (MIXTRAL, (*FIXED, "--ranks", "32", "--tp", "4", "--zero", "1"), 32),
        (DEEPSEEK_V3, (*FIXED, "--ranks", "512", "--tp", "8", "--pp", "16", "--recompute", "full", "--zero", "1"), 512),
        (
            GPT2,
            ("--hardware", "h100", "--ranks", "3", "--batch-size", "12", "--sequence-length", "1024", "--zero", "1"),
            3,
        ),
    ],
    ids=["llama-70b", "mixtral", "deepseek-v3", "gpt2"],
)
def test_every_plan_holds_the_model_and_fits(
    partita: Run, tmp_path: Path, config: dict[str, Any], options: tuple[str, ...], ranks: int
) -> None:
    found = _plans(partita, tmp_path, config, *options)
    model = json.loads(partita("plan", write(tmp_path, config), "--json").out)
    assert 1 <= len(found) <= 10
    for one in found:
        assert one["dp"] * one["pp"] * one["tp"] * one["cp"] == len(one["memory_bytes"]) == ranks
        assert all(use["total"] <= limit for use, limit in zip(one["memory_bytes"], one["limit_bytes"], strict=True))
        assert all(
            sum(value for name, value in use.items() if name != "total") == use["total"] for use in one["memory_bytes"]
        )
        assert one["unsupported"] == []
        is_over_replicas = one["zero"] == 3 or one["ep"] > 1
        holding = one["memory_bytes"][: None if is_over_replicas else one["pp"] * one["cp"] * one["tp"]]
        assert sum(use["weights"] for use in holding) >= model["bytes"]
    assert [one["step_s"] for one in found] == sorted(one["step_s"] for one in found)
    shown = json.loads(
        partita(
            "plan", write(tmp_path, config), *(f"--{axis}={found[0][axis]}" for axis in ("tp", "pp", "dp")),
            "--layout", found[0]["layout"], "--json",
        ).out
    )  # fmt: skip
    assert {layer for rank in shown["ranks"] for layer in rank["layers"]} == set(range(model["num_layers"]))


def test_the_answer_names_the_plan_and_why_others_lose(partita: Run, tmp_path: Path) -> None:
    said = partita("plan", write(tmp_path, LLAMA_8B), "--ranks", "8", *FIXED, "--tp", "2")
    assert said.code == 0, said.err
    assert "training 64 sequences of 4,096 tokens a step on 8 ranks of" in said.out
    assert "with the kernels fused" in said.out
    assert "Best: --tp 2 " in said.out
    for line in ("--pp ", "--dp ", "--recompute full ", "--microbatches "):
        assert any(one.startswith(line) for one in said.out.splitlines()), line
    assert "slower: " in said.out
    assert "An engine with --" in said.out


def test_with_everything_fixed_it_predicts_only_that(partita: Run, tmp_path: Path) -> None:
    fixed = ("--tp", "2", "--pp", "2", "--dp", "2", "--layout", "Et*17|t*15L", "--microbatches", "16", "--zero", "0")
    [only] = _plans(partita, tmp_path, LLAMA_8B, *fixed, "--recompute", "selective", *FIXED)
    assert (only["tp"], only["pp"], only["dp"], only["layout"]) == (2, 2, 2, "Et*17|t*15L")
    assert (only["microbatches"], only["zero"], only["recompute"], only["schedule"]) == (16, 0, "selective", "1f1b")


def test_a_published_row_is_predicted_from_the_command_line(partita: Run, tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.name == "175B full")
    options = (
        "--hardware a100 --kernels megatron --ranks 64 --tp 8 --pp 8 --vpp 3 --dp 1 --batch-size 64 --sequence-length 2048 "
        "--microbatches 64 --schedule interleaved-1f1b --recompute full"
    )
    found = _plans(partita, tmp_path, row.config, *options.split())
    assert found[0]["step_s"] == pytest.approx(row.predicted(), rel=1e-9)


@pytest.mark.parametrize(
    ("config", "option", "missing"),
    [(LLAMA_8B, ("--cp", "2"), []), (MIXTRAL, ("--ep", "4"), []), (MIXTRAL, ("--ep", "2"), [])],
    ids=["cp", "ep", "ep below tp"],
)
def test_sequences_and_experts_over_ranks(
    partita: Run, tmp_path: Path, config: dict[str, Any], option: tuple[str, str], missing: list[str]
) -> None:
    options = (*FIXED, *option, "--ranks", "16", "--tp", "4", "--recompute", "full")
    found = _plans(partita, tmp_path, config, *options)
    assert {one[option[0].strip("-")] for one in found} == {int(option[1])}
    assert all(one["dp"] * one["pp"] * one["tp"] * one["cp"] == 16 for one in found)
    assert all(one["unsupported"] == missing for one in found)


def test_the_best_plan_is_shown_first_and_no_other_is_faster(partita: Run, tmp_path: Path) -> None:
    options = ("--hardware", "h100", "--ranks", "8", "--batch-size", "64", "--sequence-length", "4096")
    said = json.loads(partita("plan", write(tmp_path, LLAMA_8B), *options, "--json").out)
    best = said["plans"][0]["step_s"]
    times = [one["plan"]["step_s"] for one in said["others"] if one["plan"] is not None]
    assert times
    assert min(times) >= best
    assert all(plan["step_s"] >= best for plan in said["plans"])


def test_what_partita_does_not_execute_is_marked(partita: Run, tmp_path: Path) -> None:
    external = ("--tp", "2", "--dp", "4", "--ranks", "8", "--zero", "1", "--sequence-parallel")
    for one in _plans(partita, tmp_path, LLAMA_8B, *FIXED, *external):
        assert one["unsupported"] == ["--sequence-parallel"]
    said = partita("plan", write(tmp_path, LLAMA_8B), *FIXED, *external)
    assert "does not execute --sequence-parallel" in said.out


def test_serving_fits_the_cache(partita: Run, tmp_path: Path) -> None:
    options = ("--for", "serve", "--ranks", "8", "--hardware", "h100", "--sequences", "64", "--context", "8192")
    best = _plans(partita, tmp_path, LLAMA_70B, *options)[0]
    assert best["memory_bytes"][0]["cache"] > 0
    assert best["memory_bytes"][0]["optimizer"] == best["memory_bytes"][0]["activations"] == 0
    assert best["tokens_per_s"] == pytest.approx(64 / best["step_s"])


def test_serving_over_context_ranks_is_planned(partita: Run, tmp_path: Path) -> None:
    """`--for serve` and `--for generate` refused `--cp`, which `partita serve` and `partita generate` take."""
    for work in ("serve", "generate"):
        said = partita("plan", write(tmp_path, TINY), "--for", work, "--hardware", "h100", "--ranks", "2", "--cp", "2")
        assert said.code == 0
        assert "--cp 2" in said.out


def test_two_unlike_macs_get_unequal_layers(partita: Run, tmp_path: Path) -> None:
    options = ("--for", "generate", "--hardware", "two-macs", "--pp", "2", "--context", "2048")
    best = _plans(partita, tmp_path, LLAMA_70B, *options)[0]
    layers = best["layout"].split("|")[0]
    assert best["limit_bytes"][0] > 2 * best["limit_bytes"][1]
    assert int(layers.split("*")[1]) > 40  # the faster and larger Mac is rank 0


def test_nothing_fits_and_what_does(partita: Run, tmp_path: Path) -> None:
    said = partita("plan", write(tmp_path, LLAMA_70B), "--ranks", "8", *FIXED, "--tp", "8")
    assert said.code == 2
    assert "no plan fits 8 ranks of NVIDIA H100" in said.err
    assert "--ranks 16: --tp 8" in said.err


def test_a_fixed_part_that_is_the_cause_is_named(partita: Run, tmp_path: Path) -> None:
    fixed = ("--tp", "1", "--pp", "1", "--cp", "1", "--recompute", "none", "--memory", "48GB")
    said = partita("plan", write(tmp_path, LLAMA_8B), "--ranks", "4", *FIXED, *fixed)
    assert said.code == 2
    assert "without --tp 1: --tp 4 --" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", "8", "--hardware", "h10"), "hardware must be one of a100, a100-40gb"),
        (
            ("--ranks", "9", "--nodes", "2", "--hardware", "h100"),
            "--ranks must be a multiple of --nodes (2), but is 9.",
        ),
        (("--ranks", "8", "--hardware", "h100", "--memory", "lots"), "must be a number of bytes, as in 4GiB or 500MB"),
        (
            ("--ranks", "8", "--hardware", "h100", "--memory", "1GB"),
            "must exceed the 1,500,000,000 bytes that libraries",
        ),
        (("--ranks", "8", "--hardware", "h100", "--tp", "3"), "the fixed sizes tp 3 must divide the 8 ranks"),
        (("--hardware", "h100"), "the number of ranks is missing"),
        (("--ranks", "8", "--hardware", "h100", "--context", "99"), "--context does not belong to --for train"),
        (("--ranks", "8"), "this machine was not measured yet. Run `partita measure`"),
        (("--ranks", "8", "--hardware", "h100", "--schedule", "1f2b"), "kind '1f2b' is not known"),
        (("--ranks", "3", "--hardware", "two-macs"), "has the devices of 2 ranks, but 3 are needed"),
    ],
)
def test_mistakes(
    partita: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("COLUMNS", "500")
    said = partita("plan", write(tmp_path, TINY), *options)
    assert said.code == 2
    assert message in said.err


def test_train_uses_the_settings_of_a_saved_plan(partita: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr("partita.cli.launch.run", jobs.append)
    model, file = write(tmp_path, {**TINY, "num_hidden_layers": 4}), tmp_path / "plan.json"
    fixed = (
        "--pp",
        "2",
        "--dp",
        "2",
        "--schedule",
        "zb-h1",
        "--microbatches",
        "4",
        "--zero",
        "1",
        "--recompute",
        "full",
    )
    work = ("--batch-size", "16", "--sequence-length", "64")
    said = partita("plan", model, "--hardware", "cpu", "--ranks", "4", *fixed, *work, "--save", str(file))
    assert said.code == 0, said.err
    plan = Plan.from_json(file.read_text())
    assert plan.settings == PlanSettings(
        schedule="zb-h1", microbatches=4, zero=1, recompute="full", sequence_parallel=False, overlap_gradients=False,
        batch_size=16, sequence_length=64,
    )  # fmt: skip
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "empty"))
    train = ("train", "--config", model, "--data", "stdlib", "--plan", str(file))
    assert partita(*train).code == 0
    options = jobs[0].options
    assert (options["schedule"], options["microbatches"], options["batch_size"]) == ("zb-h1", 4, 16)
    assert (options["zero"], options["checkpointing"], options["sequence_length"]) == (True, True, 64)
    said = partita(*train, "--no-zero", "--microbatches", "2")
    assert said.code == 0, said.err
    assert (jobs[1].options["zero"], jobs[1].options["microbatches"]) == (False, 2)
    assert "--zero replaces zero 1 of the plan." in said.err
    assert "--microbatches replaces microbatches 4 of the plan." in said.err


def test_train_refuses_settings_that_no_engine_executes(partita: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    model = write(tmp_path, TINY)
    assert (
        partita(
            "plan", model, "--hardware", "cpu", "--tp", "2", "--ranks", "2", "--sequence-parallel", "--save", str(file)
        ).code
        == 0
    )
    said = partita("train", "--config", model, "--data", "stdlib", "--plan", str(file))
    assert said.code == 2
    assert "the plan has sequence_parallel true, which the torch engine does not execute in training" in said.err


MEASURED = """
name = "this machine"
devices_per_node = 2
kernels = "torch"
[device]
name = "CPU"
memory_bytes = {memory}
memory_bandwidth = 3e10
peak_flops = {{ float32 = 4e11 }}
[links.shared]
latency_s = 2e-4
bandwidth = 2e9
"""


def test_auto_and_a_plan_that_does_not_fit(partita: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr("partita.cli.launch.run", jobs.append)
    monkeypatch.setattr("partita.cli.generate.open_checkpoint", lambda folder: None)
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    model, file = write(tmp_path, {**TINY, "num_hidden_layers": 8, "hidden_size": 256}), tmp_path / "plan.json"
    (tmp_path / "hardware.toml").write_text(MEASURED.format(memory=1 << 33))
    assert partita("train", "--config", model, "--data", "stdlib", "--auto").code == 0
    assert jobs[-1].request.mesh.size == 2
    assert jobs[-1].plan.settings.microbatches == jobs[-1].options["microbatches"]
    assert partita("train", "--config", model, "--data", "stdlib", "--auto", "--pp", "2").code == 0
    assert (jobs[-1].plan.mesh.pp, jobs[-1].plan.mesh.dp) == (2, 1)
    said = partita("generate", model, "hello", "--auto")
    assert said.code == 0, said.err
    assert jobs[-1].plan.mesh.size == 2
    assert "the planner chose" in said.err
    assert partita("plan", model, "--dp", "2", "--save", str(file)).code == 0
    (tmp_path / "hardware.toml").write_text(MEASURED.format(memory=60 << 20))
    said = partita("train", "--config", model, "--data", "stdlib", "--plan", str(file))
    assert said.code == 2
    assert "the plan needs " in said.err
    assert "of this machine can be used (`partita measure`). This fits: --" in said.err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_auto_on_two_real_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train`, `generate` and `serve` choose a plan, work by it, and leave no process."""
    folder = tmp_path / "tiny"
    model = write(tmp_path, {**TINY, "num_hidden_layers": 4, "vocab_size": 260})
    (tmp_path / "hardware.toml").write_text(MEASURED.format(memory=1 << 33))
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for command in (
        ("train", "--config", model, "--data", "stdlib", "--steps", "2", "--out", str(folder)),
        ("generate", str(folder), "hello", "--max-new-tokens", "4"),
    ):
        said = subprocess.run((*PARTITA, *command, "--auto"), capture_output=True, text=True, timeout=250, check=False)
        assert said.returncode == 0, said.stderr
        assert "the planner chose" in said.stderr
        assert "for 2 ranks of this machine" in said.stderr
    with started(folder, "--auto") as server:
        assert "".join(server.stream(max_tokens=2))
        code, err = server.end(signal.SIGTERM)
        assert code == 0, err
        assert "the planner chose" in err
