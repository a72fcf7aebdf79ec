"""Adapters on disk, in what either engine shares: names, targets, and the config of peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import CheckpointError, ModelError
from partita.training.adapter_files import Adapters, name_on_disk, only, path_of, read_adapters, targets_of

PATHS = st.lists(st.text(alphabet="abz_019", min_size=1) | st.sampled_from(["lora_A", "weight", "model"]), min_size=1)


@given(PATHS, st.sampled_from(["A", "B"]))
def test_a_name_leads_back_to_its_module(parts: list[str], side: Any) -> None:
    path = ".".join(parts)
    assert path_of(name_on_disk(path, side)) == path


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.q.lora_A.weight",
        "base_model.model.q.lora_A.default.weight",
        "base_model.model.q.lora_embedding_A",
        "base_model.model.q.lora_magnitude_vector",
    ],
)
def test_what_is_no_plain_adapter(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not belong to a plain LoRA adapter"):
        path_of(name)


@pytest.mark.parametrize(
    ("adapted", "others", "targets"),
    [
        (["l.0.q", "l.1.q"], ["head"], ["q"]),
        (["l.0.q", "l.1.up"], ["head", "l.0.norm"], ["q", "up"]),
        (["l.0.q"], ["l.1.q"], ["l.0.q"]),
        (["l.0.q", "l.0.up"], ["l.1.up"], ["l.0.q", "l.0.up"]),
    ],
)
def test_targets(adapted: list[str], others: list[str], targets: list[str]) -> None:
    assert targets_of(adapted, others) == targets


@given(st.integers(1, 512), st.floats(0.01, 1e6))
def test_a_config_reads_back(tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: float) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = Adapters(rank, alpha).to_json(base="here", targets=["q"], transposed=False)
    (folder / "adapter_config.json").write_text(text)
    assert read_adapters(folder) == Adapters(rank, alpha)


def test_a_folder_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json: cannot be read: .* Give a folder that holds adapters"
    ):
        read_adapters(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": True, "lora_alpha": 1}))
    with pytest.raises(CheckpointError, match="must have a whole r and a number lora_alpha, but has True and 1"):
        read_adapters(tmp_path)


def test_one_kind_alone() -> None:
    assert only({Adapters(2, 4.0)}) == Adapters(2, 4.0)
    with pytest.raises(ModelError, match=r"has no LoRA adapters to save\. Add some with add_lora"):
        only(set())
    with pytest.raises(ModelError, match=r"must have one rank and alpha, but there are \[\(2, 4\.0\), \(3, 4\.0\)\]"):
        only({Adapters(3, 4.0), Adapters(2, 4.0)})
