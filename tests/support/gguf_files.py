"""GGUF files of small random models, written with the gguf package as llama.cpp's converter writes them, and their values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    RopeScalingType,
    TokenType,
    get_tensor_name_map,
    quants,
)

from partita.checkpoint.gguf.file import BLOCKS
from partita.generation.tokenizer import byte_characters

VOCAB = 262
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_HEADS = {"head_dim": 32}
_ENDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}
_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "ffn_hidden_size": 160,
    **_ENDS,
}
_MAMBA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 8,
    "expand": 2,
    "time_step_rank": 32,
    **_ENDS,
}
_T5 = {"vocab_size": VOCAB, "d_model": 96, "d_kv": 32, "d_ff": 160, "num_layers": 2, "num_heads": 6, "pad_token_id": 0,
       "eos_token_id": 257, "decoder_start_token_id": 0}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES},
    "llama-tied": {"model_type": "llama", **_SIZES, "tie_word_embeddings": True, "attention_bias": True},
    "mixtral": {"model_type": "mixtral", **_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", **_SIZES},
    "qwen3": {"model_type": "qwen3", **_SIZES, **_HEADS},
    "qwen2moe": {"model_type": "qwen2_moe", **_SIZES, **_EXPERTS, "shared_expert_intermediate_size": 96},
    "qwen3moe": {"model_type": "qwen3_moe", **_SIZES, **_EXPERTS, **_HEADS, "norm_topk_prob": True},
    "gemma": {"model_type": "gemma", **_SIZES, **_HEADS, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **_SIZES, **_HEADS, "tie_word_embeddings": True, "sliding_window": 8,
               "query_pre_attn_scalar": 32},
    "gemma3": {"model_type": "gemma3_text", **_SIZES, **_HEADS, "tie_word_embeddings": True, "sliding_window": 8,
               "query_pre_attn_scalar": 32, "num_hidden_layers": 7},
    "phi3": {"model_type": "phi3", **_SIZES},
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": 64,
             "n_inner": 160, "bos_token_id": 256, "eos_token_id": 257},
    "stablelm": {"model_type": "stablelm", **_SIZES, "use_qkv_bias": True, "partial_rotary_factor": 0.25},
    "starcoder2": {"model_type": "starcoder2", **_SIZES, "sliding_window": None, "rope_theta": 5000.0},
    "nemotron": {"model_type": "nemotron", **_SIZES, "partial_rotary_factor": 0.5},
    "bloom": {"model_type": "bloom", "vocab_size": VOCAB, "hidden_size": 96, "n_layer": 2, "n_head": 6, "bos_token_id": 256,
              "eos_token_id": 257},
    "falcon": {"model_type": "falcon", **_FALCON, "multi_query": True, "new_decoder_architecture": False},
    "falcon-40b": {"model_type": "falcon", **_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True,
                   "tie_word_embeddings": False},
    "falcon-11b": {"model_type": "falcon", **_FALCON, "num_kv_heads": 3, "new_decoder_architecture": True,
                   "num_ln_in_parallel_attn": 1},
    "gpt-oss": {"model_type": "gpt_oss", **_SIZES, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
                "sliding_window": 4, "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 32,
                    "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}},
    "mamba": {"model_type": "mamba", **_MAMBA},
    "mamba-falcon": {"model_type": "falcon_mamba", **_MAMBA, "tie_word_embeddings": False, "mixer_rms_eps": 1e-5},
    "lfm2": {"model_type": "lfm2", **_SIZES, "tie_word_embeddings": True, "block_auto_adjust_ff_dim": False,
             "layer_types": ["conv", "full_attention", "conv"], "norm_eps": 1e-5},
    "t5": {"model_type": "t5", **_T5},
    "t5-gated": {"model_type": "t5", **_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
                 "num_decoder_layers": 3},
    "t5-umt5": {"model_type": "umt5", **_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "minimax-m2": {"model_type": "minimax_m2", **_SIZES, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
                   "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}},
}  # fmt: skip
"""By a name, whose beginning is llama.cpp's name of the architecture, transformers' config as data."""

_ARCHITECTURES = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3",
                  "gpt_oss": "gpt-oss", "falcon_mamba": "mamba", "umt5": "t5", "minimax_m2": "minimax-m2"}  # fmt: skip

Split = Callable[[np.ndarray], np.ndarray]


def build(data: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(**data)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    if not getattr(config, "scale_decoder_outputs", True):  # T5 1.1, whose head transformers ties unless values differ
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def random_model(data: Mapping[str, Any], seed: int = 0) -> Any:
    """A model in float32 whose every parameter is random."""
    torch.manual_seed(seed)
    model = build(data)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if name.endswith("A_log"):
                parameter.add_(1.0)
            if "norm" in name or ".ln_" in name:
                parameter.add_(1.0)
    return model


def write_model(
    file: Path, model: Any, kinds: tuple[str, ...], seed: int = 0, extra: Callable[[GGUFWriter], None] | None = None
) -> None:
    """Write a model as a GGUF file whose matrices take the types `kinds` in turn, and give the model the values in the file.

    `extra` adds metadata and tensors.
    """
    config = model.config.get_text_config()
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = GGUFWriter(file, architecture)
    write_metadata(writer, config, model)
    if extra is not None:
        extra(writer)
    rng, places = np.random.default_rng(seed), 0
    with torch.no_grad():
        for name, values, put in _tensors(model, architecture):
            kind = "F32"
            if (
                values.ndim > 1
                and "ffn_gate_inp" not in name
                and not name.endswith((".bias", "ssm_a", "conv1d.weight"))
            ):
                # The gate and up projections of GPT-OSS become one tensor, so that both have one type.
                places += not (architecture == "gpt-oss" and "ffn_up_exps" in name)
                kind = kinds[(places - 1) % len(kinds)]
            if values.shape[-1] % BLOCKS[kind][0]:
                kind = "F16"
            stored = blocks(values, kind, rng)
            number = GGMLQuantizationType[kind]
            writer.add_tensor(name, stored, raw_dtype=None if kind in ("F32", "F16") else number)
            put(torch.from_numpy(np.array(quants.dequantize(stored, number), np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(values: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """`values` in blocks of `kind`; random blocks of about their size where the gguf package cannot quantize."""
    try:
        return quants.quantize(values.astype(np.float32), GGMLQuantizationType[kind])
    except NotImplementedError:
        elements, size = BLOCKS[kind]
        made = rng.integers(0, 256, (values.size // elements, size), dtype=np.uint8)
        for start, scale in _HALVES[kind].items():
            made[:, start : start + 2] = (
                (scale * rng.uniform(0.5, 1, len(made))).astype(np.float16)[:, None].view(np.uint8)
            )
        return made.reshape(*values.shape[:-1], -1)


_HALVES = {
    "Q2_K": {80: 0.01, 82: 0.01}, "Q3_K": {108: 0.003}, "Q4_K": {0: 5e-4, 2: 2e-3}, "Q5_K": {0: 2e-4, 2: 2e-3},
    "Q6_K": {208: 1e-4}, "IQ4_NL": {0: 2e-3}, "IQ4_XS": {0: 1e-4},
}  # fmt: skip
"""Where blocks have float16 scales, and scales that give weights of a useful size."""


def _tensors(model: Any, architecture: str) -> Iterator[tuple[str, np.ndarray, Callable[[torch.Tensor], None]]]:
    """The tensors to write: name, values in the file's form, and a function that gives the model other values in that form."""
    config = model.config.get_text_config()
    [number] = [key for key, value in MODEL_ARCH_NAMES.items() if value == architecture]
    names = get_tensor_name_map(number, max(config.num_hidden_layers, getattr(config, "num_decoder_layers", None) or 0))
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_tied = name == "lm_head.weight" and tensor is model.get_input_embeddings().weight
        if is_tied or (architecture == "bloom" and name == "lm_head.weight"):
            continue
        if name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):  # T5 has `shared`
            continue
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)(_bias)?", name):
            write = _alternating_experts if architecture == "gpt-oss" else _experts
            yield from write(match[1], match[2], tensor)
            continue
        if name.endswith("mlp.gate.weight") and "moe" not in config.model_type:  # Mixtral
            name = name.replace("mlp.gate", "block_sparse_moe.gate")
        name = name.replace("mlp.e_score_correction_bias", "block_sparse_moe.e_score_correction.bias")
        path, attribute = (name, None) if name.endswith((".A_log", ".D", ".sinks")) else name.rsplit(".", 1)
        target = names.get_name(path) or names.get_name(
            path.removeprefix("transformer.")
        )  # BLOOM's are those of BloomModel
        assert target is not None, name
        attribute = "weight" if name.endswith(".sinks") else attribute
        target = target if attribute is None else f"{target}.{attribute}"
        there, back = _change(target, config, architecture)
        yield target, _numpy(there(tensor)), lambda v, t=tensor, b=back: t.copy_(b(v).reshape(t.shape))


