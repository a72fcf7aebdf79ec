"""Models on GPUs: one rank, two ranks that share a GPU over gloo, and two GPUs over NCCL, against the CPU in float64."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from partita.core.mesh import Mesh
from partita.torch import Sampling, TrainSettings, generate, train
from partita.torch.collectives.groups import make_groups, single_groups
from partita.torch.load import load, shard
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.new import fresh
from partita.torch.proof.compare import compare
from partita.torch.proof.family import fill_unsplit, sample_inputs
from partita.torch.weights.save import save
from tests.cli.models import TINY, write
from tests.support.models import CONFIGS
from tests.support.ranks import ROOT, Ranks

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
FAMILIES = ("llama-7-heads-1-kv", "gpt2", "qwen3-moe")
MESHES = {"tp": {"tp": 2}, "pp": {"pp": 2}, "dp": {"dp": 2}}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
GREEDY = Sampling(max_new_tokens=8, temperature=0.0, ignore_eos=True)
DRAWN = Sampling(max_new_tokens=8, temperature=1.0, top_k=20, seed=5, ignore_eos=True)
SETTINGS = TrainSettings(steps=3, batch_size=4, sequence_length=8, learning_rate=1e-3, warmup_steps=1)
TOKENS = torch.arange(500) ** 2 % 97

EXACT = 1e-12
"""Float64 on a GPU: the order of sums is another one than on the CPU, and nothing else."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.fresh,
    pytest.mark.timeout(600),
    pytest.mark.skipif(GPUS == 0, reason="this machine has no CUDA device"),
]
needs_two = pytest.mark.skipif(GPUS < 2, reason=f"NCCL needs a GPU for each rank, and this machine has {GPUS}")


