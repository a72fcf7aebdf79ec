"""Saving: the checkpoint of an unsplit model, byte for byte the same whatever the layout, and read by everybody."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, save_model

from partita.checkpoint.index import open_checkpoint
from partita.errors import CheckpointError, DistributedError, ModelError
from partita.generation import byte_tokenizer
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load, shard
from partita.mlx.model.mlx_lm_models import build, quantize
from partita.mlx.model.parts import parameter_homes
from partita.mlx.proof.family import fill
from partita.mlx.train import train
from partita.mlx.weights.save import save
from partita.training import TrainSettings
from tests.mlx.test_load import HF, written  # noqa: F401
from tests.mlx.test_stage import whole
from tests.mlx.test_train import TEXT
from tests.support.mlx_models import tiny_config
from tests.support.mlx_ranks import mlx_ranks

LAYOUTS = [(2, (1, 1, 2)), (2, (1, 2, 1)), (4, (1, 2, 2)), (4, (2, 1, 2)), (2, (2, 1, 1))]


def digest(folder: Path) -> dict[str, str]:
    """A digest of each file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def tensors(folder: Path) -> dict[str, Any]:
    """What is on disk, read by MLX."""
    return {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}


def load_and_save(source: str, folder: str, mesh: tuple[int, int, int], largest: int, dtype: str | None) -> None:
    dp, pp, tp = mesh
    told: list[tuple[int, int]] = []
    groups = single_groups() if mesh == (1, 1, 1) else None
    model = load(source, dp=dp, pp=pp, tp=tp, dtype=dtype, groups=groups)
    save(model, folder, max_shard_bytes=largest, progress=lambda done, total: told.append((done, total)))
    assert all(done <= total for done, total in told)


@pytest.mark.parametrize("family", sorted(HF))
def test_what_transformers_wrote_is_written_again(family: str, written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    source = written[family]
    load_and_save(str(source), str(tmp_path / "alone"), (1, 1, 1), 1 << 40, None)
    expected, found = tensors(source), tensors(tmp_path / "alone")
    assert set(found) <= set(expected)
    assert all("rotary" in name or name.startswith("lm_head") for name in set(expected) - set(found))
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        assert mx.array_equal(array, expected[name]).item(), name
    mlx_ranks(4).run(load_and_save, str(source), str(tmp_path / "split"), (1, 2, 2), 1 << 40, None)
    assert digest(tmp_path / "split") == digest(tmp_path / "alone")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "deepseek_v3", "gpt_neox"])
def test_transformers_and_the_torch_engine_read_it(family: str, written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    load_and_save(str(written[family]), str(tmp_path / "made"), (1, 1, 1), 1 << 40, None)
    ids = torch.tensor([[1, 2, 3, 4]])
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(p, dtype="float32")
        for p in (written[family], tmp_path / "made")
    ]
    with torch.no_grad():
        logits = [model.eval()(ids).logits for model in models]
    assert torch.equal(*logits)


@pytest.mark.parametrize(("size", "mesh"), LAYOUTS)
def test_bytes_do_not_depend_on_the_layout(
    size: int,
    mesh: tuple[int, int, int],
    written: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    source = str(written["llama"])
    load_and_save(source, str(tmp_path / "alone"), (1, 1, 1), 20_000, "bfloat16")
    mlx_ranks(size).run(load_and_save, source, str(tmp_path / "split"), mesh, 20_000, "bfloat16")
    assert digest(tmp_path / "split") == digest(tmp_path / "alone")
    assert len(list((tmp_path / "alone").glob("*.safetensors"))) > 2
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model(bits: int, tmp_path: Path) -> None:
    config = {**tiny_config("llama"), "hidden_size": 128, "intermediate_size": 128, "tie_word_embeddings": True}
    model = fill(build(config), mx.float16)
    config["quantization"] = {"group_size": 32, "bits": bits}
    quantize(model, config)
    save_model(tmp_path / "source", model)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    load_and_save(str(tmp_path / "source"), str(tmp_path / "alone"), (1, 1, 1), 1 << 40, None)
    mlx_ranks(4).run(load_and_save, str(tmp_path / "source"), str(tmp_path / "split"), (1, 2, 2), 1 << 40, None)
    assert digest(tmp_path / "split") == digest(tmp_path / "alone")
    read, _ = load_model(tmp_path / "split")
    ids = mx.array([[1, 2, 3]])
    assert mx.array_equal(read(ids), model(ids)).item()


def shard_and_save(folder: str, pp: int, tp: int) -> None:
    model = shard(whole("qwen3_moe"), pp=pp, tp=tp, **({"groups": single_groups()} if pp * tp == 1 else {}))
    save(model, folder, tokenizer=byte_tokenizer())


def test_a_model_that_was_never_on_disk(tmp_path: Path) -> None:
    shard_and_save(str(tmp_path / "alone"), 1, 1)
    mlx_ranks(4).run(shard_and_save, str(tmp_path / "split"), 2, 2)
    assert digest(tmp_path / "split") == digest(tmp_path / "alone")
    read, config = load_model(tmp_path / "split")
    assert config["model_type"] == "qwen3_moe"
    ids = mx.array([[1, 2, 3]])
    assert mx.array_equal(read(ids), whole("qwen3_moe")(ids)).item()
    assert (tmp_path / "split" / "tokenizer.json").is_file()


def train_and_save(source: str, folder: str, pp: int, tp: int) -> None:
    model = load(source, pp=pp, tp=tp, **({"groups": single_groups()} if pp * tp == 1 else {}))
    train(model, TEXT, TrainSettings(steps=2, batch_size=4, sequence_length=12, microbatches=2))
    save(model, folder)


def test_trained_weights_are_read_back_by_another_layout(written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    mlx_ranks(4).run(train_and_save, str(written["llama"]), str(tmp_path / "split"), 2, 2)
    train_and_save(str(written["llama"]), str(tmp_path / "alone"), 1, 1)
    expected, found = tensors(tmp_path / "alone"), tensors(tmp_path / "split")
    assert list(expected) == list(found)
    before = tensors(written["llama"])
    for name, array in expected.items():
        assert np.abs(np.array(array) - np.array(found[name])).max() < 1e-4
        assert not mx.array_equal(array, before[name]).item()
    loaded = load(tmp_path / "split", groups=single_groups())
    assert len(open_checkpoint(tmp_path / "split").tensors) == len(parameter_homes(loaded))


def test_a_folder_with_weights_is_not_written_over(written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    model = load(written["llama"], groups=single_groups())
    save(model, tmp_path)
    with pytest.raises(CheckpointError, match="must hold no weights before a save"):
        save(model, tmp_path)


def refuse_full_folder(folder: str) -> None:
    with pytest.raises((CheckpointError, DistributedError), match="must hold no weights before a save"):
        save(shard(whole("llama"), pp=2), folder)


def test_what_the_first_rank_refuses_all_refuse(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    mlx_ranks(2).run(refuse_full_folder, str(tmp_path))


def test_adapters_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    model: nn.Module = shard(whole("llama"), groups=single_groups()).freeze()
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    with pytest.raises(ModelError, match=r"which the unsplit model did not have\. Merge adapters"):
        save(model, tmp_path)
