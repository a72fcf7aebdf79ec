from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from partita import Plan
from partita.core.model.families import known_families
from tests.cli.conftest import Run
from tests.cli.models import DEEPSEEK_V3, LLAMA_8B, QWEN2_HALF_B, TINY, write
from tests.support.ranks import ROOT


def test_json_of_a_published_model(partita: Run, tmp_path: Path) -> None:
    said = partita("plan", write(tmp_path, LLAMA_8B), "--tp", "4", "--pp", "2", "--dp", "2", "--json")
    assert said.code == 0
    data = json.loads(said.out)
    assert data["parameters"] == 8_030_261_248
    assert data["bytes"] == 2 * data["parameters"]
    assert data["mesh"] == {"dp": 2, "pp": 2, "tp": 4}
    assert data["layout"] == "Et*16|t*16L"
    assert [rank["rank"] for rank in data["ranks"]] == list(range(16))
    assert [(r["dp"], r["pp"], r["tp"]) for r in data["ranks"]][5:10] == [
        (0, 1, 1), (0, 1, 2), (0, 1, 3), (1, 0, 0), (1, 0, 1),
    ]  # fmt: skip
    assert data["ranks"][3]["layers"] == list(range(16))
    assert data["ranks"][15]["layers"] == list(range(16, 32))
    norms = (2 * 32 + 1) * 4096
    assert sum(rank["parameters"] for rank in data["ranks"][:8]) == data["parameters"] + 3 * norms
    assert all(rank["bytes"] == 2 * rank["parameters"] for rank in data["ranks"])


def test_lists_of_numbers_take_one_line(partita: Run, tmp_path: Path) -> None:
    said = partita("plan", write(tmp_path, LLAMA_8B), "--pp", "16", "--json")
    assert '"layers": [0, 1]' in said.out


def test_the_map_shows_ranks_layers_and_bytes(partita: Run, tmp_path: Path) -> None:
    said = partita("plan", write(tmp_path, LLAMA_8B), "--tp", "2", "--pp", "2")
    assert said.code == 0
    assert "LlamaForCausalLM: 8.03 B parameters" in said.out
    assert "14.96 GiB in bfloat16, 32 layers, 32 heads, 8 KV heads" in said.out
    assert "pp 2 x tp 2 = 4 ranks; layout Et*16|t*16L" in said.out
    rows = [line.replace("│", " ").split() for line in said.out.splitlines()]
    assert ["pp", "0", "rank", "0", "rank", "1", "embedding,", "layers", "0-15"] in rows
    assert ["pp", "1", "rank", "2", "rank", "3", "layers", "16-31,", "loss"] in rows
    assert ["2.01", "B,", "3.74", "GiB"] * 2 in rows


def test_the_picture_of_a_layer_shows_copies_of_kv_heads(partita: Run, tmp_path: Path) -> None:
    """14 heads over 3 ranks are 5, 5 and 4; heads 0 to 6 share KV head 0, so that rank 1 holds both."""
    said = partita("plan", write(tmp_path, QWEN2_HALF_B), "--tp", "3")
    rows = [line.split() for line in said.out.splitlines()]

    def row(name: str) -> str:
        return next(" ".join(row[1:]) for row in rows if row and row[0] == name)

    assert row("self_attn.q_proj.weight") == "[896, 896] rows | 0 | 1 | 2 | 0-1: [320, 896]; 2: [256, 896]"
    assert row("self_attn.k_proj.weight") == "[128, 896] rows | 0-1 | 1-2 | 0, 2: [64, 896]; 1: [128, 896]"
    assert row("self_attn.o_proj.weight").startswith("[896, 896] columns")
    assert row("input_layernorm.weight") == "[896] unsplit on every rank"
    assert row("lm_head.weight").startswith("(tied)")


def test_tensors_lists_every_kind_of_layer(partita: Run, tmp_path: Path) -> None:
    config = write(tmp_path, DEEPSEEK_V3)
    short, long = partita("plan", config, "--tp", "8").out, partita("plan", config, "--tp", "8", "--tensors").out
    assert "layers 3-60 (58 identical)" in short
    assert "layers 0-2 (3 identical)" not in short
    assert "layers 0-2 (3 identical)" in long
    assert "|0|1|2|3|4|5|6|7|0|1|2|3|4|5|6|7|" in long  # gate and up, fused, are cut each by itself
    cuts = json.loads(partita("plan", config, "--tp", "8", "--tensors", "--json").out)["tensors"]
    head = next(cut for cut in cuts if cut["name"] == "lm_head.weight")
    assert head["ranges"][7] == [[113120, 129280]]


