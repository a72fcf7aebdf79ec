"""Tensors that a model class does not use (a prediction layer) were dropped, while the saved config announced them."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from partita.torch import load, save
from partita.torch.train import TrainSettings, train
from partita.training.saving import Saves
from tests.support.loaded import random_model
from tests.support.ranks import on

CONFIG: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 1,
}  # fmt: skip
SETTINGS = TrainSettings(steps=2, batch_size=4, sequence_length=8, warmup_steps=1)
MESHES = pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])


def predicting(folder: Path, cls: Any = transformers.LlamaForCausalLM, **config: Any) -> dict[str, torch.Tensor]:
    """A model on disk with one prediction layer, which no class of transformers has: its tensors."""
    random_model(cls, cls.config_class(**{**CONFIG, **config})).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    more = {name.replace("layers.1.", "layers.2."): tensor + 1 for name, tensor in last.items()}
    more["model.layers.2.eh_proj.weight"] = torch.randn(24, 48, dtype=torch.bfloat16)
    more["model.layers.2.step"] = torch.tensor(3)
    save_file({**tensors, **more}, folder / "model.safetensors", {"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    return more


def same(found: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether a folder of one file or several holds just the `expected` tensors, bit for bit."""
    tensors: dict[str, torch.Tensor] = {}
    for file in found.glob("model*.safetensors"):
        tensors.update(load_file(file))
    return tensors.keys() == expected.keys() and all(
        t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in tensors.items()
    )


def again(folder: Path, target: Path, tp: int, pp: int) -> None:
    save(load(folder, tp=tp, pp=pp), target, max_shard_bytes=9000)


DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}  # fmt: skip


@MESHES
def test_they_are_saved_as_they_are(tmp_path: Path, tp: int, pp: int) -> None:
    more = predicting(tmp_path / "a", transformers.DeepseekV3ForCausalLM, **DEEPSEEK)
    assert any("experts.3.gate_proj" in name for name in more)
    on(tp * pp, again, tmp_path / "a", tmp_path / "b", tp, pp)
    assert same(tmp_path / "b", load_file(tmp_path / "a" / "model.safetensors"))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_one_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = predicting(tmp_path)
    with caplog.at_level(logging.WARNING, "partita"):
        load(tmp_path)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}: LlamaForCausalLM does not use {len(more)} tensors (model.l")
    assert record.getMessage().endswith("not trained, and saved unchanged.")


def test_a_source_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = predicting(tmp_path / "a")
    whole = load_file(tmp_path / "a" / "model.safetensors")
    model = load(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "partita"):
        save(model, tmp_path / "b")
    assert [r.getMessage().endswith("the saved config does not announce them.") for r in caplog.records] == [True]
    assert same(tmp_path / "b", {name: tensor for name, tensor in whole.items() if name not in more})
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert model.config.num_nextn_predict_layers == 1  # type: ignore[union-attr]


def trained(folder: Path, run: Path, layout: dict[str, int], resume: Path | None) -> None:
    """Two steps from `folder`, or two more from a checkpoint, of which only the newest is kept."""
    model = load(resume or folder, **layout)
    saves = Saves(run, every=1, keep=1)
    text = torch.arange(600) ** 2 % 53
    train(model, text, replace(SETTINGS, steps=4 if resume else 2), saves=saves, resume=resume)


@pytest.mark.parametrize("layout", [{}, {"dp": 2}, {"tp": 2}])
def test_checkpoints_of_a_run_hold_them(tmp_path: Path, layout: dict[str, int]) -> None:
    """A run that resumed reads them from a checkpoint that it removes itself."""
    more = predicting(tmp_path / "a")
    size = 2 if layout else 1
    on(size, trained, tmp_path / "a", tmp_path / "run", layout, None)
    shutil.rmtree(tmp_path / "a")
    on(size, trained, tmp_path / "a", tmp_path / "run", layout, tmp_path / "run" / "step-000002")
    assert [step.name for step in sorted((tmp_path / "run").glob("step-*"))] == ["step-000004"]
    found = load_file(tmp_path / "run" / "step-000004" / "model.safetensors")
    assert len(found) > len(more)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in more.items())


def again_on_mlx(folder: str, target: str, tp: int, pp: int) -> None:
    from partita.mlx.load import load as mlx_load
    from partita.mlx.weights.save import save as mlx_save

    mlx_save(mlx_load(folder, tp=tp, pp=pp), target, max_shard_bytes=9000)


@MESHES
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_on_mlx(tmp_path: Path, family: str, tp: int, pp: int) -> None:
    pytest.importorskip("mlx.core")
    from tests.support.mlx_ranks import mlx_ranks

    is_llama = family == "llama"
    cls = transformers.LlamaForCausalLM if is_llama else transformers.DeepseekV3ForCausalLM
    predicting(tmp_path / "a", cls, **({} if is_llama else DEEPSEEK))
    arguments = (str(tmp_path / "a"), str(tmp_path / "b"), tp, pp)
    _ = mlx_ranks(tp * pp).run(again_on_mlx, *arguments) if tp * pp > 1 else again_on_mlx(*arguments)
    assert same(tmp_path / "b", load_file(tmp_path / "a" / "model.safetensors"))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_a_run_on_mlx(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    from partita.mlx.load import load as mlx_load
    from partita.mlx.train import train as mlx_train

    more = predicting(tmp_path / "a")
    text = np.arange(600) ** 2 % 53
    mlx_train(mlx_load(tmp_path / "a"), text, SETTINGS, saves=Saves(tmp_path / "run", every=1, keep=1))
    found = load_file(tmp_path / "run" / "step-000002" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in more.items())
