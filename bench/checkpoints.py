"""Checkpoints of random weights, made for a comparison."""

from __future__ import annotations

from pathlib import Path

CONFIG = {
    "dtype": "float32",
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


DECODED = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32000,
}
"""Of the models that continue a prompt: 106M parameters."""

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def make(folder: Path, family: str = "llama", **sizes: int) -> int:
    """Write a model of these sizes (by default `DECODED`) into `folder`; its parameters. For one rank alone."""
    from partita.torch.new import fresh
    from partita.torch.weights.save import save

    named = {"model_type": family, "architectures": [FAMILIES[family]]}
    model = fresh({**CONFIG, **named, **(sizes or DECODED)}, seed=1)
    save(model, folder)
    return sum(parameter.numel() for parameter in model.parameters())
