"""Adapters on disk: peft puts them on transformers' own model, and both say the same as the split one."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from partita.errors import ModelError
from partita.torch.collectives.groups import single_groups
from partita.torch.model.parts import parameter_homes
from partita.torch.new import fresh
from partita.torch.train import TrainSettings, train
from partita.torch.weights.adapters import adapters, add_lora
from partita.torch.weights.peft_format import save_adapters
from partita.torch.weights.save import save
from tests.support.models import CONFIGS
from tests.support.ranks import on, ranks

IDS = torch.arange(6).view(1, 6)
SETTINGS = TrainSettings(steps=3, batch_size=4, sequence_length=8, learning_rate=1e-2, warmup_steps=0)
FAMILIES = ["llama-biases-tied", "llama-7-heads-1-kv", "phi3", "qwen3-moe"]


def adapted(name: str, layout: dict[str, int], base: str, folder: str) -> list[float]:
    """Train adapters, save them, and what the model then says."""
    where: dict[str, Any] = layout or {"groups": single_groups()}
    quiet = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    model = fresh({**CONFIGS[name], **quiet}, seed=3, dtype="float64", **where)
    save(model, base)
    torch.manual_seed(5)
    add_lora(model, 4, alpha=6)
    train(model, torch.arange(500) ** 2 % 23, SETTINGS)
    save_adapters(model, folder)
    with torch.no_grad():
        logits: list[float] = model(input_ids=IDS).logits.flatten().tolist()
    return logits


def by_peft(base: Path, folder: Path) -> nn.Module:
    """transformers' model with the adapters on it, all of which must have found their place."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float64", experts_implementation="eager")
    with warnings.catch_warnings():
        # peft asks transformers for what is no longer called so. Of keys that it misses it warns otherwise.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, layout) for name in FAMILIES for layout in ({}, {"tp": 3})),
        *(("llama-biases-tied", layout) for layout in ({"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2})),
        ("gpt2", {"tp": 3}),
    ],
)
def test_peft_reads_it(name: str, layout: dict[str, int], tmp_path: Path) -> None:
    size = math.prod(layout.values())
    logits = on(size, adapted, name, layout, str(tmp_path / "base"), str(tmp_path / "adapters"))
    model = by_peft(tmp_path / "base", tmp_path / "adapters")
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits.flatten().tolist()
        with model.disable_adapter():  # type: ignore[operator]
            without = model(input_ids=IDS).logits.flatten().tolist()
    assert theirs == pytest.approx(logits[0], rel=1e-9, abs=1e-11)
    assert theirs != pytest.approx(without, rel=1e-3)


def untouched(layout: dict[str, int], folder: str, named: bool = False) -> None:
    """Save adapters as they begin, or with values by their names: stages of a pipeline draw each for itself."""
    model = fresh(CONFIGS["llama-biases-tied"], seed=3, **(layout or {"groups": single_groups()}))
    torch.manual_seed(5)
    add_lora(model, 4)
    if named:
        with torch.no_grad():
            for name, (module, attribute) in parameter_homes(model).items():
                if "lora_" in name:
                    tensor = getattr(module, attribute)
                    tensor.copy_(torch.sin(torch.arange(tensor.numel()) + len(name)).view_as(tensor) + int(name[13]))
    save_adapters(model, folder)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 3}, {"tp": 2, "dp": 2}, {"pp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_bytes_do_not_depend_on_the_layout(layout: dict[str, int], tmp_path: Path) -> None:
    named = "pp" in layout
    size = math.prod(layout.values())
    untouched({}, str(tmp_path / "alone"), named)
    ranks(size).run(untouched, layout, str(tmp_path / "split"), named)
    files = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / name).iterdir()}
        for name in ("alone", "split")
    ]
    assert files[0] == files[1]
    assert set(files[0]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_targets_are_named_by_their_ends_where_that_is_enough(tmp_path: Path) -> None:
    untouched({}, str(tmp_path / "all"))
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 4, "LORA")
    model = fresh(CONFIGS["llama-biases-tied"], seed=3, groups=single_groups())
    add_lora(model, 2)
    for parent, name, adapter in adapters(model):
        if parent is model.get_submodule("model.layers.1.mlp"):
            setattr(parent, name, adapter.base_layer)
    save_adapters(model, tmp_path / "some")
    config = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.up_proj" in config["target_modules"]
    assert "model.layers.1.mlp.up_proj" not in config["target_modules"]


def test_a_model_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no LoRA adapters to save\. Add some with add_lora"):
        save_adapters(fresh(CONFIGS["gpt2"], groups=single_groups()), tmp_path / "none")
    assert not (tmp_path / "none").exists()
