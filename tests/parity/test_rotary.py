"""Rotary embeddings on MLX equal those of transformers, in every form and family, whichever keys mlx-lm reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from partita.core.model.rotary import Rotary
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.parts import main_output
from partita.mlx.model.rotary import RotaryEmbedding
from partita.mlx.model.tree import named_modules

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: dict[str, Any] = {
    **EXPERTS, "num_key_value_heads": 4, "head_dim": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 16, "v_head_dim": 6,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "glm4": {"partial_rotary_factor": 1.0},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
                 "topk_group": 1, "partial_rotary_factor": 1.0, "use_qk_norm": True},
    "ernie4_5": {"use_bias": True},
    "cohere": {},
    "helium": {},
    "gemma": {},
    "gemma2": {"sliding_window": 64},
    "phi": {"partial_rotary_factor": 1.0, "num_key_value_heads": 4},
    "stablelm": {"partial_rotary_factor": 1.0},
    "starcoder2": {"sliding_window": None},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "sliding_window": 64},
    "deepseek_v3": LATENT,
}  # fmt: skip
"""What of a family's config is not its default."""

PAIRS = 8
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 4.0}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FORMS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn, not truncated": {**YARN, "truncate": False, "original_max_position_embeddings": 4096, "beta_fast": 20.0},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.5},
    "yarn, mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0 + i / 4 for i in range(PAIRS)],
        "long_factor": [2.0 + i for i in range(PAIRS)],
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip
LIMIT = 5e-4
"""What mlx-lm rounds otherwise (gelu by its tanh, a root of the width to bfloat16) is below; a form left out is above 0.01."""

LENGTHS = (12, 40)
"""Below and above 16 positions, after which LongRoPE and dynamic NTK (whose config has so many) change."""


def error(family: str, changes: dict[str, Any], folder: Path, *, old_keys: bool = False) -> float:
    """The largest difference of the engines' logits, relative to the largest of torch's."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    if old_keys:
        file = folder / "config.json"
        data = json.loads(file.read_text())
        rotary = data.pop("rope_parameters")
        data |= {"rope_theta": rotary.pop("rope_theta"), "rope_scaling": {**rotary, "type": rotary["rope_type"]}}
        file.write_text(json.dumps(data))
    on_mlx = load(folder, groups=single_groups())
    worst = 0.0
    for length in LENGTHS:
        ids = torch.randint(3, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            want = model(ids, use_cache=False).logits.numpy()
        got = np.array(main_output(on_mlx(mx.array(ids.tolist()))))
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
    return worst


def rotary(form: str) -> dict[str, Any]:
    positions = {"max_position_embeddings": 16} if form == "dynamic" else {}
    return {"rope_parameters": {"rope_theta": 10000.0, **FORMS[form]}, **positions}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_every_form_is_as_in_transformers(family: str, form: str, tmp_path: Path) -> None:
    if family == "gpt_oss" and form == "longrope":
        pytest.skip("mlx-lm cannot build it")
    assert error(family, {**FAMILIES[family], **rotary(form)}, tmp_path) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("form", ["linear", "dynamic", "yarn, attention_factor", "llama3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_every_form(family: str, form: str, tmp_path: Path) -> None:
    assert error(family, {**FAMILIES[family], **rotary(form)}, tmp_path) <= LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_leaves_scaling_out(family: str, tmp_path: Path) -> None:
    assert error(family, {**FAMILIES[family], **rotary("linear")}, tmp_path) <= LIMIT


@pytest.mark.parametrize("form", ["yarn, not truncated", "llama3", "longrope"])
def test_keys_from_before_transformers_5(form: str, tmp_path: Path) -> None:
    assert error("llama", rotary(form), tmp_path, old_keys=True) <= LIMIT


PHI3_MOE = {**EXPERTS, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True, "head_dim": 16}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": FORMS["longrope"]}),
        ("phi3", {"original_max_position_embeddings": 16, "partial_rotary_factor": 0.5,
                  "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5],
                                      "long_factor": [2.0, 3.0, 4.0, 5.0]}}),
        ("phimoe", {**PHI3_MOE, "rope_parameters": {**FORMS["longrope"], "rope_theta": 10000.0, "short_mscale": 1.1,
                                                    "long_mscale": 1.3}}),
        ("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "rope_parameters": {**LINEAR, "rope_theta": 10000.0}}),
        ("stablelm", {"partial_rotary_factor": 0.25, "rope_parameters": {**YARN, "rope_theta": 10000.0}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
        ("gemma3_text", {
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "sliding_window_pattern": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {**LINEAR, "rope_theta": 10000.0},
            },
        }),
        ("olmo3", {
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {**YARN, "rope_theta": 10000.0, "attention_factor": 1.3},
            },
        }),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}),
    ],
    ids=["phi3", "phi3, partial", "phimoe", "phi, partial", "stablelm, partial", "llama, base", "gemma3", "olmo3", "mrope"],
)  # fmt: skip
def test_forms_of_single_families(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert error(family, changes, tmp_path) <= LIMIT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [10, 4096, 5000, 40000])
def test_frequencies_are_those_of_transformers(form: str, length: int) -> None:
    parameters = {"rope_theta": 150000.0, **FORMS[form]}
    if "short_factor" in parameters:
        parameters |= {name: [1.0 + i for i in range(32)] for name in ("short_factor", "long_factor")}
    config = AutoConfig.for_model("llama", hidden_size=256, num_attention_heads=4, max_position_embeddings=8192,
                                  rope_parameters=parameters)  # fmt: skip
    want, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    form_here = Rotary(64, dict(config.rope_parameters), 8192)
    assert np.allclose(form_here.inverse_frequencies(length), want.numpy(), rtol=1e-6, atol=0)
    assert form_here.scale(length) == pytest.approx(scale)


def test_rows_of_a_batch_do_not_depend_on_each_other() -> None:
    rope = RotaryEmbedding(Rotary(16, {"rope_theta": 10000.0, **FORMS["longrope"]}, 64), traditional=False)
    x = mx.random.normal((2, 3, 1, 16), key=mx.random.key(0))
    both = rope(x, mx.array([4, 30]))
    assert mx.array_equal(both[:1], rope(x[:1], 4))
    assert mx.array_equal(both[1:], rope(x[1:], 30))
    assert not mx.array_equal(both[1:], rope(x[1:], 4))


def test_a_plain_form_stays_mlxs_own(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(tmp_path)
    modules = named_modules(load(tmp_path, groups=single_groups())).values()
    assert not any(isinstance(module, RotaryEmbedding) for module in modules)
