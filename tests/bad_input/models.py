"""Small models on disk, made without any engine, and their parts to be broken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from partita import spec_from_config
from tests.cli.models import TINY

LLAMA: dict[str, Any] = {**TINY, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 16, "n_ctx": 16, "layer_norm_epsilon": 1e-5, "vocab_size": 257, "eos_token_id": 256, "bos_token_id": 256,
    "dtype": "float32",
}  # fmt: skip
QUERY = "model.layers.0.self_attn.q_proj.weight"

Weights = Mapping[str, np.ndarray[Any, Any]]


def weights(config: Mapping[str, Any] = LLAMA) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a model, all alike."""
    spec = spec_from_config(config)
    return {name: np.full(t.shape, 0.01, np.float32) for name, t in spec.tensors.items() if t.tied_to is None}


def write(folder: Path, config: object = LLAMA, tensors: Weights | None = None, **texts: str) -> Path:
    """A model's folder.

    Args:
        folder: Where.
        config: Its config, or the text of the file, or None for no file.
        tensors: Its weights; by default those of `LLAMA`.
        texts: More files: their texts by their names, in which `_json` is `.json`.
    """
    folder.mkdir(parents=True)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text, encoding="utf-8")
    safetensors.numpy.save_file(dict(weights() if tensors is None else tensors), folder / "model.safetensors")
    for name, text in texts.items():
        (folder / name.replace("_json", ".json")).write_text(text, encoding="utf-8")
    return folder
