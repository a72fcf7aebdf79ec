"""New models: the same unsplit weights for every mesh, drawn in parts, and saved under the names of transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from partita.errors import ModelError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.model.mlx_lm_models import build
from partita.mlx.model.parts import parameter_homes
from partita.mlx.new import fresh
from partita.mlx.train import train
from partita.mlx.weights import initial
from partita.mlx.weights.initial import zero_scales
from partita.mlx.weights.save import save
from partita.training import StepReport, TrainSettings
from tests.support.mlx_models import tiny_config
from tests.support.mlx_ranks import mlx_ranks
from tests.support.ranks import ROOT

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 101, "hidden_size": 56,
    "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 7, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True,
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 101, "hidden_size": 32,
    "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
    "max_position_embeddings": 64, "dtype": "float32",
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64,
    "layer_norm_epsilon": 1e-5, "dtype": "float32",
}  # fmt: skip


def weights(model: Any) -> dict[str, mx.array]:
    return {name: home[key] for name, (home, key) in parameter_homes(model).items()}


def saved(folder: str, config: dict[str, Any], mesh: tuple[int, int, int], block_elements: int) -> None:
    initial.BLOCK_ELEMENTS = block_elements
    try:
        dp, pp, tp = mesh
        save(fresh(config, dp=dp, pp=pp, tp=tp, seed=5), folder)
    finally:
        initial.BLOCK_ELEMENTS = 1 << 22


@pytest.mark.parametrize("config", [LLAMA, MOE, GPT2], ids=["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize(
    ("size", "mesh"), [(2, (1, 1, 2)), (2, (1, 2, 1)), (2, (2, 1, 1)), (3, (1, 1, 3)), (4, (1, 2, 2))]
)
def test_every_mesh_begins_with_the_same_bits(
    config: dict[str, Any], size: int, mesh: tuple[int, int, int], tmp_path: Path
) -> None:
    """In blocks of a few rows, so that parts begin and end within blocks."""
    saved(str(tmp_path / "alone"), config, (1, 1, 1), 300)
    mlx_ranks(size).run(saved, str(tmp_path / "split"), config, mesh, 300)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "split" / name).read_bytes()


def test_what_is_saved_is_named_as_transformers_names_it(tmp_path: Path) -> None:
    save(fresh(MOE, groups=single_groups()), tmp_path / "model")
    tensors: Any = mx.load(str(tmp_path / "model" / "model.safetensors"))
    assert tensors["model.layers.1.mlp.experts.4.down_proj.weight"].shape == (32, 24)
    assert "lm_head.weight" not in tensors
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == MOE


def test_seeds_and_blocks_draw_other_numbers() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    one, same, other = (weights(fresh(LLAMA, seed=s, groups=single_groups())) for s in (0, 0, 1))
    assert all(mx.array_equal(one[n], same[n]) for n in one)
    assert not mx.array_equal(one[name], other[name])
    assert not mx.array_equal(one[name], one[name.replace(".0.", ".1.")])
    rows = np.array(one[name])
    assert len(np.unique(rows)) > 0.99 * rows.size


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_kinds_of_weights(family: str) -> None:
    config = (LLAMA if family == "llama" else MOE) | {"initializer_range": 0.05}
    for name, array in weights(fresh(config, groups=single_groups())).items():
        numbers = np.array(array)
        if name.endswith("norm.weight"):
            assert np.all(numbers == 1), name
        elif name.endswith("bias"):
            assert np.all(numbers == 0), name
        else:
            assert numbers.std() == pytest.approx(0.05, rel=0.15), name
            assert abs(numbers.mean()) < 0.01, name


@pytest.mark.parametrize(
    ("family", "count"),
    [("gemma", 9), ("gemma2", 17), ("nemotron", 9), ("gemma3_text", 25), ("llama", 0), ("olmo2", 0), ("mamba2", 0)],
)
def test_norms_that_add_one_to_their_scale(family: str, count: int) -> None:
    model = build(tiny_config(family))
    names = zero_scales(model)
    assert len(names) == count
    assert all("norm" in name for name in names)
    # Nothing of the model was changed to find out.
    assert all(mx.all(weights(model)[name] == 1).item() for name in names)


def test_bfloat16_begins_at_the_rounded_weights_of_float32() -> None:
    wide = weights(fresh(LLAMA, seed=2, groups=single_groups()))
    narrow = weights(fresh(LLAMA, seed=2, dtype="bfloat16", groups=single_groups()))
    for name, array in narrow.items():
        assert array.dtype == mx.bfloat16
        assert mx.array_equal(array, wide[name].astype(mx.bfloat16))


def test_the_dtype_is_that_of_the_config() -> None:
    model = fresh(LLAMA | {"dtype": "float16"}, groups=single_groups())
    assert {array.dtype for array in weights(model).values()} == {mx.float16}


SETTINGS: dict[str, Any] = {
    "steps": 4, "batch_size": 4, "sequence_length": 12, "learning_rate": 1e-2, "warmup_steps": 1,
}  # fmt: skip


def curve(config: dict[str, Any], options: dict[str, Any], settings: dict[str, Any]) -> list[StepReport]:
    text = [(7 * i * i + 3 * i) % 101 for i in range(600)]
    return train(fresh(config, seed=3, **options), text, TrainSettings(**SETTINGS, **settings))


@pytest.mark.parametrize(
    ("size", "options", "settings"),
    [
        (2, {"tp": 2}, {}),
        (2, {"pp": 2, "layout": "Et|ttL"}, {"microbatches": 2}),
        (2, {"pp": 2, "layout": "Et|t|t|L", "placement": "v"}, {"microbatches": 2, "schedule": "zb-v"}),
        (4, {"dp": 2, "tp": 2}, {}),
    ],
)
def test_the_curve_from_the_beginning(size: int, options: dict[str, Any], settings: dict[str, Any]) -> None:
    alone = curve(LLAMA, {"groups": single_groups()}, {})
    assert alone[0].loss == pytest.approx(np.log(101), rel=0.01)
    assert alone[-1].loss < alone[0].loss
    for rank in mlx_ranks(size).run(curve, LLAMA, options, settings):
        assert [r.loss for r in rank] == pytest.approx([r.loss for r in alone], rel=1e-5)


def test_no_rank_ever_holds_a_whole_array() -> None:
    """Beside its halves of an embedding and of a head, a rank of two has the blocks of one half until it is whole."""
    config = LLAMA | {"vocab_size": 1 << 16, "hidden_size": 112, "num_hidden_layers": 1}
    half_bytes = (1 << 16) * 112 * 4 // 2
    for peak in mlx_ranks(2).run(peak_bytes, config):
        assert 2 * half_bytes < peak < 3.2 * half_bytes


def peak_bytes(config: dict[str, Any]) -> int:
    """The most memory that MLX had while this rank made its part."""
    initial.BLOCK_ELEMENTS = 1 << 16
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    try:
        fresh(config, tp=2)
    finally:
        initial.BLOCK_ELEMENTS = 1 << 22
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"quantization": {"group_size": 32, "bits": 4}}, "new weights are not quantized, but the config is"),
        (
            {**tiny_config("gpt_oss"), "architectures": ["GptOssForCausalLM"]},
            "a new gpt_oss cannot be created on MLX.*gate_proj.weight is computed from tensors on disk. Create it on torch",
        ),
        (tiny_config("rwkv7"), "a new rwkv7 cannot be created on MLX.*Partita has no table of this family's tensors"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "no tensor on disk provides lm_head.weight"),
        (LLAMA | {"model_type": "biogpt"}, "cannot be created on MLX"),
    ],
)
def test_what_cannot_begin_on_mlx(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fresh(config, groups=single_groups())


@pytest.mark.fresh
@pytest.mark.timeout(120)
def test_the_command_line_trains_new_weights_on_mlx(tmp_path: Path) -> None:
    config = LLAMA | {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 60)
    command = [
        sys.executable, "-m", "partita", "train", "--engine", "mlx", "--config", str(tmp_path / "config.json"),
        "--data", str(tmp_path / "text.txt"), "--tp", "2", "--steps", "3", "--batch-size", "2", "--sequence-length", "16",
        "--out", str(tmp_path / "out"), "--seed", "7", "--json",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    losses = [step["loss"] for step in json.loads(ended.stdout)["steps"]]
    assert losses[0] == pytest.approx(np.log(257), rel=0.02)
    assert (tmp_path / "out" / "model.safetensors").exists()