def test_a_narrow_terminal_keeps_the_names(partita: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = partita("plan", write(tmp_path, LLAMA_8B), "--tp", "16")
    assert "self_attn.q_proj" in said.out
    assert "ranks 0-15, each" in said.out
    assert max(map(len, said.out.splitlines())) < 110


def test_a_layout_with_virtual_stages(partita: Run, tmp_path: Path) -> None:
    said = partita("plan", write(tmp_path, LLAMA_8B), "--pp", "2", "--layout", "Et*8|t*8|t*8|t*8L")
    assert "vpp 0: embedding, layers 0-7" in said.out
    assert "vpp 1: layers 24-31, loss" in said.out


def test_saved_plans_read_back(partita: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    said = partita("plan", write(tmp_path, TINY), "--tp", "2", "--save", str(file))
    assert said.code == 0
    plan = Plan.from_json(file.read_text())
    assert plan.mesh.tp == 2
    assert plan.spec.family == "llama"


def test_a_family_that_only_transformers_knows(partita: Run, tmp_path: Path) -> None:
    config = {
        "model_type": "biogpt", "architectures": ["BioGptForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100,
    }  # fmt: skip
    assert "biogpt" not in known_families()
    said = partita("plan", write(tmp_path, config), "--tp", "2", "--json")
    assert said.code == 0
    assert json.loads(said.out)["num_layers"] == 2


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ("--pp", "33"), "Use --pp 32 or less"),
        ({}, ("--pp", "2", "--layout", "Et|L"), "decoder"),
        ({"num_attention_heads": "many"}, (), "num_attention_heads"),
        ({"model_type": "no_such_model"}, (), "no_such_model"),
        ({"model_type": None}, (), "no `model_type`"),
    ],
)
def test_what_cannot_be_is_one_clear_message(
    partita: Run, tmp_path: Path, change: dict[str, Any], arguments: tuple[str, ...], message: str
) -> None:
    said = partita("plan", write(tmp_path, LLAMA_8B | change), *arguments)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize("model", ["nothing.json", "./nothing", "/no/such/folder", "a/b/c"])
def test_a_model_that_is_not_there(partita: Run, model: str) -> None:
    said = partita("plan", model)
    assert said.code == 2
    assert said.err == (
        f"error: {model} does not exist. Give a folder with a config.json, a config file or a hub id "
        "(owner/name, or owner/name:Q4_K_M for one of its GGUF files).\n"
    )


