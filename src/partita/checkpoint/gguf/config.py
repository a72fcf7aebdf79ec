"""The config of a GGUF file's model, as transformers would have it in `config.json`.

Sources: llama.cpp's convert_hf_to_gguf.py, which wrote these keys, and its src/models, which say what the file does not.
transformers' own loader reads fewer of them (no rotary scaling, no widths of experts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from partita.checkpoint.gguf.facts import Facts, shortest
from partita.errors import CheckpointError

Config = dict[str, Any]


def _base(facts: Facts, model_type: str, architecture: str) -> Config:
    """What all architectures share."""
    embedding = facts.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{facts.file}: has no token_embd.weight of two dims, so it holds no language model (a projector or an adapter?). "
            "Give the file of the model."
        )
    special = {
        f"{name}_token_id": facts.token(key) for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": [architecture], "model_type": model_type, "vocab_size": embedding.shape[0],
        "hidden_size": facts.size("embedding_length"), "num_hidden_layers": facts.size("block_count"),
        "tie_word_embeddings": "output.weight" not in facts.tensors, **special,
    }  # fmt: skip


def _attention(facts: Facts, model_type: str, architecture: str) -> Config:
    """What all architectures with attention share."""
    config = _base(facts, model_type, architecture)
    return config | {"num_attention_heads": facts.size("attention.head_count")}


def _dense(facts: Facts, model_type: str, architecture: str) -> Config:
    """A decoder with rotary positions and RMS norms."""
    config = _attention(facts, model_type, architecture)
    return config | {
        "intermediate_size": facts.size("feed_forward_length"),
        "num_key_value_heads": facts.size("attention.head_count_kv", config["num_attention_heads"]),
        "max_position_embeddings": facts.size("context_length"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": facts.number("rope.freq_base", 10000.0),
        **_rope_scaling(facts),
    }


def _head_dim(facts: Facts, config: Config) -> int:
    return facts.size("attention.key_length", config["hidden_size"] // config["num_attention_heads"])


def _rope_scaling(facts: Facts) -> Config:
    """The scaling of rotary positions, from the metadata or from the factors that a file has as a tensor."""
    factors = facts.values("rope_freqs.weight")
    if factors is not None:
        return {"rope_scaling": _llama3_scaling(facts, factors)}
    kind, factor = facts.get("rope.scaling.type"), facts.get("rope.scaling.factor")
    if kind in (None, "none", "longrope") or factor is None:
        return {}
    scaling: Config = {"rope_type": kind, "factor": facts.number("rope.scaling.factor")}
    if kind == "yarn":
        for key, name in (
            ("original_context_length", "original_max_position_embeddings"), ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):  # fmt: skip
            if facts.get(f"rope.scaling.{key}") is not None:
                value = facts.number(f"rope.scaling.{key}")
                scaling[name] = int(value) if key.startswith("original") else value
    elif kind != "linear":
        raise facts.error(f"{facts.architecture}.rope.scaling.type", "must be none, linear, yarn or longrope", kind)
    return {"rope_scaling": scaling}


def _llama3_scaling(facts: Facts, factors: list[float]) -> Config:
    """The parameters of Llama 3.1's scaling, whose factors llama.cpp stores instead of them.

    Llama 3.1 to 3.3 differ in the factor alone, which is that of the slowest frequency.

    Raises:
        CheckpointError: The factors are not those of these parameters.
    """
    theta, factor = facts.number("rope.freq_base", 10000.0), shortest(max(factors))
    low, high, original = 1.0, 4.0, 8192
    for place, found in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (place / len(factors))
        if wavelength < original / high:
            expected = 1.0
        elif wavelength > original / low:
            expected = factor
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected = 1 / ((1 - smooth) / factor + smooth)
        if abs(found - expected) > 1e-4 * expected:
            raise CheckpointError(
                f"{facts.file}: rope_freqs.weight has factors that are not Llama 3.1's to 3.3's (entry {place} is {found}, "
                f"not {expected:.6g}), so its rotary positions cannot be expressed in a config. Use a Hugging Face folder."
            )
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def _llama(facts: Facts) -> Config:
    if facts.get("expert_count"):
        config = _dense(facts, "mixtral", "MixtralForCausalLM")
        return config | {
            "head_dim": facts.size("rope.dimension_count", _head_dim(facts, config)), "sliding_window": None,
            "num_local_experts": facts.size("expert_count"), "num_experts_per_tok": facts.size("expert_used_count"),
        }  # fmt: skip
    window = facts.get("attention.sliding_window")
    config = _dense(facts, "mistral", "MistralForCausalLM") if window else _dense(facts, "llama", "LlamaForCausalLM")
    config["head_dim"] = facts.size("rope.dimension_count", _head_dim(facts, config))
    if window:
        return config | {"sliding_window": facts.size("attention.sliding_window")}
    return config | {"attention_bias": facts.has("attn_q.bias"), "mlp_bias": facts.has("ffn_gate.bias")}


def _qwen2(facts: Facts) -> Config:
    return _dense(facts, "qwen2", "Qwen2ForCausalLM")


def _qwen3(facts: Facts) -> Config:
    config = _dense(facts, "qwen3", "Qwen3ForCausalLM")
    return config | {"head_dim": _head_dim(facts, config), "attention_bias": facts.has("attn_q.bias")}


def _experts(facts: Facts) -> Config:
    return {
        "num_experts": facts.size("expert_count"), "num_experts_per_tok": facts.size("expert_used_count"),
        "moe_intermediate_size": facts.size("expert_feed_forward_length", _expert_width(facts)),
    }  # fmt: skip


def _expert_width(facts: Facts, leaf: str = "ffn_gate_exps.weight") -> int | None:
    """The width inside an expert, from its weight: older files do not say it."""
    info = facts.tensors.get(f"blk.0.{leaf}")
    return None if info is None or len(info.shape) < 2 else info.shape[-2]


def _qwen2_moe(facts: Facts) -> Config:
    config = _dense(facts, "qwen2_moe", "Qwen2MoeForCausalLM") | _experts(facts)
    shared = facts.size("expert_shared_feed_forward_length", _expert_width(facts, "ffn_gate_shexp.weight"))
    return config | {"shared_expert_intermediate_size": shared}


def _qwen3_moe(facts: Facts) -> Config:
    config = _dense(facts, "qwen3_moe", "Qwen3MoeForCausalLM") | _experts(facts)
    # llama.cpp always normalizes; the file does not say it.
    return config | {"head_dim": _head_dim(facts, config), "norm_topk_prob": True}


def _gemma(facts: Facts) -> Config:
    config = _dense(facts, "gemma", "GemmaForCausalLM")
    return config | {"head_dim": _head_dim(facts, config)}


def _query_scale(config: Config, layers: int) -> int:
    """`query_pre_attn_scalar`: the head's width, but for the model with `layers` layers the width of hidden states a head."""
    if config["num_hidden_layers"] == layers:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _gemma2(facts: Facts) -> Config:
    config = _dense(facts, "gemma2", "Gemma2ForCausalLM")
    config["head_dim"] = _head_dim(facts, config)
    return config | {
        "sliding_window": facts.size("attention.sliding_window", 4096),
        "attn_logit_softcapping": facts.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": facts.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scale(config, 46),
    }


