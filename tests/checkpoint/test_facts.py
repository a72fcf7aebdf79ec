from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from partita.checkpoint.facts import spec_from_checkpoint


def _write(folder: Path) -> None:
    shapes = {"embed.weight": (11, 4), **{f"layers.{i}.up.weight": (6, 4) for i in range(3)}}
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")


def test_from_headers_alone(tmp_path: Path) -> None:
    _write(tmp_path)
    spec = spec_from_checkpoint(tmp_path)
    assert spec.parameters == 11 * 4 + 3 * 6 * 4
    assert (spec.layers, spec.num_layers, spec.dtype, spec.num_heads) == ("layers", 3, "float16", 0)


def test_heads_from_the_config_beside_them(tmp_path: Path) -> None:
    _write(tmp_path)
    config = {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 11}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = spec_from_checkpoint(tmp_path)
    assert (spec.family, spec.num_heads, spec.num_kv_heads, spec.vocab_size) == ("llama", 6, 2, 11)
