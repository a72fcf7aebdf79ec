"""Of `model.safetensors` beside an index of other files the index was read, where transformers reads the single file; and
beside an index of which some files are missing a good single file was refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from partita.checkpoint.index import INDEX_NAME, WEIGHTS_NAME, open_checkpoint
from partita.torch import load, save
from tests.support.loaded import differences, random_model
from tests.support.ranks import on

CONFIG: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip


def both(folder: Path) -> list[str]:
    """A model in one file, and another model in several files with their index: the files' names."""
    model = random_model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**CONFIG))
    model.save_pretrained(folder / "shards", max_shard_size="8KB")  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(folder)  # type: ignore[operator]
    for file in (*(folder / "shards").glob("model-*.safetensors"), folder / "shards" / INDEX_NAME):
        shutil.move(file, folder / file.name)
    shutil.rmtree(folder / "shards")
    return sorted(file.name for file in folder.glob("model-*.safetensors"))


def loaded(folder: str, engine: str) -> list[float]:
    if engine == "mlx":
        from partita.mlx.load import load as mlx_load

        return mlx_load(folder).model.norm.weight.tolist()  # type: ignore[no-any-return]
    return load(folder).model.norm.weight.tolist()  # type: ignore[union-attr,operator,no-any-return]


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_the_single_file_is_read_and_it_is_said(tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture) -> None:
    if engine == "mlx":
        pytest.importorskip("mlx.core")
    names = both(tmp_path)
    assert len(names) > 1
    single = load_file(tmp_path / WEIGHTS_NAME)["model.norm.weight"]
    with caplog.at_level(logging.WARNING, "partita"):
        assert loaded(str(tmp_path), engine) == single.tolist()
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"{tmp_path}: model.safetensors is read, as transformers does, and the files of"
    )
    assert names[0] in record.getMessage()


def test_as_transformers_reads_it_over_two_ranks(tmp_path: Path) -> None:
    both(tmp_path)
    assert on(2, differences, tmp_path, 2, 1) == [[], []]


def test_an_index_of_missing_files_does_not_matter(tmp_path: Path) -> None:
    names = both(tmp_path)
    (tmp_path / names[0]).unlink()
    assert open_checkpoint(tmp_path).passed_over == tuple(names[1:])
    for name in names[1:]:
        (tmp_path / name).unlink()
    assert open_checkpoint(tmp_path).note() == ""
    (tmp_path / INDEX_NAME).write_text("{")
    assert {info.file.name for info in open_checkpoint(tmp_path).tensors.values()} == {WEIGHTS_NAME}


def test_an_index_of_the_single_file_is_no_reason_to_speak(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / WEIGHTS_NAME)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": WEIGHTS_NAME}}))
    assert open_checkpoint(tmp_path).note() == ""


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_layers_beyond_the_config_are_named_and_saved(
    tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    random_model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**CONFIG)).save_pretrained(source)  # type: ignore[operator]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with caplog.at_level(logging.WARNING, "partita"):
        if engine == "mlx":
            pytest.importorskip("mlx.core")
            from partita.mlx.load import load as mlx_load
            from partita.mlx.weights.save import save as mlx_save

            mlx_save(mlx_load(source), tmp_path / "saved")
        else:
            save(load(source), tmp_path / "saved")
    (record,) = caplog.records
    assert "does not use 9 tensors (model.layers.1." in record.getMessage()
    before, after = load_file(source / WEIGHTS_NAME), load_file(tmp_path / "saved" / WEIGHTS_NAME)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