def test_a_hub_id_without_the_hub(partita: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = partita("plan", "nobody/no-such-model-here")
    assert said.code == 2
    assert said.err.startswith("error: nobody/no-such-model-here is not a local folder")


def test_a_plan_that_cannot_be_written(partita: Run, tmp_path: Path) -> None:
    said = partita("plan", write(tmp_path, TINY), "--save", str(tmp_path / "no" / "such" / "plan.json"))
    assert said.code == 2
    assert said.err == (
        f"error: --save {tmp_path}/no/such/plan.json cannot be written: there is no folder "
        f"{tmp_path}/no/such. Create it first.\n"
    )


@pytest.mark.fresh
def test_a_large_plan_loads_no_framework(tmp_path: Path) -> None:
    config = write(tmp_path, DEEPSEEK_V3)
    program = (
        "import sys; from partita.cli import main\n"
        f"sys.argv = ['partita', 'plan', {config!r}, '--tp', '8', '--pp', '8', '--json']\n"
        "try: main()\n"
        "finally: assert not {'torch', 'mlx', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["parameters"] == 671_026_404_352


# --- on MLX -----------------------------------------------------------------------------------------------------------

ON_MLX = LLAMA_8B | {"rms_norm_eps": 1e-5}
"""mlx-lm asks for what transformers has a default for."""


def on_mlx(partita: Run, folder: Path, config: dict[str, Any], *options: str) -> dict[str, Any]:
    pytest.importorskip("mlx_lm")
    said = partita("plan", write(folder, config), "--engine", "mlx", "--tensors", "--json", *options)
    assert said.code == 0, said.err
    data: dict[str, Any] = json.loads(said.out)
    return data


def test_mlx_has_the_plan_of_torch_for_a_llama(partita: Run, tmp_path: Path) -> None:
    options = ("--tp", "4", "--pp", "2", "--vpp", "2")
    data = on_mlx(partita, tmp_path, ON_MLX, *options)
    theirs = json.loads(partita("plan", write(tmp_path, ON_MLX), "--tensors", "--json", *options).out)
    assert {key: data[key] for key in data if key != "tensors"} == {
        key: theirs[key] for key in data if key != "tensors"
    }
    cuts = {cut["name"]: (cut["dim"], cut["ranges"]) for cut in data["tensors"]}
    assert cuts == {cut["name"]: (cut["dim"], cut["ranges"]) for cut in theirs["tensors"]}


def test_mlx_has_names_of_its_own(partita: Run, tmp_path: Path) -> None:
    """mlx-lm keeps the experts of a layer in one array each of gate, up and down."""
    moe = {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": [], "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "tie_word_embeddings": False, "max_position_embeddings": 64, "norm_topk_prob": True,
    }  # fmt: skip
    cuts = {cut["name"]: cut for cut in on_mlx(partita, tmp_path, moe, "--tp", "2")["tensors"]}
    down = cuts["model.layers.1.mlp.switch_mlp.down_proj.weight"]
    assert (down["shape"], down["dim"], down["ranges"]) == ([8, 64, 48], 2, [[[0, 24]], [[24, 48]]])


@pytest.mark.parametrize(("group_size", "edges"), [(64, [0, 192, 320]), (32, [0, 160, 320])])
def test_mlx_cuts_no_quantization_group(partita: Run, tmp_path: Path, group_size: int, edges: list[int]) -> None:
    config = TINY | {
        "hidden_size": 128, "intermediate_size": 320, "quantization": {"group_size": group_size, "bits": 4},
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    cuts = {cut["name"]: cut for cut in on_mlx(partita, tmp_path, config, "--tp", "2")["tensors"]}
    down = cuts["model.layers.0.mlp.down_proj.weight"]
    assert down["shape"] == [128, 320]
    assert down["ranges"] == [[edges[:2]], [edges[1:]]]


def test_the_plan_of_mlx_is_the_one_that_loads(partita: Run, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    import mlx.core as mx

    from partita.core.mesh import Mesh
    from partita.mlx.load import shard
    from partita.mlx.model.config import read_mlx_config
    from partita.mlx.model.mlx_lm_models import build, quantize
    from partita.mlx.proof.family import fill, plan_of_model

    config = TINY | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-5,
        "quantization": {"group_size": 32, "bits": 8},
    }
    file = tmp_path / "plan.json"
    assert partita("plan", write(tmp_path, config), "--engine", "mlx", "--save", str(file)).code == 0
    plan = Plan.from_json(file.read_text())
    config = read_mlx_config(config)
    model = fill(build(config), mx.float32)
    quantize(model, config)
    assert plan == plan_of_model(model, Mesh(), config=plan.spec.config)
    assert shard(model, plan).partita_plan == plan


def test_the_table_of_mlx(partita: Run, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    said = partita("plan", write(tmp_path, ON_MLX), "--engine", "mlx", "--tp", "2", "--pp", "2")
    assert said.code == 0
    rows = [line.replace("│", " ").split() for line in said.out.splitlines()]
    assert ["pp", "1", "rank", "2", "rank", "3", "layers", "16-31,", "loss"] in rows
    assert "layers 0-31 (32 identical), split over tp 2" in said.out


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"model_type": "biogpt"}, (), "the installed mlx-lm has no model for biogpt"),
        ({"quantization_config": {"quant_method": "aqlm"}}, (), "quantized by aqlm, which MLX does not support"),
        ({"hidden_size": None}, (), "mlx-lm cannot build llama from its config"),
        ({}, ("--pp", "33"), "Use --pp 32 or less"),
        ({}, ("--pp", "2", "--layout", "Et*32|mL"), "multi-token prediction"),
    ],
)
def test_what_mlx_cannot_split_is_refused_by_name(
    partita: Run, tmp_path: Path, change: dict[str, Any], arguments: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("mlx_lm")
    said = partita("plan", write(tmp_path, ON_MLX | change), "--engine", "mlx", *arguments)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert "Traceback" not in said.err


def test_without_mlx_it_says_what_to_install(partita: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "partita.cli.arguments.engine.find_spec", lambda name: None if name.startswith("mlx") else real(name)
    )
    said = partita("plan", write(tmp_path, LLAMA_8B), "--engine", "mlx")
    assert said.code == 2
    assert said.err == "error: the mlx engine needs mlx, which is not installed: pip install 'partita[mlx]'\n"
    assert partita("plan", write(tmp_path, LLAMA_8B)).code == 0
