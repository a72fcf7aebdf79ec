"""Sliding windows: which families mlx-lm runs without theirs is measured against transformers, and only those are refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import make_prompt_cache
from transformers import AutoConfig

from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.config import read_mlx_config
from partita.mlx.model.parts import main_output
from partita.mlx.model.sliding_window import LEFT_OUT, window_left_out
from partita.torch.collectives import groups as torch_groups
from partita.torch.new import fresh
from partita.torch.weights.save import save

WINDOW, LENGTH = 4, 12
SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": WINDOW, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATE: dict[str, Any] = {"use_sliding_window": True, "max_window_layers": 1}

WITHOUT: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {}),
    ("ministral3", {}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("starcoder2", {}),
    ("phi3", {}),
    ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True}),
    ("gemma2", {}),
    ("qwen2", LATE),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24, "use_sliding_window": True, "max_window_layers": 28}),
    ("qwen3", LATE),
    ("qwen3_moe", {**EXPERTS, "use_sliding_window": True}),
    ("dots1", {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
               "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "max_window_layers": 0}),
]  # fmt: skip
"""Families that mlx-lm runs without their window, and what switches it on."""

WITH: list[tuple[str, dict[str, Any]]] = [
    ("gemma3_text", {"layer_types": MIXED, "sliding_window_pattern": 2}),
    ("cohere2", {"layer_types": MIXED, "sliding_window_pattern": 2}),
    ("olmo3", {"layer_types": MIXED}),
    ("smollm3", {"use_sliding_window": True, "no_rope_layers": [1, 0]}),
    ("laguna", {**EXPERTS, "layer_types": MIXED}),
    ("mellum", {**EXPERTS, "layer_types": MIXED}),
]
"""Families that have it on both engines."""

NONE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen2", {**LATE, "max_window_layers": 2}),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}),
    ("qwen3_moe", {**EXPERTS, "use_sliding_window": False}),
    (
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 24, "use_sliding_window": True, "max_window_layers": 0},
    ),
    ("gemma2", {"layer_types": ["full_attention"] * 2}),
    ("mistral", {"sliding_window": None}),
    ("phi3", {"sliding_window": None}),
]
"""Configs that have none on either, whatever `sliding_window` says."""


def errors(family: str, changes: dict[str, Any], folder: Path) -> tuple[float, float, float]:
    """How far MLX's logits are from transformers': up to the window, beyond it, and beyond it token by token."""
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    model = fresh(config, seed=1, dtype="float32", groups=torch_groups.single_groups())
    save(model, folder)
    ids = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, LENGTH))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids)).logits.numpy()
    # This process is no rank of what is tested elsewhere.
    torch.distributed.destroy_process_group()
    on_mlx = load(folder, groups=single_groups())
    cache = make_prompt_cache(on_mlx)
    starts = [0, *range(WINDOW, LENGTH + 1)]
    parts = [mx.array(ids[:, a:b]) for a, b in pairwise(starts)]
    at_once, by_token = (
        np.array(x)
        for x in (
            main_output(on_mlx(mx.array(ids))),
            mx.concatenate([main_output(on_mlx(part, cache=cache)) for part in parts], axis=1),
        )
    )
    scale = np.abs(expected).max()
    whole, steps = (np.abs(found - expected).max(axis=(0, 2)) / scale for found in (at_once, by_token))
    return float(whole[:WINDOW].max()), float(whole[WINDOW:].max()), float(steps[WINDOW:].max())


EQUAL = 1e-3
"""starcoder2's gelu is exact on MLX and approximated by transformers: 1e-4; others are within rounding, 1e-5."""
DIFFERENT = 0.05


@pytest.mark.parametrize(("family", "changes"), WITHOUT, ids=lambda value: value if isinstance(value, str) else "")
def test_without_its_window(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    up_to, beyond, by_token = errors(family, changes, tmp_path / "model")
    assert up_to < EQUAL
    assert min(beyond, by_token) > DIFFERENT
    assert window_left_out(read_mlx_config(tmp_path / "model")) == WINDOW


@pytest.mark.parametrize(("family", "changes"), WITH + NONE, ids=lambda value: value if isinstance(value, str) else "")
def test_nothing_is_left_out(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert max(errors(family, changes, tmp_path / "model")) < EQUAL
    assert window_left_out(read_mlx_config(tmp_path / "model")) is None


def test_every_family_of_the_table_is_measured() -> None:
    of_images = {"qwen2_vl", "qwen2_vl_text"}  # their text is qwen2's
    assert {family for family, _ in WITHOUT} == LEFT_OUT.keys() - of_images


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "gemma2"}, 4096),
        ({"model_type": "mixtral"}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "num_hidden_layers": 28}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "num_hidden_layers": 29}, 16),
        ({"model_type": "qwen2", "sliding_window": 16, "num_hidden_layers": 29}, None),
        ({"model_type": "dots1", "num_hidden_layers": 62}, None),
        ({"model_type": "dots1", "num_hidden_layers": 63}, 4096),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral", "hidden_size": 8}}, 4096),
        ({"model_type": "pixtral", "text_config": {"model_type": "mistral", "hidden_size": 8, "sliding_window": 5}}, 5),
    ],
)  # fmt: skip
def test_what_a_config_says(config: dict[str, Any], window: int | None) -> None:
    assert window_left_out(read_mlx_config(config)) == window
