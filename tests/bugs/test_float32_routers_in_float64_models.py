"""Families whose routers are float32 in a model of any dtype were refused: their float64 samples could not be run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partita.core.mesh import Mesh
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.proof.family import plan_of_model, sample_inputs, small_model
from tests.support.models import _BASE, _MLA, _MOE

FAMILIES: dict[str, dict[str, Any]] = {
    "glm4_moe": {**_MOE, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {**_MOE, "moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1},
    "deepseek_v2": {**_MLA, "topk_method": "greedy"},
    "nemotron_h": {
        **_BASE, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40,
        "num_hidden_layers": 4, "hybrid_override_pattern": "M*E-", "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1,
        "ssm_state_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
    },
    "xglm": {"vocab_size": 101, "d_model": 32, "ffn_dim": 40, "num_layers": 2, "attention_heads": 4},
    "xlnet": {"vocab_size": 101, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_and_split(family: str) -> None:
    model = build_on_meta(read_hf_config({"model_type": family, **FAMILIES[family]}), torch.float32)
    plan = plan_of_model(model, Mesh(tp=2))
    assert plan.rank_parameters(0) < plan.spec.parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_narrower_than_float64(family: str) -> None:
    built = build_on_meta(read_hf_config({"model_type": family, **FAMILIES[family]}), torch.float64)
    model = small_model(built, 4)
    for one in (built, model):
        assert {t.dtype for t in (*one.parameters(), *one.buffers()) if t.is_floating_point()} == {torch.float64}
    with torch.no_grad(), Float64Everywhere():
        assert model(**sample_inputs(model))[0].dtype == torch.float64