@pytest.fixture(scope="module")
def one() -> Iterator[Ranks]:
    """One rank on one GPU."""
    pool = Ranks(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def sharing() -> Iterator[Ranks]:
    """Two ranks that share the first GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
        pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def apart() -> Iterator[Ranks]:
    """Two ranks, each with a GPU of its own."""
    pool = Ranks(2)
    yield pool
    pool.close()


def backends() -> dict[str, str]:
    return dict(part.split(":") for part in dist.get_backend_config().split(","))


def unsplit_of(name: str) -> torch.nn.Module:
    quiet = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    return fill_unsplit(build_on_meta(read_hf_config({**CONFIGS[name], **quiet}), torch.float64))


# --- forward, gradient, tokens and training ---------------------------------------------------------------------------


def check(name: str, mesh: dict[str, int]) -> None:
    """A split model on the GPU against the unsplit one, there and on the CPU."""
    on_cpu = unsplit_of(name)
    unsplit = copy.deepcopy(on_cpu).to("cuda")
    groups = make_groups(Mesh(**mesh))
    split = shard(copy.deepcopy(unsplit), groups=groups, **mesh)
    plan, _ = plan_of(split)
    assert {t.device.type for t in [*split.parameters(), *split.buffers()]} == {"cuda"}
    with Float64Everywhere():
        differences = compare(unsplit, split, plan, groups, sample_inputs(unsplit))
        assert {"output", "gradient"} <= {d.kind for d in differences}
        assert [d for d in differences if not d.error <= EXACT] == []
        alone = shard(on_cpu, groups=single_groups())
        for sampling in (GREEDY, DRAWN):
            tokens = [g.tokens for g in generate(alone, PROMPTS, sampling)]
            assert [g.tokens for g in generate(split, PROMPTS, sampling)] == tokens
        expected, found = train(alone, TOKENS, SETTINGS), train(split, TOKENS, SETTINGS)
    assert [step.loss for step in found] == pytest.approx([step.loss for step in expected], rel=1e-10)
    assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in expected], rel=1e-8)
    assert {t.device.type for t in split.parameters()} == {"cuda"}


def check_nccl(name: str, mesh: dict[str, int]) -> None:
    assert backends()["cuda"] == "nccl"
    assert torch.cuda.current_device() == dist.get_rank()
    check(name, mesh)


def check_gloo(name: str, mesh: dict[str, int]) -> None:
    assert backends()["cuda"] == "gloo"
    check(name, mesh)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_rank_computes_what_the_cpu_does(name: str, one: Ranks) -> None:
    one.run(check, name, {})


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_share_a_gpu(name: str, mesh: str, sharing: Ranks) -> None:
    sharing.run(check_gloo, name, MESHES[mesh])


@needs_two
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_gpus_over_nccl(name: str, mesh: str, apart: Ranks) -> None:
    apart.run(check_nccl, name, MESHES[mesh])


# --- checkpoints ------------------------------------------------------------------------------------------------------


def check_files(mesh: dict[str, int], folder: str) -> None:
    """New weights, files and what is loaded are the CPU's to the last bit; `device` says where a model goes."""
    made = {at: fresh(CONFIGS["qwen3-moe"], seed=1, device=at, **mesh) for at in ("cpu", "cuda")}
    for at, model in made.items():
        assert {t.device.type for t in model.parameters()} == {at}
        save(model, f"{folder}/{at}")
    names = sorted(file.name for file in Path(folder, "cpu").iterdir())
    assert "model.safetensors" in names
    assert all(Path(folder, "cpu", n).read_bytes() == Path(folder, "cuda", n).read_bytes() for n in names)
    again = load(f"{folder}/cpu", **mesh)
    assert {t.device.type for t in again.parameters()} == {"cuda"}  # without `device`, the rank's GPU
    plan, _ = plan_of(again)
    expected, found = local_tensors(made["cuda"], plan), local_tensors(again, plan)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_files_of_one_rank(one: Ranks, tmp_path: Path) -> None:
    one.run(check_files, {}, str(tmp_path))


@pytest.mark.parametrize("mesh", MESHES)
def test_files_of_two_ranks(mesh: str, sharing: Ranks, tmp_path: Path) -> None:
    sharing.run(check_files, MESHES[mesh], str(tmp_path))


# --- commands ---------------------------------------------------------------------------------------------------------


def partita(*arguments: str) -> Any:
    command = [sys.executable, "-m", "partita", *arguments, "--json"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("split", [("--tp", "1"), ("--tp", "2"), ("--tp", "1", "--pp", "2"), ("--dp", "2")])
def test_commands_train_and_generate_on_a_gpu(split: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("import sys\nimport os\n" * 60)
    begin = ("train", "--config", write(tmp_path, TINY), "--data", str(tmp_path / "text.txt"), "--steps", "6")
    begin += ("--batch-size", "4", "--sequence-length", "16", "--learning-rate", "1e-2", "--dtype", "float64")
    losses = {
        device: [step["loss"] for step in partita(*begin, *split, "--device", device, "--out", str(tmp_path / device))["steps"]]
        for device in ("cpu", "cuda")
    }  # fmt: skip
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-10)
    for device in ("cpu", "cuda"):
        wrote = partita(
            "generate", str(tmp_path / "cpu"), "import", "--max-new-tokens", "6", *split, "--device", device
        )
        assert len(wrote["generations"][0]["tokens"]) == 6
        losses[device] = wrote["generations"][0]["tokens"]
    assert losses["cuda"] == losses["cpu"]


@pytest.mark.parametrize("split", [("--tp", "1"), ("--tp", "2"), ("--tp", "1", "--pp", "2", "--schedule", "zb-v")])
def test_the_command_verifies_on_a_gpu(split: tuple[str, ...], tmp_path: Path) -> None:
    config = write(tmp_path, {**TINY, "num_hidden_layers": 4})
    report = partita("verify", config, *split, "--device", "cuda", "--dtype", "float64", "--dtype", "bfloat16")
    assert report["equal"], [row for row in report["rows"] if not row["ok"]]
    assert {"module", "output", "gradient", "tokens", "loss", "parameter"} <= {row["kind"] for row in report["rows"]}
    assert "cuda" in report["what"]
