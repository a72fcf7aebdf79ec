"""peft on a split model matched inner paths, adapted the head, and saved parts of it; `save_adapters` raised AttributeError."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from partita.errors import ModelError
from partita.torch import save_adapters, shard
from tests.support.ranks import ranks
from tests.torch.test_peft_models import llama


def saved(folder: str) -> None:
    import peft

    warnings.simplefilter("ignore")
    for name, settings in {
        "all": {"target_modules": "all-linear"},
        "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "both": {"target_modules": ["lm_head", "embed_tokens"]},
    }.items():
        split = peft.get_peft_model(shard(llama(torch.float32), tp=2), peft.LoraConfig(r=2, **settings))
        save_adapters(split, f"{folder}/{name}")
    with pytest.raises(ModelError, match=r"trainable_token_indices=\[3\] does not work on a split model"):
        peft.get_peft_model(
            shard(llama(torch.float32), tp=2), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3])
        )


def test_files_hold_the_unsplit_adapters_of_the_layers_that_were_meant(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ranks(2).run(saved, str(tmp_path))
    all_linear, head, both = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("all", "head", "both")
    )
    assert not any("lm_head" in name for name in all_linear)
    assert len(all_linear) == 2 * 2 * 7
    assert head["base_model.model.lm_head.weight"].shape == (31, 20)
    assert head["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (20, 2)
    assert both["base_model.model.lm_head.lora_B.weight"].shape == (31, 2)
    assert both["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (2, 31)
    config = json.loads((tmp_path / "head" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["modules_to_save"]) == (["q_proj"], ["lm_head"])
