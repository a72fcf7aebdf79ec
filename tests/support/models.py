"""Small configs of every family that is promised, odd where it hurts: heads, KV heads, vocabulary, widths."""

from __future__ import annotations

from typing import Any

_BASE = {
    "vocab_size": 101, "hidden_size": 56, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 7,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_QWEN = {**_BASE, "hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2}
_MOE = {**_QWEN, "head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
_GPT = {"vocab_size": 101, "n_embd": 56, "n_layer": 2, "n_head": 7, "n_positions": 64}
_BERT = {
    "vocab_size": 101, "hidden_size": 56, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 7,
    "max_position_embeddings": 64,
}  # fmt: skip
_MLA = {
    **_BASE, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 40,
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}  # fmt: skip
_T5 = {
    "vocab_size": 101, "d_model": 24, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 3, "pad_token_id": 0,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 9,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-7-heads-1-kv": {"model_type": "llama", **_BASE},
    "llama-3-heads": {"model_type": "llama", **_BASE, "hidden_size": 24, "num_attention_heads": 3},
    "llama-biases-tied": {
        "model_type": "llama", **_QWEN, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "qwen2-14-heads-2-kv": {"model_type": "qwen2", **_QWEN},
    "qwen3": {"model_type": "qwen3", **_QWEN, "head_dim": 8},
    "mistral": {"model_type": "mistral", **_QWEN, "sliding_window": 4},
    "gemma2": {"model_type": "gemma2", **_QWEN, "head_dim": 8},
    "gemma3": {"model_type": "gemma3_text", **_QWEN, "head_dim": 8},
    "phi3": {"model_type": "phi3", **_QWEN},
    "gpt2": {"model_type": "gpt2", **_GPT},
    "gpt-neox": {"model_type": "gpt_neox", **_BERT},
    "opt": {"model_type": "opt", "vocab_size": 101, "hidden_size": 56, "ffn_dim": 37, "num_hidden_layers": 2,
            "num_attention_heads": 7, "max_position_embeddings": 64, "word_embed_proj_dim": 20},
    "bert": {"model_type": "bert", **_BERT, "architectures": ["BertModel"]},
    "bert-masked-lm": {"model_type": "bert", **_BERT, "architectures": ["BertForMaskedLM"]},
    "mixtral": {"model_type": "mixtral", **_QWEN, "intermediate_size": 40, "num_local_experts": 4},
    "qwen3-moe": {"model_type": "qwen3_moe", **_MOE, "num_experts": 12},
    "deepseek-v3": {"model_type": "deepseek_v3", **_MLA},
    "deepseek-v3-dense-query": {"model_type": "deepseek_v3", **_MLA, "q_lora_rank": None},
}  # fmt: skip
"""By a name for the test's output, transformers' config as data."""

UNMEASURED: dict[str, dict[str, Any]] = {
    "gpt-oss": {"model_type": "gpt_oss", **_QWEN, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {"model_type": "olmo2", **_QWEN},
    "stablelm": {"model_type": "stablelm", **_QWEN},
    "cohere": {"model_type": "cohere", **_QWEN},
    "granite": {"model_type": "granite", **_QWEN},
    "bloom": {"model_type": "bloom", "vocab_size": 101, "hidden_size": 56, "n_layer": 2, "n_head": 7},
    "falcon": {"model_type": "falcon", **{k: v for k, v in _BERT.items() if k != "intermediate_size"}},
    "mpt": {"model_type": "mpt", "vocab_size": 101, "d_model": 56, "n_layers": 2, "n_heads": 7, "max_seq_len": 64},
    "t5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], **_T5},
    "umt5": {"model_type": "umt5", "architectures": ["UMT5ForConditionalGeneration"], **_T5,
             "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}  # fmt: skip
"""Families whose rules no table calls proven: they are measured before use."""
