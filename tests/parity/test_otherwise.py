"""Families that mlx-lm computes otherwise than transformers: they are refused, and would be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from partita.errors import ModelError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model import config as mlx_config
from partita.mlx.model import mlx_lm_models
from partita.mlx.model.parts import main_output

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1,
    "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 32,
}  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), [("glm", {}), ("afmoe", EXPERTS)])
def test_it_is_refused_and_would_differ(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **changes)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{family} would give different results on MLX: .* Use the torch engine"):
        load(tmp_path, groups=single_groups())
    monkeypatch.setattr(mlx_config, "COMPUTED_OTHERWISE", {})
    ids = [[3, 1, 4, 1, 5, 9, 2, 6]]
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    got = np.array(main_output(load(tmp_path, groups=single_groups())(mx.array(ids))))
    assert np.abs(got - want).max() > 0.01 * np.abs(want).max()


def test_every_family_of_the_table_is_measured() -> None:
    assert set(mlx_config.COMPUTED_OTHERWISE) == {"glm", "afmoe"}


@pytest.mark.parametrize("asked", ["relu", "gelu"])
def test_an_activation_that_is_not_built_in_is_refused_and_would_differ(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", hidden_act=asked, **SIZES)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"has hidden_act '{asked}', but mlx-lm's model always computes 'silu'"):
        load(tmp_path, groups=single_groups())
    monkeypatch.setattr(mlx_lm_models, "check_activation", lambda config, arguments: None)
    ids = [[3, 1, 4, 1, 5, 9, 2, 6]]
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    got = np.array(main_output(load(tmp_path, groups=single_groups())(mx.array(ids))))
    assert np.abs(got - want).max() > 0.01 * np.abs(want).max()
