"""What mlx-lm quantizes and saves computes the same on torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from partita.torch.load import load
from partita.torch.quantized.tensor import QuantizedTensor
from tests.support.quantized_forms import LLAMA, MIXTRAL, QWEN3_MOE, plain_model

WIDE = {"hidden_size": 192}  # a multiple of 64, the groups that mlx-lm gives routers

CASES: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {
    "llama": ({**LLAMA, **WIDE}, {"group_size": 32, "bits": 4}),
    "llama-tied": ({**LLAMA, **WIDE, "tie_word_embeddings": True}, {"group_size": 64, "bits": 6}),
    "llama-mxfp8": ({**LLAMA, **WIDE}, {"group_size": 32, "bits": 8, "mode": "mxfp8"}),
    "qwen3-moe": ({**QWEN3_MOE, **WIDE}, {"group_size": 32, "bits": 4}),
    "mixtral": ({**MIXTRAL, **WIDE, "head_dim": 32}, {"group_size": 32, "bits": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_torch_reads_what_mlx_lm_writes(name: str, tmp_path: Path) -> None:
    config, how = CASES[name]
    plain_model(config).save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "config.json"
    data = json.loads(file.read_text())
    # mlx-lm has no defaults for these.
    data |= {"rope_theta": data["rope_parameters"]["rope_theta"], "mlp_only_layers": [], "decoder_sparse_step": 1}
    file.write_text(json.dumps({"num_experts": 4, **data}))
    quantized, written = quantize_model(*load_model(tmp_path / "plain"), **how)
    folder = tmp_path / "quantized"
    folder.mkdir()
    save_model(folder, quantized)
    save_config(written, folder / "config.json")
    ids = np.arange(1, 8)[None]
    expected = np.array(quantized(mx.array(ids)).astype(mx.float32))
    model = load(folder)
    with torch.no_grad():
        found = model(input_ids=torch.tensor(ids)).logits.numpy()
    assert sum(isinstance(p, QuantizedTensor) for p in model.parameters()) > 8
    # float32 on both engines.
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