def _gemma3(facts: Facts) -> Config:
    config = _dense(facts, "gemma3_text", "Gemma3ForCausalLM")
    config["head_dim"] = _head_dim(facts, config)
    return config | {
        "sliding_window": facts.size("attention.sliding_window", 1024), "sliding_window_pattern": 6,
        "rope_theta": facts.number("rope.freq_base", 1e6),
        "rope_local_base_freq": facts.number("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": _query_scale(config, 62),
    }  # fmt: skip


def _phi3(facts: Facts) -> Config:
    config = _dense(facts, "phi3", "Phi3ForCausalLM")
    width = config["hidden_size"] // config["num_attention_heads"]
    config["partial_rotary_factor"] = facts.size("rope.dimension_count", width) / width
    # 262144 and the context's length are llama.cpp's words for no window.
    window = facts.get("attention.sliding_window")
    config["sliding_window"] = window if window and window < config["max_position_embeddings"] else None
    long, short = facts.values("rope_factors_long.weight"), facts.values("rope_factors_short.weight")
    if long is not None and short is not None:
        original = facts.size("rope.scaling.original_context_length")
        config |= {
            "original_max_position_embeddings": original,
            "rope_scaling": {
                "rope_type": "longrope",
                "long_factor": [*map(shortest, long)],
                "short_factor": [*map(shortest, short)],
            },
        }
        if facts.get("rope.scaling.attn_factor") is not None:
            config["rope_scaling"]["attention_factor"] = facts.number("rope.scaling.attn_factor")
    return config


def _gpt2(facts: Facts) -> Config:
    config = _attention(facts, "gpt2", "GPT2LMHeadModel")
    renamed = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    return {name: value for name, value in config.items() if name not in renamed.values()} | {
        **{name: config[key] for name, key in renamed.items()},
        "n_positions": facts.size("context_length"), "n_inner": facts.size("feed_forward_length"),
        "layer_norm_epsilon": facts.number("attention.layer_norm_epsilon"),
    }  # fmt: skip


def _layer_norms(facts: Facts, model_type: str, architecture: str, epsilon: str) -> Config:
    """A decoder with rotary positions and layer norms."""
    config = _attention(facts, model_type, architecture)
    return config | {
        "intermediate_size": facts.size("feed_forward_length"),
        "num_key_value_heads": facts.size("attention.head_count_kv", config["num_attention_heads"]),
        "max_position_embeddings": facts.size("context_length"),
        epsilon: facts.number("attention.layer_norm_epsilon"),
        "rope_theta": facts.number("rope.freq_base", 10000.0),
        **_rope_scaling(facts),
    }


def _stablelm(facts: Facts) -> Config:
    if facts.has("attn_q_norm.weight"):
        raise CheckpointError(
            f"{facts.file}: StableLM with norms of queries (12B) cannot be read. Use a Hugging Face folder."
        )
    config = _layer_norms(facts, "stablelm", "StableLmForCausalLM", "layer_norm_eps")
    width = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "partial_rotary_factor": facts.size("rope.dimension_count", width) / width,
        "use_qkv_bias": facts.has("attn_q.bias"), "use_parallel_residual": not facts.has("ffn_norm.weight"),
    }  # fmt: skip


