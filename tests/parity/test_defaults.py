"""A config that leaves things to their defaults means transformers' on both engines, not mlx-lm's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.config import read_mlx_config
from partita.mlx.model.parts import main_output

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "granite", "stablelm"])
def test_what_is_not_in_the_config_is_as_transformers_has_it(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = {"head_dim": 16} if family == "qwen3" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **head)).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    whole = json.loads(file.read_text())
    kept = {*SIZES, *head, "model_type", "architectures", "dtype"}
    file.write_text(json.dumps({name: value for name, value in whole.items() if name in kept}))
    ids = [[3, 1, 4, 1, 5, 9, 2, 6]]
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(torch.tensor(ids)).logits.numpy()
    got = np.array(main_output(load(tmp_path, groups=single_groups())(mx.array(ids))))
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_what_is_in_the_config_stays() -> None:
    config = read_mlx_config({"model_type": "qwen2", "rope_theta": 5.0, "tie_word_embeddings": True, "other": 1})
    assert (config["rope_theta"], config["tie_word_embeddings"], config["other"]) == (5.0, True, 1)
    assert read_mlx_config({"model_type": "no_such_family", "x": 1}) == {"model_type": "no_such_family", "x": 1}
