"""Phi-3 with LongRoPE on MLX used the long factors for every text: its tokens left transformers' at the second one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.mlx_ranks import mlx_ranks

PAIRS, LIMIT = 8, 12
SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "original_max_position_embeddings": LIMIT, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 4 for i in range(PAIRS)],
    "long_factor": [2.0 + i for i in range(PAIRS)], "original_max_position_embeddings": LIMIT,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": LONG},
    "phimoe": {
        "rope_parameters": {**LONG, "short_mscale": 1.1, "long_mscale": 1.4}, "num_local_experts": 4, "attention_bias": True,
        "lm_head_bias": True,
    },
    "llama": {"rope_parameters": LONG},
    "qwen2": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, "max_position_embeddings": LIMIT,
    },
}  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4, 5]]
"""One that crosses the limit while it is continued, and one that is beyond it."""
NEW = 14


def transformers_tokens(family: str, folder: Path) -> list[list[int]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        # Dynamic NTK keeps the frequencies of the longest text that a model has seen.
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found


def mlx_tokens(folder: str, tp: int, pp: int, at_once: int) -> list[list[int]]:
    from partita.generation import Sampling
    from partita.mlx.generate import generate
    from partita.mlx.load import load
    from partita.mlx.proof.reference import unchecked
    from partita.mlx.stages import batches, flow

    kept = batches.PREFILL_TOKENS
    batches.PREFILL_TOKENS = flow.PREFILL_TOKENS = at_once
    try:
        with unchecked():
            model = load(folder, tp=tp, pp=pp)
        return [list(g.tokens) for g in generate(model, PROMPTS, Sampling(max_new_tokens=NEW, ignore_eos=True))]
    finally:
        batches.PREFILL_TOKENS = flow.PREFILL_TOKENS = kept


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    want = transformers_tokens(family, tmp_path)
    for tp, pp, at_once in ((2, 1, 2048), (2, 1, 5), (1, 2, 2048)):
        for got in mlx_ranks(2).run(mlx_tokens, str(tmp_path), tp, pp, at_once):
            assert got == want
