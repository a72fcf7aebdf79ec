"""A model's config made small: the same family, heads and kinds of layers, in a size that is computed in a moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from partita.core.model_spec import config_number
from partita.core.shrink_towers import with_small_towers

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "hidden_dim")
_WIDTH = 48
_INNER = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
_VOCABULARY = ("vocab_size",)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_RANKS = ("q_lora_rank", "kv_lora_rank")
_PERIODS = (
    "sliding_window_pattern",
    "full_attention_interval",
    "attn_layer_period",
    "expert_layer_period",
    "interleave_moe_layer_step",
    "layer_group_size",
    "decoder_sparse_step",
    "num_kv_reuse_layers",
)
"""Every so many layers comes one of another kind."""

_NESTED = ("text_config", "llm_config", "language_config")


def shrunk_configs(config: Mapping[str, Any], num_heads: int) -> Iterator[dict[str, Any]]:
    """Smaller and smaller changes of `config`, to be tried in turn until one can be built.

    Head counts, kinds of layers and every switch stay, since they are what a split may get wrong. Of a multimodal config the
    text model's is made small, and its towers' shallow, then narrow too.
    """
    nested = next((key for key in _NESTED if isinstance(config.get(key), Mapping) and config[key]), None)
    if nested is not None:
        for small in shrunk_configs(config[nested], num_heads):
            same = {k: min(v, small.get(k, v)) for k, v in _numbers(config, _VOCABULARY)}
            yield from with_small_towers({**config, **same}, nested, small)
        return
    layers, more = _few_layers(config), _few_layers(config, 8)
    inner = {**layers, **{k: min(v, _WIDTH) for k, v in _numbers(layers, _INNER)}, **_small_vocabulary(layers)}
    yield {**layers, **_narrow(layers, num_heads)}
    # Where kinds of layers come in a rhythm that no key tells.
    yield {**more, **_narrow(more, num_heads)}
    yield inner
    yield layers


def _few_layers(config: Mapping[str, Any], count: int = 2) -> dict[str, Any]:
    """As many layers as hold one of each kind, at least `count`."""
    small = dict(config)
    total = max((value for _, value in _numbers(config, _LAYERS)), default=0)
    by_layer = {
        key: value
        for key, value in config.items()
        if (isinstance(value, list) or key == "hybrid_override_pattern")
        and value is not None
        and len(value) == total > 2
    }
    for value in by_layer.values():
        # Names and switches are kinds; widths are not.
        kinds = {kind for kind in value if isinstance(kind, (str, int))}
        count = max(count, *(1 + value.index(kind) for kind in kinds)) if kinds else count
    for _, value in _numbers(config, _PERIODS):
        count = max(count, min(value, total))
    if config_number(config, "num_kv_shared_layers") > 0:
        # Each kind of layer once with keys and values of its own, and once with those of another.
        count = max(count, 2 * count)
        small["num_kv_shared_layers"] = min(config["num_kv_shared_layers"], count // 2)
    count = min(count, total) if total else count
    dense = config.get("first_k_dense_replace")
    if type(dense) is int and dense > 0:
        small["first_k_dense_replace"] = 1
    for key, value in _numbers(config, _LAYERS):
        small[key] = min(value, count)
    for key, value in by_layer.items():
        small[key] = value[:count]
    return small


def _narrow(config: Mapping[str, Any], num_heads: int) -> dict[str, Any]:
    width = 8
    changes: dict[str, Any] = dict(_small_vocabulary(config))
    hidden = [value for _, value in _numbers(config, _HIDDEN)]
    head_dim = config.get("head_dim")
    if hidden and num_heads and hidden[0] % num_heads == 0:
        own = hidden[0] // num_heads
        for key, value in _numbers(config, _HIDDEN):
            if value == hidden[0]:
                changes[key] = num_heads * min(width, own)
        if type(head_dim) is int:
            changes["head_dim"] = min(width, head_dim)
    elif hidden and type(head_dim) is int:
        # Heads of a width of their own: the model's width is free of them.
        changes |= {key: 64 for key, value in _numbers(config, _HIDDEN) if value == hidden[0]}
        changes["head_dim"] = min(width, head_dim)
    changes |= {key: min(value, _WIDTH) for key, value in _numbers(config, _INNER)}
    changes |= {key: min(value, 16) for key, value in _numbers(config, _RANKS)}
    changes |= {key: min(value, width) for key, value in _numbers(config, ("rotary_dim",))}
    groups = config.get("n_group")
    experts = max(16, 2 * groups) if type(groups) is int else 16
    changes |= {key: min(value, experts) for key, value in _numbers(config, _EXPERTS)}
    return changes


def _small_vocabulary(config: Mapping[str, Any]) -> dict[str, Any]:
    """A vocabulary of a size that no number of ranks divides, with the special ids inside it."""
    changes: dict[str, Any] = {key: min(value, 127) for key, value in _numbers(config, _VOCABULARY)}
    for key in (
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "sep_token_id",
        "cls_token_id",
    ):
        value = config.get(key)
        if (type(value) is int and value >= 127) or isinstance(value, list):
            changes[key] = 1
    return changes


def _numbers(config: Mapping[str, Any], keys: tuple[str, ...]) -> list[tuple[str, int]]:
    return [(key, config[key]) for key in keys if type(config.get(key)) is int and config[key] > 0]
