"""Sliding windows that mlx-lm ignores.

mlx-lm runs some families whose attention has a sliding window without it: each token then attends to all earlier tokens. Up to
the window the result is the same; beyond it the result is silently wrong. `tests/parity/test_windows.py` determines these
families by comparison with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from partita.core.model.spec import ModelSpec, config_number, text_config
from partita.errors import ModelError
from partita.mlx.model.config import WINDOWS

_Config = Mapping[str, Any]


def _everywhere(config: _Config) -> bool:
    return True


def _everywhere_if_used(config: _Config) -> bool:
    return config.get("use_sliding_window") is True


def _on_odd_layers(config: _Config) -> bool:
    return _named(config, True)


def _on_first_layers_if_used(config: _Config) -> bool:
    return _everywhere_if_used(config) and _named(config, _max_window_layers(config, 28) > 0)


def _on_last_layers_if_used(config: _Config) -> bool:
    return _everywhere_if_used(config) and _behind(config, 28)


def _on_last_layers(config: _Config) -> bool:
    return _behind(config, 62)


def _behind(config: _Config, default: int) -> bool:
    return _named(config, _max_window_layers(config, default) < config_number(config, "num_hidden_layers"))


def _max_window_layers(config: _Config, default: int) -> int:
    count = config.get("max_window_layers")
    return count if type(count) is int else default


def _named(config: _Config, otherwise: bool) -> bool:
    """Whether `layer_types` names a layer with a window; `otherwise` if it is missing."""
    kinds = config.get("layer_types")
    return "sliding_attention" in kinds if isinstance(kinds, (list, tuple)) else otherwise


LEFT_OUT: Mapping[str, Callable[[_Config], bool]] = MappingProxyType(
    {
        **dict.fromkeys(("mistral", "ministral3", "mixtral", "starcoder2", "phi3", "phimoe"), _everywhere),
        "qwen3_moe": _everywhere_if_used,
        "gemma2": _on_odd_layers,
        "qwen2_moe": _on_first_layers_if_used,
        **dict.fromkeys(("qwen2", "qwen2_vl", "qwen2_vl_text", "qwen3"), _on_last_layers_if_used),
        "dots1": _on_last_layers,
    }
)
"""Families whose window mlx-lm ignores, with a test whether transformers uses a config's window in any layer."""


def window_left_out(config: _Config) -> int | None:
    """The sliding window of a config, in tokens, that mlx-lm's model ignores; None if there is none."""
    text = text_config(config)
    family = str(text.get("model_type") or config.get("model_type"))
    has_window = LEFT_OUT.get(family)
    window = text.get("sliding_window", WINDOWS.get(family))
    if has_window is None or type(window) is not int or window < 1 or not has_window(text):
        return None
    return window


def refuse_beyond_window(spec: ModelSpec, length: int, what: str) -> None:
    """Raise if mlx-lm's results would differ from the trained model.

    Args:
        spec: The model's spec.
        length: Length of the text in tokens.
        what: Description of the text for the message: `a prompt of 10 tokens and 20 new ones`.

    Raises:
        ModelError: The text is longer than a sliding window that mlx-lm ignores.
    """
    window = window_left_out(spec.config)
    if window is not None and length > window:
        raise ModelError(
            f"mlx-lm runs {spec.family} without its sliding window of {window} tokens, so longer texts give wrong "
            f"results, but {what} is {length} tokens. Use at most {window} tokens, or use the torch engine (--engine torch)."
        )
