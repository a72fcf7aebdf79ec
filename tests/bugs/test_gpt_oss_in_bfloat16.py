"""gpt-oss whose experts are not quantized was refused on MLX ("of another model"): mlx-lm knows quantized ones only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.mlx_ranks import mlx_ranks

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64,
    "initializer_range": 0.2, "pad_token_id": None, "max_position_embeddings": 64,
}  # fmt: skip
IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def on_mlx(folder: str, tp: int) -> list[float]:
    import mlx.core as mx

    from partita.mlx.load import load
    from partita.mlx.model.parts import main_output
    from partita.mlx.proof.reference import unchecked

    with unchecked():
        model = load(folder, tp=tp, dtype="float32")
    return main_output(model(mx.array(IDS))).flatten().tolist()  # type: ignore[return-value]


@pytest.mark.parametrize("tp", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_it_loads_and_is_transformers(tp: int, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **SIZES), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.2)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        want = whole(torch.tensor(IDS)).logits.flatten()
    for got in mlx_ranks(tp).run(on_mlx, str(tmp_path), tp):
        assert float((torch.tensor(got) - want).abs().max() / want.abs().max()) <= 1e-4
