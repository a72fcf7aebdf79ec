"""`train --engine mlx` on folders that MLX quantized: adapters only, which `generate` loads beside the quantized model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

CONFIG = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of 4 bits and a text."""
    mx = pytest.importorskip("mlx.core")
    from partita.generation import byte_tokenizer
    from partita.mlx.collectives.groups import single_groups
    from partita.mlx.load import shard
    from partita.mlx.model.mlx_lm_models import build, quantize
    from partita.mlx.proof.family import fill
    from partita.mlx.weights.save import save

    folder = tmp_path_factory.mktemp("quantized")
    (folder / "text.txt").write_text("import sys\nimport os\n" * 60)
    mx.random.seed(0)
    model = fill(build(CONFIG), mx.float32)
    quantize(model, {"quantization": {"group_size": 32, "bits": 4}})
    save(shard(model, groups=single_groups()), folder / "model", tokenizer=byte_tokenizer())
    return folder


def begin(folder: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(folder / "model"), "--data", str(folder / "text.txt"), "--engine", "mlx", "--batch-size", "4",
        "--sequence-length", "16", "--steps", "2", *more,
    ]  # fmt: skip


def test_without_adapters_it_is_refused(partita: Run, quantized: Path) -> None:
    said = partita(*begin(quantized))
    assert said.code == 2
    assert "error: the model's weights are quantized, so they cannot be trained" in said.err
    assert "Train LoRA adapters (--lora-rank)" in said.err


def test_adapters_are_trained_and_used(partita: Run, quantized: Path, tmp_path: Path) -> None:
    options = ["--lora-rank", "3", "--lora-dropout", "0.1", "--lora-dora", "--checkpointing", "full", "--json"]
    said = partita(*begin(quantized, *options, "--out", str(tmp_path / "out")))
    assert said.code == 0, said.err
    assert len(json.loads(said.out)["steps"]) == 2
    config = json.loads((tmp_path / "out" / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_dropout"], config["use_dora"]) == (3, 0.1, True)
    assert config["base_model_name_or_path"] == str(quantized / "model")
    how = [
        "--engine",
        "mlx",
        "--adapters",
        str(tmp_path / "out" / "adapters"),
        "--max-new-tokens",
        "3",
        "--temperature",
        "0",
    ]
    assert partita("generate", str(quantized / "model"), "import", *how).code == 0
