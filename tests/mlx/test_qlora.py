"""LoRA on folders that `mlx_lm.convert -q` wrote: any mesh has the loss and the adapters' gradients of mlx-lm's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load_model

from partita.generation.tokenizer import byte_tokenizer
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.parts import parameter_homes, plan_of
from partita.mlx.model.tree import set_module
from partita.mlx.stages.pipeline import Pipeline
from partita.mlx.train import gradients_of, train
from partita.mlx.weights.adapter_places import adapter_places
from partita.mlx.weights.adapters import add_lora
from partita.mlx.weights.peft_format import load_adapters, save_adapters
from partita.training import TrainSettings
from partita.training.saving import Saves
from partita.training.settings import schedule_of
from tests.mlx.compare import assert_equal
from tests.mlx.test_save import digest
from tests.support.mlx_ranks import on_mlx

transformers = pytest.importorskip("transformers")

Mesh = tuple[int, int, int]
ALONE: Mesh = (1, 1, 1)
VOCABULARY, LENGTH, RANK, SCALE = 320, 12, 4, 2.0
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": CONFIG,
    "qwen3_moe": {**CONFIG, "head_dim": 32, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
"""Relative error of a loss or gradient: rounding in other orders, which in bfloat16 (units of 4e-3) passes four layers."""

ROWS = [[(7 * i * i + 3 * i + 11 * row) % VOCABULARY for i in range(LENGTH + 1)] for row in range(8)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models as transformers writes them, with a tokenizer, by family."""
    import torch

    folders = {}
    for family, data in FAMILIES.items():
        torch.manual_seed(0)
        folders[family] = tmp_path_factory.mktemp("source") / family
        config = transformers.AutoConfig.for_model(family, **data)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
        byte_tokenizer().save(folders[family])
        # mlx-lm reads the keys that transformers wrote before version 5.
        file = folders[family] / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **data, "rope_theta": 10000.0}))
    return folders


def converted(source: Path, folder: Path, mode: str, group_size: int, bits: int, dtype: str) -> Path:
    from mlx_lm.convert import convert

    convert(
        str(source), folder, quantize=True, q_group_size=group_size, q_bits=bits, q_mode=mode, dtype=dtype,
    )  # fmt: skip
    return folder


def put_on(folder: str, mesh: Mesh) -> Any:
    dp, pp, tp = mesh
    return load(folder, dp=dp, pp=pp, tp=tp, groups=single_groups() if mesh == ALONE else None)


def begin(folder: Path, place: Path) -> None:
    """Write adapters that change the output: as they begin, `lora_b` is zero."""
    model = put_on(str(folder), ALONE)
    add_lora(model, RANK, alpha=RANK * SCALE, seed=3)
    for name, (home, key) in adapter_places(model).homes.items():
        if key == "lora_b":
            array = home[key]
            home[key] = (mx.random.normal(array.shape, key=mx.random.key(len(name))) * 0.05).astype(array.dtype)
    save_adapters(model, place)