def _starcoder2(facts: Facts) -> Config:
    config = _layer_norms(facts, "starcoder2", "Starcoder2ForCausalLM", "norm_epsilon")
    window = facts.get("attention.sliding_window")
    return config | {"use_bias": facts.has("attn_q.bias"), "sliding_window": window or None}


def _nemotron(facts: Facts) -> Config:
    config = _layer_norms(facts, "nemotron", "NemotronForCausalLM", "norm_eps")
    width = config["hidden_size"] // config["num_attention_heads"]
    return config | {"partial_rotary_factor": facts.size("rope.dimension_count", width) / width}


def _bloom(facts: Facts) -> Config:
    config = _attention(facts, "bloom", "BloomForCausalLM")
    config["n_layer"], config["n_head"] = config.pop("num_hidden_layers"), config.pop("num_attention_heads")
    return config | {"layer_norm_epsilon": facts.number("attention.layer_norm_epsilon"), "tie_word_embeddings": True}


def _falcon(facts: Facts) -> Config:
    if facts.has("attn_qkv.bias"):
        raise CheckpointError(
            f"{facts.file}: Falcon with biases (Falcon-RW) cannot be read, because a GGUF file does not say whether it has "
            "ALiBi. Use a Hugging Face folder."
        )
    config = _layer_norms(facts, "falcon", "FalconForCausalLM", "layer_norm_epsilon")
    kv_heads, has_two_norms = config.pop("num_key_value_heads"), facts.has("attn_norm_2.weight")
    return config | {
        "ffn_hidden_size": config.pop("intermediate_size"), "num_kv_heads": kv_heads, "multi_query": kv_heads == 1,
        "new_decoder_architecture": kv_heads > 1 or has_two_norms, "num_ln_in_parallel_attn": 2 if has_two_norms else 1,
        "bias": False, "alibi": False, "parallel_attn": True,
    }  # fmt: skip


