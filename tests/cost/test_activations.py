"""The bytes that autograd saves of a layer of the torch engine are those that the counts say, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import partita.torch as pt
from partita.core.model.families import spec_from_config
from partita.cost.activations import Shape, layer_bytes
from partita.cost.kernels import KERNELS
from partita.cost.model import ModelCost

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "gpt_neox": {"model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4},
}  # fmt: skip
BATCH, LENGTH = 2, 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_keeps_what_is_counted(name: str, dtype: str) -> None:
    few, more = (_saved_bytes({**MODELS[name], "num_hidden_layers": n, "n_layer": n}, dtype) for n in (1, 2))
    config = {**MODELS[name], "num_hidden_layers": 2, "n_layer": 2, "vocab_size": 128, "dtype": dtype}
    model = ModelCost.of(spec_from_config(config))
    layer = model.sliced(1).layers[0][0]
    counted = layer_bytes(layer, model, Shape(BATCH, LENGTH, LENGTH, dtype), KERNELS["torch"], "none")
    assert more - few == counted


def _saved_bytes(config: dict[str, Any], dtype: str) -> int:
    model = pt.fresh({**config, "vocab_size": 128}, dtype=dtype).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.randint(128, (BATCH, LENGTH)), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
