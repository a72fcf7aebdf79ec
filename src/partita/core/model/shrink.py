"""Shrink a model's config: the same family, heads and kinds of layers, in a size that runs within seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from partita.core.model.shrink_towers import with_small_towers
from partita.core.model.spec import config_number

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "hidden_dim", "emb_dim")
_WIDTH = 48
_INNER = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "dim_ff",
    "ffn_hidden_size",
    "expert_ffn_hidden_size",
    "intermediate_size_mlp",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "moe_intermediate_size",
    "shared_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "moe_shared_expert_intermediate_size",
)
_VOCABULARY = ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size")
_HEAD_DIMS = ("rotary_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim")
_LATENT_WIDTHS = (("qk_rope_head_dim", 8), ("qk_nope_head_dim", 16), ("v_head_dim", 12))
_STATES = ("mamba_d_state", "ssm_state_size", "state_size")
_CHUNKS = ("mamba_chunk_size", "chunk_size")
_STATE_HEADS = (
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
    ("mamba_num_heads", "mamba_head_dim", "expand"),
    ("num_heads", "head_dim", "expand"),
)
"""The number of heads, their width, and the ratio of their total width to the model's."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num")
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
"""Keys with the distance between layers of another kind."""

_NESTED = ("text_config", "llm_config", "language_config")


def shrunk_configs(
    config: Mapping[str, Any], num_heads: int, layers: int = 0, experts: int = 1
) -> Iterator[dict[str, Any]]:
    """Smaller and smaller variants of `config`, to try in turn until one can be built.

    All have at least `layers` layers and `experts` experts, if `config` has as many.

    Head counts, kinds of layers and all flags stay, since they determine the split. In a multimodal config the
    text model becomes small, and its towers shallow, then narrow too.
    """
    nested = next((key for key in _NESTED if isinstance(config.get(key), Mapping) and config[key]), None)
    if nested is not None:
        for small in shrunk_configs(config[nested], num_heads, layers, experts):
            same = {k: min(v, small.get(k, v)) for k, v in _numbers(config, _VOCABULARY)}
            yield from with_small_towers({**config, **same}, nested, small)
        return
    few, more = _few_layers(config, max(2, layers)), _few_layers(config, max(8, layers))
    inner = {**few, **{k: min(v, _WIDTH) for k, v in _numbers(few, _INNER)}, **_small_vocabulary(few)}
    yield {**few, **_narrow(few, num_heads, experts)}
    # For kinds of layers that alternate without a key in the config.
    yield {**more, **_narrow(more, num_heads, experts)}
    yield inner
    yield few