def of_mlx_lm(folder: Path, adapters: Path) -> tuple[float, dict[str, mx.array]]:
    """Loss and gradients of mlx-lm's unsplit model with the same adapters, by their names on disk."""
    model, _ = load_model(folder, strict=True)
    arrays = mx.load(str(adapters / "adapter_model.safetensors"))
    model.freeze()
    modules = dict(model.named_modules())
    assert isinstance(arrays, dict)
    for path in {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in arrays}:
        adapter = LoRALinear.from_base(modules[path], r=RANK, scale=SCALE)
        adapter.lora_a = arrays[f"base_model.model.{path}.lora_A.weight"].T
        adapter.lora_b = arrays[f"base_model.model.{path}.lora_B.weight"].T
        set_module(model, path, adapter)
    rows = mx.array(ROWS)

    def loss(parameters: dict[str, Any]) -> mx.array:
        model.update(parameters)
        logits = model(rows[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, rows[:, 1:], reduction="mean")

    value, found = mx.value_and_grad(loss)(model.trainable_parameters())
    return value.item(), dict(tree_flatten(found))


def gradients(folder: str, adapters: str, mesh: Mesh) -> tuple[float, dict[str, tuple[Any, Any]]]:
    """The loss, and of this rank's adapters the gradients and the ranges that it holds."""
    model = put_on(folder, mesh)
    load_adapters(model, adapters)
    plan, _ = plan_of(model)
    settings = TrainSettings(batch_size=8, sequence_length=LENGTH, microbatches=2)
    loss, found = gradients_of(Pipeline(model, schedule_of(plan, settings)), np.array(ROWS), settings)
    held = adapter_places(model).held
    assert found.keys() == held.keys(), "only adapters are trained"
    return loss, {name: (np.array(x.astype(mx.float32)), held[name]) for name, x in found.items()}


FORMS = {
    "4-bits-groups-of-64": ("llama", "affine", 64, 4, "float32"),
    "4-bits-groups-of-32": ("llama", "affine", 32, 4, "bfloat16"),
    "8-bits-groups-of-32": ("llama", "affine", 32, 8, "float32"),
    "8-bits-groups-of-64": ("llama", "affine", 64, 8, "bfloat16"),
    "mxfp4": ("llama", "mxfp4", 32, 4, "float32"),
    "mxfp8": ("llama", "mxfp8", 32, 8, "float32"),
    "nvfp4": ("llama", "nvfp4", 16, 4, "float32"),
    "experts": ("qwen3_moe", "affine", 32, 4, "float32"),
    "experts-mxfp4": ("qwen3_moe", "mxfp4", 32, 4, "float32"),
}


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_those_of_mlx_lm(form: str, sources: dict[str, Path], tmp_path: Path) -> None:
    family, *how, dtype = FORMS[form]
    folder = converted(sources[family], tmp_path / "model", *how, dtype)  # type: ignore[arg-type]
    begin(folder, tmp_path / "adapters")
    expected_loss, expected = of_mlx_lm(folder, tmp_path / "adapters")
    for mesh in (ALONE, (1, 1, 2), (1, 2, 1), (2, 1, 1)):
        trained = set()
        for loss, found in on_mlx(int(np.prod(mesh)), gradients, str(folder), str(tmp_path / "adapters"), mesh):
            assert loss == pytest.approx(expected_loss, rel=TOLERANCE[dtype]), mesh
            for name, (gradient, held) in found.items():
                whole = np.array(expected[name].astype(mx.float32))
                rows, columns = ([i for a, b in ranges for i in range(a, b)] for ranges in held)
                assert_equal(
                    mx.array(gradient), mx.array(whole[np.ix_(rows, columns)]), TOLERANCE[dtype], f"{mesh} {name}"
                )
                trained.add(name)
        assert trained == expected.keys()


def trained(folder: str, mesh: Mesh, out: str, resume: str | None) -> list[float]:
    """The losses of four steps, or of the last two."""
    model = put_on(folder, mesh)
    paths = add_lora(model, RANK, seed=5) if resume is None else load_adapters(model, resume)
    assert paths
    packed = {name: np.array(home[key]) for name, (home, key) in parameter_homes(model).items() if key == "weight"}
    settings = TrainSettings(steps=4, batch_size=8, sequence_length=LENGTH, learning_rate=1e-2, warmup_steps=1)
    text = [token for row in ROWS for token in row] * 3
    reports = train(model, text, settings, saves=Saves(Path(out), every=2, base=folder), resume=resume)
    after = parameter_homes(model)
    for name, array in packed.items():
        home, key = after[name]
        assert np.array_equal(array, np.array(home[key])), f"{name} is frozen"
    return [report.loss for report in reports]


@pytest.mark.parametrize("mesh", [(1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_a_run_and_its_resumption(mesh: Mesh, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = str(converted(sources["llama"], tmp_path / "model", "affine", 32, 4, "float32"))
    alone = trained(folder, ALONE, str(tmp_path / "alone"), None)
    assert alone[-1] < alone[0]
    for losses in on_mlx(2, trained, folder, mesh, str(tmp_path / "whole"), None):
        assert losses == pytest.approx(alone, rel=1e-5)
    again = on_mlx(2, trained, folder, mesh, str(tmp_path / "again"), str(tmp_path / "whole" / "step-000002"))
    for losses in again:
        assert losses == pytest.approx(alone[2:], rel=1e-5)
    assert digest(tmp_path / "again" / "step-000004") == digest(tmp_path / "whole" / "step-000004"), "bit for bit"
