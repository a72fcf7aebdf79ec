"""A stale index was refused ("finish the download"), and so was `consolidated.safetensors` beside the shards of a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from partita.checkpoint.index import INDEX_NAME, open_checkpoint
from partita.errors import CheckpointError


def shards(folder: Path, count: int) -> None:
    for i in range(1, count + 1):
        save_file({f"layer.{i}": np.ones(2, np.float32)}, folder / f"model-{i:05}-of-{count:05}.safetensors")


def index(folder: Path, *names: str) -> None:
    text = json.dumps({"weight_map": {f"layer.{i}": name for i, name in enumerate(names, 1)}})
    (folder / INDEX_NAME).write_text(text)


def test_an_index_of_which_no_file_is_there_does_not_count(tmp_path: Path) -> None:
    shards(tmp_path, 3)
    index(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert sorted(open_checkpoint(tmp_path).tensors) == ["layer.1", "layer.2", "layer.3"]


def test_a_download_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, 2)
    index(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 are missing: .* finish the download"):
        open_checkpoint(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 are missing: .* finish the download"):
        open_checkpoint(tmp_path)


def test_consolidated_weights_beside_shards_are_left_out(tmp_path: Path) -> None:
    shards(tmp_path, 2)
    everything = {f"layer.{i}": np.zeros(2, np.float32) for i in (1, 2)}
    save_file(everything, tmp_path / "consolidated.safetensors")
    found = open_checkpoint(tmp_path)
    assert {info.file.name for info in found.tensors.values()} == {
        f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    }


def test_weights_under_another_name_are_still_found(tmp_path: Path) -> None:
    save_file({"layer.1": np.zeros(2, np.float32)}, tmp_path / "weights.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["layer.1"]
