"""A tiny config of every family that mlx-lm has: usual sizes by the names of a model's arguments, then what it needs else."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pkgutil
import re
from typing import Any

import mlx_lm.models

from partita.mlx.model.mlx_lm_models import model_classes

LAYERS = 4

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim", "hidden_dim", "dim_model_base"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_hidden_size", "moe_intermediate_size", "shared_intermediate_size",
         "expert_ffn_hidden_size", "ff_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp",
         "moe_shared_expert_intermediate_size", "moe_shared_intermediate_size", "share_expert_dim", "block_dim"), 48,
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_positions", "n_ctx", "max_position_embeddings", "model_max_length", "block_size"), 128),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "decoder_sparse_step", "moe_layer_freq"), 1),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "layernorm_epsilon"), 1e-5),
    **dict.fromkeys(("rope_theta", "swa_rope_theta", "rotary_emb_base"), 10000.0),
    **dict.fromkeys(("conv_kernel", "linear_conv_kernel_dim", "mamba_d_conv", "conv1d_width", "conv_L_cache"), 4),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 6),
    **dict.fromkeys(("rotary_pct", "partial_rotary_factor"), 0.5),
    "vocab_size": 101, "rotary_dim": 8, "index_n_heads": 2, "index_topk": 64, "hidden_act": "silu",
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "group_norm_size": 1, "layer_group_size": 2,
    "linear_conv_kernel": 4, "time_step_rank": 4, "dt_rank": 4,
}  # fmt: skip
"""By the name of an argument: used wherever a family has it."""

_BY_TYPE: dict[str, Any] = {"bool": False, "float": 1.0, "int": 1, "str": "", "list": [], "dict": {}}
"""What an argument without a default gets that no size names."""


def families() -> list[str]:
    """The names of all modules of mlx-lm that have a model."""
    names = sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in names if name not in _NO_MODELS]


_NO_MODELS = frozenset(
    ("activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline", "rope_utils", "ssm",
     "switch_layers")
)  # fmt: skip


def tiny_config(family: str) -> dict[str, Any]:
    """A tiny config of a family."""
    with contextlib.redirect_stdout(io.StringIO()):
        _, arguments = model_classes({"model_type": family})
    config: dict[str, Any] = {"model_type": family}
    for field in dataclasses.fields(arguments):
        if field.name == "model_type":
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in _SIZES:
            config[field.name] = _SIZES[field.name]
        elif required:
            kind = re.sub(r"^(Optional|Union)\[", "", str(getattr(field.type, "__name__", field.type)).lower())
            config[field.name] = next((v for name, v in _BY_TYPE.items() if kind.startswith(name)), None)
    if family in _TEXT_OF:
        config["text_config"] = tiny_config(_TEXT_OF[family])
    changes = dict(_OVERRIDES.get(family, {}))
    if "text_config" in changes:
        changes["text_config"] = {**(config.get("text_config") or {}), **changes["text_config"]}
    return {**config, **changes}


_MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_YARN = {
    "type": "yarn", "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_ROPE_BY_KIND = {kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in _MIXED}
_LINEAR_ATTENTION = {
    "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4, "kda_layers": [1, 3], "full_attn_layers": [2, 4],
}  # fmt: skip
_LFM2 = {
    "block_dim": 64,
    "layer_types": ["conv", "full_attention"] * 2,
    "full_attn_idxs": [1, 3],
    "block_multiple_of": 4,
    "block_ff_dim": 48,
}
_LONGCAT = {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_num": 2, "zero_expert_type": "identity"}
_KIMI_K3 = {
    **{name: _SIZES[name] for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size",
        "num_experts", "num_experts_per_token")},
    "num_key_value_heads": 4, "linear_attn_config": _LINEAR_ATTENTION, "activation_situ_beta": 1.0, "num_shared_experts": 1,
    "attn_res_block_size": 2,
}  # fmt: skip
_GEMMA3N = {
    "model_type": "gemma3n",
    **{name: _SIZES[name] for name in (
        "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "head_dim", "rms_norm_eps",
        "vocab_size", "num_key_value_heads", "sliding_window", "max_position_embeddings", "rope_theta")},
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 101, "rope_local_base_freq": 1000.0,
    "final_logit_softcapping": 30.0, "layer_types": _MIXED, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "altup_coef_clip": 1.0, "altup_correct_scale": True,
    "altup_active_idx": 0, "laurel_rank": 4,
}  # fmt: skip

_TEXT_OF: dict[str, str] = {
    "gemma3": "gemma3_text", "kimi_k25": "deepseek_v3", "kimi_vl": "deepseek_v3", "lfm2-vl": "lfm2", "mistral3": "ministral3",
    "llama4": "llama4_text", "pixtral": "llama", "qwen2_vl": "qwen2", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5": "qwen3_next", "qwen3_5_moe": "qwen3_next", "prism_hadamard_qwen35": "qwen3_next", "gemma4": "gemma4_text",
}  # fmt: skip
"""Of those that wrap a text model, which."""

_OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": _MIXED},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": _YARN},
    "exaone_moe": {"layer_types": _MIXED, "is_moe_layer": [False, True, False, True]},
    "gear": {"layer_types": ["conv", "full_attention", "sliding_attention", "conv"]},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": _MIXED, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": 101},
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "gpt2": {"num_key_value_heads": None},
    "gpt_neox": {"num_key_value_heads": None},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 16,
                         "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4, "num_local_experts": 4,
                         "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    "hunyuan": {"cla_share_factor": 2, "num_shared_expert": 1, "moe_topk": 2,
                "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 10.0}},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
              "mamba_expand": 2},
    "kimi_k25": {"text_config": {"num_key_value_heads": 4}},
    "kimi_k3": {"text_config": _KIMI_K3},
    "kimi_linear": {"linear_attn_config": _LINEAR_ATTENTION, "num_key_value_heads": 4},
    "lfm2": _LFM2,
    "lfm2-vl": {"text_config": _LFM2},
    "lfm2_moe": {"full_attn_idxs": [1, 3], "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0], "use_qk_norm": True},
    "llama4": {"text_config": {"attention_chunk_size": 8, "interleave_moe_layer_step": 2, "num_local_experts": 4,
                               "num_experts_per_tok": 1, "attention_bias": False, "rope_scaling": None,
                               "max_position_embeddings": 128}},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mamba2": {"time_step_limit": [0.001, 10.0], "n_groups": 2, "time_step_rank": "auto", "num_heads": 8},
    "mellum": {"layer_types": _MIXED, "rope_parameters": _ROPE_BY_KIND},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1, 0, 1], "moe_layer_freq": [0, 1, 0, 1],
                      "add_swa_attention_sink_bias": True, "routed_scaling_factor": None, "n_shared_experts": None},
    "minicpm3": {"rope_scaling": {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
    "minimax_m3_vl": {"text_config": {
        **{name: _SIZES[name] for name in (
            "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "vocab_size",
            "rms_norm_eps", "num_local_experts", "num_experts_per_tok", "intermediate_size", "rotary_dim")},
        "dense_intermediate_size": 48, "shared_intermediate_size": 48,
    }},
    "ministral3": {"rope_parameters": _YARN},
    "mistral4": {"rope_parameters": _YARN},
    "mistral3": {"text_config": {"model_type": "ministral3"}},
    "nemotron-nas": {"block_configs": [{
        "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
        "ffn": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False},
    }] * LAYERS},
    "nemotron_h": {"hybrid_override_pattern": ["*", "M", "-", "M"], "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
                   "time_step_limit": [0.001, 10.0]},
    "openelm": {"num_query_heads": [4] * LAYERS, "num_kv_heads": [2] * LAYERS, "ffn_multipliers": [1.0] * LAYERS,
                "ffn_dim_divisor": 8},
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 16, "intermediate_size": 96},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"] * 2, "logits_soft_cap": 30.0, "num_key_value_heads": 1},
    "muse_spark": {"text_config": {
        **{name: _SIZES[name] for name in (
            "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "vocab_size",
            "rms_norm_eps", "sliding_window", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")},
        "post_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 10000.0}, "layer_rope_theta": [10000.0, 0.0] * 2,
        "layer_types": _MIXED, "final_logit_softcapping": 30.0, "output_multiplier": 1.0, "moe_hidden_size": 32,
    }},
    "spark2_5": {"hidden_act": "gelu","layer_types": _MIXED, "rope_parameters": _ROPE_BY_KIND},
}  # fmt: skip
"""What a family needs that its arguments' names do not tell."""
