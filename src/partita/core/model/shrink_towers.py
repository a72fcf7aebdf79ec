"""Shrink the towers in a multimodal model's config to fit its shrunk text model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_DEPTHS = (
    "num_hidden_layers",
    "depth",
    "num_layers",
    "encoder_layers",
    "n_layers",
    "num_blocks",
    "conf_num_hidden_layers",
)
_WIDTHS = ("hidden_size", "embed_dim", "d_model")
_INNER = ("intermediate_size", "encoder_ffn_dim", "ffn_dim", "mlp_dim")
_HEADS = ("num_attention_heads", "num_heads", "encoder_attention_heads", "n_heads")
_TOKEN = re.compile(r"(^|_)token_(id|index)$")
_HEAD_WIDTH = 8


def with_small_towers(config: Mapping[str, Any], text: str, small: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`config` with the text model's config `small` under the key `text` and smaller towers, as candidates to try in turn.

    Widths equal to the text model's stay equal to it. Ids of special tokens are moved into the small vocabulary.
    """
    old, new = config[text].get("hidden_size"), small.get("hidden_size")
    given = _with_small_ids({**config, text: dict(small)}, text, int(small.get("vocab_size") or 0))
    towers = [
        key for key, value in given.items() if key != text and key.endswith("_config") and isinstance(value, Mapping)
    ]
    given |= {key: new for key, value in given.items() if key in _LINKED and value == old and new is not None}
    for narrow in (True, False) if towers else (False,):
        shallow = {**given, **{key: _small_tower(given[key], old, new, narrow=narrow) for key in towers}}
        yield _with_small_images(shallow)
        yield shallow


def _with_small_images(config: dict[str, Any]) -> dict[str, Any]:
    """`config` for images of few patches."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return config
    side, patch = _side(vision.get("image_size")), _side(vision.get("patch_size"))
    small: dict[str, Any] = {**config, "vision_config": dict(vision)}
    # Patches are merged in squares.
    merges = [_side(part.get(key)) for part in (config, vision) for key in _MERGES if _side(part.get(key)) > 0]
    few = math.lcm(4, *merges)
    if side > few * patch > 0:
        new = few * patch
        size = vision["image_size"]
        small["vision_config"]["image_size"] = [new for _ in size] if isinstance(size, (list, tuple)) else new
        if isinstance(tiles := config.get("image_grid_pinpoints"), (list, tuple)):
            few_tiles = [[a // side * new, b // side * new] for a, b in tiles if a * b <= 4 * side * side]
            small["image_grid_pinpoints"] = few_tiles or tiles
        if type(config.get("mm_tokens_per_image")) is int:
            small["mm_tokens_per_image"] = min(config["mm_tokens_per_image"], 4)
    if type(vision.get("num_position_embeddings")) is int:
        small["vision_config"]["num_position_embeddings"] = min(vision["num_position_embeddings"], few**2)
    return small


_MERGES = ("spatial_merge_size", "scale_factor", "downsample_factor")


def _side(value: Any) -> int:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return first if type(first) is int else 0


_LINKED = ("hidden_size", "projection_dim", "out_hidden_size", "output_dim", "projector_output_dim", "text_hidden_size")
"""Keys that may hold the text model's width."""


def _small_tower(config: Mapping[str, Any], old: Any, new: Any, *, narrow: bool) -> dict[str, Any]:
    small = dict(config)
    linked = [key for key in (*_LINKED, *_WIDTHS) if config.get(key) == old and old is not None]
    deep = max((v for key, v in config.items() if key in _DEPTHS and type(v) is int), default=0)
    for key, value in config.items():
        if isinstance(value, (list, tuple)) and key.endswith("_indexes") and value and type(value[0]) is int:
            small[key] = [0] if max(value) > 1 else list(value)
        elif key in _DEPTHS and type(value) is int and value == deep:
            small[key] = min(value, 2)
    small |= dict.fromkeys(linked, new)
    if narrow:
        heads = next((config[key] for key in _HEADS if type(config.get(key)) is int), 0)
        for key in _WIDTHS:
            if heads and key not in linked and type(config.get(key)) is int and config[key] % heads == 0:
                small[key] = min(config[key], heads * _HEAD_WIDTH)
        if type(config.get("head_dim")) is int:
            small["head_dim"] = min(config["head_dim"], _HEAD_WIDTH)
        small |= {key: min(config[key], 48) for key in _INNER if type(config.get(key)) is int}
    return small


def _with_small_ids(config: dict[str, Any], text: str, vocabulary: int) -> dict[str, Any]:
    """The same special tokens with other ids, all below `vocabulary`; equal ids stay equal."""
    named = [v for part in (config, config[text]) for k, v in part.items() if _TOKEN.search(k) and type(v) is int]
    large = sorted({v for v in named if v >= vocabulary > 0})
    ids = {value: vocabulary - 1 - place for place, value in enumerate(large)}

    def renamed(part: Mapping[str, Any]) -> dict[str, Any]:
        return {k: ids.get(v, v) if _TOKEN.search(k) and type(v) is int else v for k, v in part.items()}

    return {**renamed(config), text: renamed(config[text])}