def _experts(layer: str, kind: str, tensor: Any) -> Iterator[tuple[str, np.ndarray, Callable[[torch.Tensor], None]]]:
    if kind == "down_proj":
        yield f"blk.{layer}.ffn_down_exps.weight", _numpy(tensor), tensor.data.copy_
        return
    for leaf, part in zip(("gate", "up"), tensor.data.chunk(2, 1), strict=True):
        yield f"blk.{layer}.ffn_{leaf}_exps.weight", _numpy(part), part.copy_


def _alternating_experts(
    layer: str, kind: str, tensor: Any
) -> Iterator[tuple[str, np.ndarray, Callable[[torch.Tensor], None]]]:
    """GPT-OSS's, which are [experts, inputs, outputs], and biases [experts, outputs]."""
    attribute = "weight" if tensor.dim() == 3 else "bias"
    outputs = tensor.data.mT if tensor.dim() == 3 else tensor.data[..., None]
    parts = {"down": outputs} if kind == "down_proj" else {"gate": outputs[:, ::2], "up": outputs[:, 1::2]}
    for leaf, part in parts.items():
        stored = part if tensor.dim() == 3 else part[..., 0]
        yield f"blk.{layer}.ffn_{leaf}_exps.{attribute}", _numpy(stored), stored.copy_


