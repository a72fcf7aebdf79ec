"""Unsaved buffers that another module's initialization computes had the values of uninitialized memory after loading.

Falcon-H1's model computes `mup_vector` of its layers. Only the modules that own such a buffer were initialized.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from partita.errors import ModelError
from partita.torch.weights.materialize import Filled, make_unsaved_buffers
from tests.support.loaded import differences, random_model


def test_falcon_h1(tmp_path: Path) -> None:
    config = transformers.FalconH1Config(
        vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
        mamba_d_state=8, ssm_multipliers=[0.5, 0.25, 2.0, 3.0, 1.5],
    )  # fmt: skip
    random_model(transformers.FalconH1ForCausalLM, config).save_pretrained(tmp_path)
    assert differences(tmp_path, 1, 1) == []


class Forgetful(transformers.PreTrainedModel):
    """A model whose initialization does not know its buffer."""

    config_class = transformers.LlamaConfig

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.arange(4), persistent=False)


def test_a_buffer_that_nobody_computes_is_refused() -> None:
    with torch.device("meta"):
        model = Forgetful(transformers.LlamaConfig())
    with pytest.raises(ModelError, match="table is an unsaved buffer"):
        make_unsaved_buffers(model, torch.device("cpu"))


def test_a_tensor_that_changes_after_it_was_read_is_refused() -> None:
    model = nn.Linear(2, 2)
    filled = Filled({"weight": (model.weight, model.weight._version), "bias": (model.bias, model.bias._version)})
    assert filled.check(model) is model
    with torch.no_grad():
        model.bias.zero_()
    with pytest.raises(ModelError, match="bias was changed after its weights were read"):
        filled.check(model)
    model.bias, filled = nn.Parameter(torch.zeros(2)), Filled({"bias": filled.tensors["bias"]})
    with pytest.raises(ModelError, match="bias was changed"):
        filled.check(model)
