"""Scaled rotary positions of GGUF files, which transformers' own loader overlooks, against Hugging Face folders with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, RopeScalingType

from partita.checkpoint.find import find_model
from partita.errors import CheckpointError
from partita.torch.load import load
from partita.torch.model.float64 import Float64Everywhere
from tests.support.compare import EXACT
from tests.support.gguf_files import CONFIGS, random_model, write_model

IDS = torch.arange(3, 243).view(2, 120)

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _llama3_factors(rope: dict[str, Any], width: int) -> np.ndarray:
    """As convert_hf_to_gguf.py writes them."""
    factors = []
    for place in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (place / width)
        original, low, high = (
            rope["original_max_position_embeddings"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
        )
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def _llama3(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", _llama3_factors(LLAMA3, 16))


def _yarn(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


def _linear(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


LONG, SHORT = [1.0 + 0.3 * place for place in range(8)], [1.0 + 0.01 * place for place in range(8)]


def _longrope(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_tensor("rope_factors_long.weight", np.array(LONG, np.float32))
    writer.add_tensor("rope_factors_short.weight", np.array(SHORT, np.float32))


CASES: dict[str, tuple[str, dict[str, Any], Callable[[GGUFWriter], None]]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}, _llama3),
    "yarn": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                             "original_max_position_embeddings": 32}},
        _yarn,
    ),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}}, _linear),
    "gemma3": (
        "gemma3",
        {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }},
        _linear,
    ),
    "longrope": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": LONG, "short_factor": SHORT,
                             "partial_rotary_factor": 1.0, "original_max_position_embeddings": 64},
         "original_max_position_embeddings": 64},
        _longrope,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_positions_are_scaled(name: str, tmp_path: Path) -> None:
    architecture, scaling, extra = CASES[name]
    data = {**CONFIGS[architecture], **scaling}
    model = random_model(data)
    write_model(tmp_path / "model.gguf", model, ("Q8_0",), extra=extra)
    model.save_pretrained(tmp_path / "folder")
    logits = []
    for place in ("folder", "model.gguf"):
        split = load(tmp_path / place, dtype="float64")
        with torch.no_grad(), Float64Everywhere():
            logits.append(split(input_ids=IDS).logits)
    expected, found = logits
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()


def test_factors_of_another_scaling_are_refused(tmp_path: Path) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8).astype(np.float32))

    write_model(tmp_path / "model.gguf", random_model(CONFIGS["llama"]), ("Q8_0",), extra=extra)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight has factors that are not Llama 3\.1's"):
        find_model(tmp_path / "model.gguf")