def _change(name: str, config: Any, architecture: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """What convert_hf_to_gguf.py does with the values of a tensor, and the inverse."""
    heads = getattr(config, "num_attention_heads", 0)
    if architecture == "llama" and re.search(r"attn_[qk]\.", name):
        count = heads if "attn_q" in name else config.num_key_value_heads
        return (
            lambda t: t.view(count, 2, -1, *t.shape[1:]).transpose(1, 2).reshape(t.shape),
            lambda t: t.view(count, -1, 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape),
        )
    if architecture in ("gemma", "gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return lambda t: t + 1, lambda t: t - 1
    if architecture == "gpt2" and re.search(r"blk.*(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name):
        return lambda t: t.T, lambda t: t.T
    if architecture == "falcon" and "attn_qkv" in name:
        kv_heads, width = _kv_heads(config), config.head_dim
        sizes = [heads * width, kv_heads * width, kv_heads * width]

        def together(t: Any) -> Any:
            parts = zip(t.split(sizes), (heads // kv_heads, 1, 1), strict=True)
            return torch.cat([part.view(kv_heads, count, width, -1) for part, count in parts], 1).reshape(t.shape)

        def apart(t: Any) -> Any:
            grouped = t.view(kv_heads, heads // kv_heads + 2, width, -1)
            parts = grouped.split([heads // kv_heads, 1, 1], 1)
            return torch.cat([part.reshape(-1, t.shape[1]) for part in parts])

        return apart, together
    if name.endswith("ssm_a"):
        return lambda t: -torch.exp(t), lambda t: torch.log(-t.double()).float()
    if name.endswith(("ssm_conv1d.weight", "shortconv.conv.weight")):
        return lambda t: t.squeeze(1), lambda t: t[:, None]
    if architecture == "bloom" and "attn_qkv" in name:
        return (
            lambda t: t.view(heads, 3, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape),
            lambda t: t.view(3, heads, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape),
        )
    if "ffn_gate_inp_shexp" in name:
        return lambda t: t[0], lambda t: t[None]
    return lambda t: t, lambda t: t


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy())


def _kv_heads(config: Any) -> int:
    if config.model_type == "falcon":
        return config.num_kv_heads if config.new_decoder_architecture else 1
    return getattr(config, "num_key_value_heads", config.num_attention_heads)


def write_metadata(writer: GGUFWriter, config: Any, model: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, config.vocab_size)
    if "mamba" in config.model_type:
        _write_mamba(writer, config)
        return
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(getattr(config, "max_position_embeddings", 2048))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    names = ("n_inner", "ffn_hidden_size", "d_ff", "intermediate_size")
    inner = next((size for name in names if (size := getattr(config, name, None))), None) or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    kv_heads = _kv_heads(config)
    if config.model_type == "lfm2":
        writer.add_head_count_kv([kv_heads if kind == "full_attention" else 0 for kind in config.layer_types])
        writer.add_shortconv_l_cache(config.conv_L_cache)
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_head_count_kv(kv_heads)
    if config.is_encoder_decoder:
        _write_t5(writer, config)
    if config.model_type in (
        "gemma",
        "gemma2",
        "gemma3_text",
        "qwen3",
        "qwen3_moe",
        "gpt_oss",
        "minimax_m2",
        "t5",
        "umt5",
    ):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    for name in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"):
        if hasattr(config, name) and config.model_type != "lfm2":
            writer.add_layer_norm_eps(getattr(config, name))
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    elif rope:
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if config.model_type in ("gpt_oss", "minimax_m2"):
            writer.add_expert_feed_forward_length(config.intermediate_size)
        if hasattr(config, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _write_mamba(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.time_step_rank)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_dt_b_c_rms(config.model_type == "falcon_mamba")


def _write_t5(writer: GGUFWriter, config: Any) -> None:
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_decoder_block_count(config.num_decoder_layers)
    writer.add_decoder_start_token_id(config.decoder_start_token_id)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)


def write_tokenizer(writer: GGUFWriter, size: int) -> None:
    """A byte-level tokenizer: the bytes, a first and a last token, a merge, a token of the user, unused ones."""
    tokens = [*byte_characters(), "<bos>", "<eos>", "th", "the", "<think>"]
    tokens += [f"[PAD{place}]" for place in range(len(tokens), size)]
    kinds = [TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 2 + [TokenType.USER_DEFINED]
    kinds += [TokenType.UNUSED] * (size - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}assistant:")
