"""Quantized checkpoints for tests, written from the definition of their format, and the same values as a plain model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from partita.torch.model.transformers_models import quiet, read_hf_config

Write = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
"""Takes a weight's name and values; returns its tensors on disk and the values that they stand for."""

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 64,
}  # fmt: skip
"""Heads that tp 3 divides and tp 4 does not; no width is a multiple of 128."""

QWEN_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 72, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "num_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip


def write_quantized(
    folder: Path,
    data: Mapping[str, Any],
    quantization: Mapping[str, Any],
    write: Write,
    applies: Callable[[str], bool] = lambda name: "proj" in name,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Write a random model whose weights are quantized; returns the values of all its tensors by the model's names.

    Args:
        folder: Where to write it.
        data: A transformers config as data.
        quantization: Its `quantization_config`.
        write: Quantizes one weight.
        applies: Which names on disk are quantized.
        dtype: The dtype of the other tensors.
    """
    with quiet():
        config = read_hf_config({**data, "dtype": str(dtype).removeprefix("torch.")})
        model = transformers.AutoModelForCausalLM.from_config(config)
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(
                    torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1)
                )
        model.to(dtype)
        plain = folder / "plain"
        model.save_pretrained(plain)
    on_disk = _read(plain)
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in on_disk.items():
        tensors, value = write(name, tensor) if applies(name) else ({name: tensor}, tensor)
        stored |= tensors
        values[name] = value.float().contiguous()
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    described = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": dict(quantization)}))
    (plain / "config.json").write_text(json.dumps({**described, "dtype": "float32"}))
    return values


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def dequantized(folder: Path, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The unsplit model with the values that `write_quantized` wrote, as transformers loads it."""
    with quiet():
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "plain", dtype=dtype, experts_implementation="eager"
        )
    return model.eval()


def fp8(name: str, weight: Tensor, block: int = 128) -> tuple[dict[str, Tensor], Tensor]:
    """FP8 in blocks of 128 x 128, as DeepSeek publishes it: edge blocks have fewer elements."""
    rows, columns = (math.ceil(size / block) for size in weight.shape)
    scale = torch.empty(rows, columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for r in range(rows):
        for c in range(columns):
            box = slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block)
            scale[r, c] = weight[box].float().abs().max() / 448
            codes[box] = (weight[box].float() / scale[r, c]).to(torch.float8_e4m3fn)
    spread = scale.repeat_interleave(block, 0)[: weight.shape[0]].repeat_interleave(block, 1)[:, : weight.shape[1]]
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * spread


def fp8_channels(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """FP8 with a scale for each output."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale


def fp8_tensor(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """FP8 with one scale."""
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
FP8_PLAIN = {"quant_method": "fp8", "activation_scheme": "dynamic"}
