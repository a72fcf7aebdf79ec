"""`--dtype float16` on a 4-bit bfloat16 model gave float32 logits, since the scales of quantized weights stayed bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.mlx_lm_models import build
from partita.mlx.model.parts import main_output
from partita.mlx.proof.family import fill
from partita.mlx.proof.reference import unchecked

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "max_position_embeddings": 64, "dtype": "bfloat16", "quantization": {"group_size": 32, "bits": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    place = tmp_path_factory.mktemp("quantized")
    mx.random.seed(0)
    plain = {key: value for key, value in CONFIG.items() if key != "quantization"}
    model = fill(build(plain), mx.bfloat16)
    nn.quantize(model, 32, 4)
    mx.save_safetensors(str(place / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (place / "config.json").write_text(json.dumps(CONFIG))
    return place


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_logits_have_the_dtype_that_is_asked_for(folder: Path, dtype: str) -> None:
    ids = mx.array([[3, 1, 4, 1, 5]])
    with unchecked():
        exact = main_output(load(folder, dtype="float32", groups=single_groups())(ids))
        logits = main_output(load(folder, dtype=dtype, groups=single_groups())(ids))
    assert str(logits.dtype) == f"mlx.core.{dtype}"
    assert float(mx.abs(logits.astype(mx.float32) - exact).max()) <= 0.03 * float(mx.abs(exact).max())
