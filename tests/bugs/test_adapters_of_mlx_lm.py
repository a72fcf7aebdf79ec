"""Adapters that `mlx_lm.lora` wrote were refused ("peft_type must be LORA, but is None"): both engines read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from partita.errors import CheckpointError
from partita.training.adapter_files import read_adapters
from tests.support.mlx_ranks import mlx_ranks
from tests.support.ranks import ranks

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "architectures": ["LlamaForCausalLM"],
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
IDS = [[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]]


def written(place: Path, kind: str = "lora") -> list[float]:
    """A model, adapters of it as `mlx_lm.lora` saves them, and the adapted model's logits as mlx-lm computes them."""
    import json
    import types

    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model

    from partita.mlx.collectives.groups import single_groups
    from partita.mlx.new import fresh
    from partita.mlx.weights.save import save

    save(fresh(CONFIG, seed=1, groups=single_groups()), place / "model")
    model, _ = load_model(place / "model")
    model.freeze()
    parameters = {"rank": 4, "dropout": 0.0, "scale": 5.0}
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    mx.random.seed(0)
    trained = {
        name: 0.2 * mx.random.normal(array.shape) if name.endswith("lora_b") else array
        for name, array in tree_flatten(model.trainable_parameters())
    }
    (place / "adapters").mkdir()
    mx.save_safetensors(str(place / "adapters" / "adapters.safetensors"), trained)
    config = types.SimpleNamespace(fine_tune_type=kind, num_layers=2, lora_parameters=parameters, model="model")
    (place / "adapters" / "adapter_config.json").write_text(json.dumps(vars(config)))
    model, _ = load_model(place / "model")
    return load_adapters(model, str(place / "adapters"))(mx.array(IDS)).flatten().tolist()  # type: ignore[no-any-return]


def on_mlx(place: str, tp: int, pp: int) -> list[float]:
    import mlx.core as mx

    from partita.mlx.load import load
    from partita.mlx.model.parts import main_output
    from partita.mlx.weights.peft_format import load_adapters

    model = load(f"{place}/model", tp=tp, pp=pp)
    load_adapters(model, f"{place}/adapters")
    return main_output(model(mx.array(IDS))).flatten().tolist()  # type: ignore[return-value]


def on_torch(place: str, tp: int, pp: int) -> list[float]:
    import torch

    from partita.torch.load import load
    from partita.torch.weights.peft_format import load_adapters

    model = load(f"{place}/model", tp=tp, pp=pp)
    load_adapters(model, f"{place}/adapters")
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.flatten().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_both_engines_read_them(tp: int, pp: int, tmp_path: Path) -> None:
    want = written(tmp_path)
    scale = max(map(abs, want))
    for pool, function in ((mlx_ranks(2), on_mlx), (ranks(2), on_torch)):
        for got in pool.run(function, str(tmp_path), tp, pp):
            assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 1e-4 * scale


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    written(tmp_path, "dora")
    with pytest.raises(CheckpointError, match="fine_tune_type = 'lora', but it is 'dora'"):
        read_adapters(tmp_path / "adapters")