def _gpt_oss(facts: Facts) -> Config:
    config = _dense(facts, "gpt_oss", "GptOssForCausalLM")
    if "rope_scaling" in config:
        # The file does not say it; llama.cpp's formula for YaRN truncates, the published models do not.
        config["rope_scaling"] |= {"truncate": False}
    return config | {
        "head_dim": _head_dim(facts, config), "sliding_window": facts.size("attention.sliding_window", 128),
        "intermediate_size": facts.size("expert_feed_forward_length", _expert_width(facts)),
        "num_local_experts": facts.size("expert_count"), "num_experts_per_tok": facts.size("expert_used_count"),
    }  # fmt: skip


def _mamba(facts: Facts) -> Config:
    has_norms = bool(facts.get("ssm.dt_b_c_rms"))
    kind, architecture = ("falcon_mamba", "FalconMambaForCausalLM") if has_norms else ("mamba", "MambaForCausalLM")
    config = _base(facts, kind, architecture)
    inner, epsilon = facts.size("ssm.inner_size"), facts.number("attention.layer_norm_rms_epsilon")
    expand, rest = divmod(inner, config["hidden_size"])
    if rest:
        rule = f"must be a multiple of embedding_length ({config['hidden_size']})"
        raise facts.error(f"{facts.architecture}.ssm.inner_size", rule, inner)
    return config | {
        "expand": expand, "intermediate_size": inner, "state_size": facts.size("ssm.state_size"),
        "conv_kernel": facts.size("ssm.conv_kernel"), "time_step_rank": facts.size("ssm.time_step_rank"),
        "layer_norm_epsilon": epsilon, "use_bias": facts.has("ssm_in.bias"), "use_conv_bias": facts.has("ssm_conv1d.bias"),
        **({"mixer_rms_eps": epsilon} if has_norms else {}),
    }  # fmt: skip


def _lfm2(facts: Facts) -> Config:
    config = _attention(facts, "lfm2", "Lfm2ForCausalLM")
    kv_heads = facts.get("attention.head_count_kv")
    counts = kv_heads if isinstance(kv_heads, list) else [kv_heads] * config["num_hidden_layers"]
    used = {count for count in counts if count != 0}
    if len(counts) != config["num_hidden_layers"] or len(used) != 1 or not all(type(count) is int for count in counts):
        raise facts.error(
            f"{facts.architecture}.attention.head_count_kv", "must be 0 or one same number for each layer", kv_heads
        )
    return config | {
        "num_key_value_heads": used.pop(), "layer_types": ["full_attention" if count else "conv" for count in counts],
        "intermediate_size": facts.size("feed_forward_length"), "block_auto_adjust_ff_dim": False,
        "max_position_embeddings": facts.size("context_length"), "conv_L_cache": facts.size("shortconv.l_cache"),
        "conv_bias": any(name.endswith("shortconv.conv.bias") for name in facts.tensors),
        "norm_eps": facts.number("attention.layer_norm_rms_epsilon"), "rope_theta": facts.number("rope.freq_base", 1e6),
        **_rope_scaling(facts),
    }  # fmt: skip


def _minimax_m2(facts: Facts) -> Config:
    config = _dense(facts, "minimax_m2", "MiniMaxM2ForCausalLM")
    width = _head_dim(facts, config)
    return config | {
        "head_dim": width, "partial_rotary_factor": facts.size("rope.dimension_count", width) / width,
        "intermediate_size": facts.size("expert_feed_forward_length", _expert_width(facts)),
        "num_local_experts": facts.size("expert_count"), "num_experts_per_tok": facts.size("expert_used_count"),
    }  # fmt: skip


