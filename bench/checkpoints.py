"""Checkpoints of random weights, made for a comparison."""

from __future__ import annotations

from pathlib import Path

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float32",
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def make(folder: Path, **sizes: int) -> int:
    """Write a Llama of these sizes into `folder`; its parameters. For one rank alone."""
    from partita.torch.fresh import fresh
    from partita.torch.save import save

    model = fresh({**CONFIG, **sizes}, seed=1)
    save(model, folder)
    return sum(parameter.numel() for parameter in model.parameters())
