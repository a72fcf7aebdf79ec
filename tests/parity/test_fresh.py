"""New weights on MLX: torch reads what is saved of them, computes the same with it, and would have begun with the like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoConfig

from partita.mlx.collectives.groups import single_groups
from partita.mlx.model.parts import main_output
from partita.mlx.new import fresh
from partita.mlx.weights.save import save
from partita.torch.collectives import groups as torch_groups
from partita.torch.load import load
from partita.torch.new import fresh as fresh_on_torch

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {**SIZES, "num_experts_per_tok": 2}
MIXED: dict[str, Any] = {
    **SIZES, "head_dim": 16, "sliding_window": 32, "sliding_window_pattern": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "initializer_range": 0.05},
    "mistral": SIZES,
    "qwen2": {**SIZES, "tie_word_embeddings": True},
    "qwen3": {**SIZES, "head_dim": 16},
    "gemma": {**SIZES, "head_dim": 16},
    "gemma2": {**SIZES, "head_dim": 16},
    "gemma3_text": MIXED,
    "cohere2": MIXED,
    "phi": SIZES,
    "phi3": SIZES,
    "gpt2": {"vocab_size": 67, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "olmo2": SIZES,
    "stablelm": SIZES,
    "starcoder2": SIZES,
    "granite": SIZES,
    "glm4": {**SIZES, "head_dim": 16},
    "smollm3": SIZES,
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16},
    "deepseek_v3": {
        **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
        "moe_intermediate_size": 24, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 12,
        "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6,
    },
}  # fmt: skip
"""By family, what of its config is not its default."""


@pytest.mark.parametrize("family", CONFIGS)
def test_torch_reads_what_began_on_mlx(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **CONFIGS[family]).to_dict() | {"dtype": "float32"}
    on_mlx = fresh(config, seed=1, groups=single_groups())
    save(on_mlx, tmp_path / "model")
    on_torch = load(tmp_path / "model", groups=torch_groups.single_groups())
    theirs = fresh_on_torch(config, seed=1, groups=torch_groups.single_groups())
    # This process is no rank of what is tested elsewhere.
    torch.distributed.destroy_process_group()
    ids = [[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]]
    with torch.no_grad():
        expected = on_torch(input_ids=torch.tensor(ids)).logits.numpy()
    found = np.array(main_output(on_mlx(mx.array(ids))))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    mine = on_torch.state_dict()
    assert mine.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() > 1:
            assert_alike(name, mine[name], tensor)


def assert_alike(name: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Constants are the same; what is drawn is of the same deviation, within what so few numbers tell."""
    deviation = float(theirs.std())
    if deviation == 0:
        assert torch.equal(mine, theirs), name
    else:
        assert float(mine.std()) == pytest.approx(deviation, rel=0.25), name
        assert abs(float(mine.mean())) <= 5 * deviation / theirs.numel() ** 0.5, name