def _t5(facts: Facts) -> Config:
    # Only UMT5 has a table of relative positions in every layer.
    is_umt5 = "enc.blk.1.attn_rel_b.weight" in facts.tensors
    config = _base(
        facts, *(("umt5", "UMT5ForConditionalGeneration") if is_umt5 else ("t5", "T5ForConditionalGeneration"))
    )
    layers, is_gated = config.pop("num_hidden_layers"), "enc.blk.0.ffn_gate.weight" in facts.tensors
    return config | {
        "d_model": config.pop("hidden_size"), "num_layers": layers, "num_heads": facts.size("attention.head_count"),
        "num_decoder_layers": facts.size("decoder_block_count", layers), "d_ff": facts.size("feed_forward_length"),
        "d_kv": facts.size("attention.key_length"), "n_positions": facts.size("context_length"),
        "relative_attention_num_buckets": facts.size("attention.relative_buckets_count"),
        "layer_norm_epsilon": facts.number("attention.layer_norm_rms_epsilon"), "is_encoder_decoder": True,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
        "decoder_start_token_id": facts.size("decoder_start_token_id", 0, least=0),
    }  # fmt: skip


CONFIGS: Mapping[str, Callable[[Facts], Config]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "qwen2moe": _qwen2_moe, "qwen3moe": _qwen3_moe, "gemma": _gemma,
    "gemma2": _gemma2, "gemma3": _gemma3, "phi3": _phi3, "gpt2": _gpt2, "stablelm": _stablelm, "starcoder2": _starcoder2,
    "nemotron": _nemotron, "bloom": _bloom, "falcon": _falcon, "gpt-oss": _gpt_oss, "mamba": _mamba, "lfm2": _lfm2, "t5": _t5,
    "minimax-m2": _minimax_m2,
}  # fmt: skip
"""The architectures that can be read, by llama.cpp's names."""

_UNREADABLE: Mapping[str, str] = {
    "deci": "transformers has no model of Nemotron-NAS, whose Hugging Face folder brings its own code. Use that folder with "
    "--trust-remote-code",
}
"""Why other architectures cannot, where the reason is not that nobody wrote their names down."""


def config_of(facts: Facts) -> Config:
    """The config of the model, without its quantization and dtype.

    Raises:
        CheckpointError: The architecture is not known, or a value is missing or not possible.
    """
    build = CONFIGS.get(facts.architecture)
    if build is None:
        if why := _UNREADABLE.get(facts.architecture):
            raise CheckpointError(f"{facts.file}: the architecture {facts.architecture!r} cannot be read: {why}.")
        raise CheckpointError(
            f"{facts.file}: the architecture {facts.architecture!r} cannot be read from a GGUF file: {', '.join(CONFIGS)} can. "
            "Use the model's Hugging Face folder; transformers may make one (from_pretrained(..., gguf_file=...))."
        )
    config = build(facts)
    layers = next(config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config)
    if layers != facts.layers:
        raise CheckpointError(
            f"{facts.file}: block_count is {layers}, but there are tensors of {facts.layers} layers: the file is incomplete. "
            "Download it again."
        )
    return config


_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "</s>")
"""Tokens that end an answer wherever they are special. Source: llama.cpp's `special_eog_ids`."""

_CONTROL = 3


def generation_config(facts: Facts) -> Config:
    """The content of `generation_config.json`: the first token, and all tokens that end a text."""
    ends = [facts.token(name) for name in ("eos", "eot", "eom")]
    tokens = facts.metadata.get("tokenizer.ggml.tokens")
    kinds = facts.metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, list) and ends[0] is not None:
        ends += [place for place, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
                 if kind == _CONTROL and token in _ENDS]  # fmt: skip
    found = list(dict.fromkeys(end for end in ends if end is not None))
    made: Config = {"bos_token_id": facts.token("bos"), "pad_token_id": facts.token("padding")}
    if found:
        made["eos_token_id"] = found if len(found) > 1 else found[0]
    return {name: value for name, value in made.items() if value is not None}