def _few_layers(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Enough layers for one of each kind, at least `count`."""
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
        # Names and flags are kinds; widths and layer numbers are not.
        kinds = {kind for kind in value if isinstance(kind, (str, int))}
        count = max(count, *(1 + value.index(kind) for kind in kinds)) if 0 < len(kinds) < total else count
    for _, value in _numbers(config, _PERIODS):
        count = max(count, min(value, total))
    if config_number(config, "num_kv_shared_layers") > 0:
        # Each kind of layer once with keys and values of its own, and once with those of another.
        count = max(count, 2 * count)
        small["num_kv_shared_layers"] = min(config["num_kv_shared_layers"], count // 2)
    count = min(count, total) if total else count
    dense = config.get("first_k_dense_replace")
    if type(dense) is int and dense > 0 and count < total:
        small["first_k_dense_replace"] = 1
    for key, value in _numbers(config, _LAYERS):
        small[key] = min(value, count)
    for key, value in by_layer.items():
        small[key] = value[:count]
    own = config.get("per_layer_config")
    if isinstance(own, Mapping):
        small["per_layer_config"] = {key: value for key, value in own.items() if int(key) < count}
    return small


def _narrow(config: Mapping[str, Any], num_heads: int, experts: int) -> dict[str, Any]:
    width = 8
    changes = _narrow_inside(config, experts)
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
        # Heads with their own width: the model's width is independent of them.
        changes |= {key: 64 for key, value in _numbers(config, _HIDDEN) if value == hidden[0]}
        changes["head_dim"] = min(width, head_dim)
    elif hidden and num_heads:
        # The width of the heads is the model's width divided by their number.
        changes |= {key: num_heads * width for key, value in _numbers(config, _HIDDEN) if value == hidden[0]}
    whole = head_dim if type(head_dim) is int else hidden[0] // num_heads if hidden and num_heads else 0
    changes |= _small_rotary_sections(config, whole, width)
    changes |= _small_latent(config, changes.get("head_dim", 0))
    changes |= _small_states(config, hidden[0] if hidden else 0, changes)
    return changes | {key: min(value, width) for key, value in _numbers(config, _HEAD_DIMS)}


def _small_latent(config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Narrow parts of the heads of latent attention, with different widths, for the new `head_dim`."""
    if not _numbers(config, ("qk_rope_head_dim",)):
        return {}
    small = {key: min(value, width) for name, width in _LATENT_WIDTHS for key, value in _numbers(config, (name,))}
    if config["qk_rope_head_dim"] == config.get("head_dim") and head_dim:
        # Only part of each head is rotated; transformers calls its width head_dim.
        small["qk_rope_head_dim"] = head_dim
    if config.get("qk_head_dim") == config["qk_rope_head_dim"] + config.get("qk_nope_head_dim", 0):
        small["qk_head_dim"] = small["qk_rope_head_dim"] + small.get("qk_nope_head_dim", 0)
    return small


def _small_states(config: Mapping[str, Any], hidden: int, narrowed: Mapping[str, Any]) -> dict[str, Any]:
    """Smaller states of a selective state space model, and heads that still add up to its width."""
    states = _numbers(config, _STATES)
    small = {key: min(value, 16) for key, value in states}
    if states:
        # Short chunks, so that the sample has more than one.
        small |= {key: min(value, 8) for key, value in _numbers(config, _CHUNKS)}
    new = next((narrowed[key] for key, value in _numbers(config, _HIDDEN) if value == hidden and key in narrowed), 0)
    for keys in _STATE_HEADS:
        heads, width, expand = (config[key] if type(config.get(key)) is int else 0 for key in keys)
        if new and heads and heads * width == expand * hidden:
            small[keys[1]] = max(1, expand * new // heads)
    return small


def _narrow_inside(config: Mapping[str, Any], experts: int = 1) -> dict[str, Any]:
    """Smaller inner widths, ranks, expert counts (at least `experts`) and vocabulary."""
    changes: dict[str, Any] = dict(_small_vocabulary(config))
    changes |= {key: min(value, _WIDTH) for key, value in _numbers(config, _INNER)}
    changes |= {
        key: [min(one, _WIDTH) for one in config[key]] for key in _INNER if isinstance(config.get(key), (list, tuple))
    }
    changes |= {key: min(value, 16) for key, value in _numbers(config, _RANKS)}
    groups = config.get("n_group")
    fewest = max(16, 2 * groups if type(groups) is int else 0, experts)
    if type(groups) is int and groups > 0:
        fewest = -(-fewest // groups) * groups  # groups of experts have equal sizes
    changes |= {key: min(value, fewest) for key, value in _numbers(config, _EXPERTS)}
    return changes


def _small_rotary_sections(config: Mapping[str, Any], whole: int, width: int) -> dict[str, Any]:
    """Sections of rotary frequencies (time, height, width) for heads of `width`; they add up to a part of a head."""
    small: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        rotary = config.get(key)
        sections = rotary.get("mrope_section") if isinstance(rotary, Mapping) else None
        if isinstance(sections, (list, tuple)) and len(sections) == 3 and whole > width:
            total = sum(sections) * width // whole
            small[key] = {**rotary, "mrope_section": [total - 2 * (total // 3), total // 3, total // 3]}  # type: ignore[dict-item]
    return small


def _small_vocabulary(config: Mapping[str, Any]) -> dict[str, Any]:
    """A vocabulary whose size no number of ranks divides, with the special ids inside it."""
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


POSITIONS = 64
"""Positions of a reference config; compared texts are shorter."""

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_LATENT = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
_WINDOWS = ("sliding_window", "attention_chunk_size")
_ROTARY = ("rope_parameters", "rope_scaling")
_LENGTH, _WINDOW, _HEAD_WIDTH = 16, 6, 32


def reference_configs(config: Mapping[str, Any], *, window: bool = True) -> Iterator[dict[str, Any]]:
    """Small configs of the same form, in which every effect of the text's length occurs within `POSITIONS` tokens.

    They have at most 4 heads of at most 32 elements, which share keys and values as in `config`. Sliding windows, and the
    length after which LongRoPE and dynamic NTK change, become short. Two of `shrunk_configs` follow, for other families.

    Args:
        config: A text model's config.
        window: Whether sliding windows become short, or longer than any compared text.
    """
    narrowed = _few_heads(config)
    few = [_few_layers(narrowed, 2), _few_layers(narrowed, 8)]
    heads = next((value for _, value in _numbers(config, _HEADS)), 0)
    inside = [{**one, **_narrow_inside(one)} for one in few]
    # Some families compute their inner width from the hidden one.
    inner = [(key, value) for key, value in _numbers(few[0], _INNER)]
    hidden = next((value for _, value in _numbers(config, _HIDDEN)), 0)
    new = next((value for _, value in _numbers(few[0], _HIDDEN)), 0)
    inside.append({**inside[0], **{key: value * new // hidden for key, value in inner if hidden}})
    for small in (*inside, *islice(shrunk_configs(config, heads), 2)):
        changes: dict[str, Any] = {key: _WINDOW if window else 4 * POSITIONS for key, _ in _numbers(small, _WINDOWS)}
        kinds = {kind for _, rotary in _rotary_forms(small) for kind in (rotary.get("rope_type"), rotary.get("type"))}
        positions = _LENGTH if "dynamic" in kinds else POSITIONS
        changes |= {key: min(value, positions) for key, value in _numbers(small, _POSITIONS)}
        if kinds & {"longrope", "su"}:
            changes |= _short_longrope(small)
        yield {**small, **changes}


def with_short_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose sliding windows, if it has any, are at most as long as those of `reference_configs`."""
    return {**config, **{key: min(value, _WINDOW) for key, value in _numbers(config, _WINDOWS)}}


def _few_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of at most 4 heads, and of the widths that follow from them."""
    heads = next((value for _, value in _numbers(config, _HEADS)), 0)
    shared = next((value for _, value in _numbers(config, _KV_HEADS)), heads)
    hidden = next((value for _, value in _numbers(config, _HIDDEN)), 0)
    if not heads or not hidden:
        return dict(config)
    own = next((value for _, value in _numbers(config, ("head_dim",))), 0)
    width = own or hidden // heads
    few, new_width = min(heads, 4), min(width, _HEAD_WIDTH)
    changes: dict[str, Any] = {key: few for key, value in _numbers(config, _HEADS) if value == heads}
    kv_heads = few if shared == heads else min(shared, 2)
    changes |= {key: kv_heads for key, value in _numbers(config, _KV_HEADS)}
    changes |= {key: few * new_width for key, value in _numbers(config, _HIDDEN) if value == hidden}
    if "head_dim" in config:
        changes["head_dim"] = new_width
    changes |= {key: max(2, value * new_width // width) for key, value in _numbers(config, ("rotary_dim",))}
    latent = {key: min(value, _HEAD_WIDTH) for key, value in _numbers(config, _LATENT)}
    if "qk_rope_head_dim" in latent:
        # Only part of each head is rotated; transformers calls its width head_dim.
        width, new_width = config["qk_rope_head_dim"], latent["qk_rope_head_dim"]
        changes |= {key: new_width for key in ("head_dim",) if key in config}
        changes |= {key: new_width + latent["qk_nope_head_dim"] for key in ("qk_head_dim",) if key in config}
    changes |= latent
    for key, value in config.items():
        if key in _ROTARY and isinstance(value, Mapping):
            changes[key] = _narrow_rotary(value, new_width / width)
    return {**config, **changes}


def _narrow_rotary(rotary: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Rotary parameters for narrower heads: lists with a number for each rotated pair become shorter."""
    changes: dict[str, Any] = {}
    for key, value in rotary.items():
        if isinstance(value, Mapping):
            changes[key] = _narrow_rotary(value, share)
        elif key in ("short_factor", "long_factor") and isinstance(value, (list, tuple)):
            count = round(len(value) * share)
            changes[key] = [value[i * len(value) // count] for i in range(count)]
        elif key == "mrope_section" and isinstance(value, (list, tuple)) and len(value) == 3:
            total, first, second = (round(part * share) for part in (sum(value), value[0], value[1]))
            changes[key] = [first, second, total - first - second]
    return {**rotary, **changes}


def _rotary_forms(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in _ROTARY:
        value = config.get(key)
        if isinstance(value, Mapping):
            yield key, value
            yield from ((key, part) for part in value.values() if isinstance(part, Mapping))


def _short_longrope(config: Mapping[str, Any]) -> dict[str, Any]:
    """LongRoPE that changes within the compared text, with the same ratio of lengths, which determines its scale."""
    original = max(
        (value for _, value in _numbers(config, ("original_max_position_embeddings",))),
        default=max((n for _, form in _rotary_forms(config) for _, n in _numbers(form, ("original_max_position_embeddings",))),
                    default=0),
    )  # fmt: skip
    if not original:
        return {}

    def short(rotary: Mapping[str, Any]) -> dict[str, Any]:
        nested = {key: short(value) for key, value in rotary.items() if isinstance(value, Mapping)}
        own = {"original_max_position_embeddings": _LENGTH} if "original_max_position_embeddings" in rotary else {}
        return {**rotary, **nested, **own}

    changes: dict[str, Any] = {key: short(config[key]) for key in _ROTARY if isinstance(config.get(key), Mapping)}
    changes |= {key: _LENGTH for key, _ in _numbers(config, ("original_max_position_embeddings",))}
    changes |= {key: max(_LENGTH, value * _LENGTH // original) for key, value in _numbers(config, _POSITIONS)}
    return changes
