"""A model's config as mlx-lm reads it: values that newer versions of transformers write under other keys are renamed.

mlx-lm replaces a missing key by its own default, which may differ from transformers', which defines the checkpoint: its
Llama ties the embeddings, its Qwen2 has another rotary base. So missing keys are filled in. transformers 5 writes
`rope_parameters` in place of `rope_theta` and `rope_scaling`, so mlx-lm would silently compute with another base than was
trained.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from partita.checkpoint.index import Checkpoint, open_checkpoint
from partita.core.model.quantization import settings_of
from partita.core.model.spec import read_config, text_config
from partita.errors import CheckpointError, DependencyError, ModelError
from partita.mlx.mlx_lm_internals import config_class, quiet
from partita.quantized.find import METHODS, quantized_weights
from partita.quantized.weight import QuantizedWeight

FORMATS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    }
)
"""`quant_method`s of transformers that are modes of `mx.quantize` of the same name."""

_OTHER_NAMES = (
    ("n_ctx", "n_positions"),
    ("num_experts", "num_local_experts"),
    ("num_local_experts", "num_experts"),
    ("sliding_window_pattern", "_sliding_window_pattern"),
)
"""Keys that mlx-lm reads, and the keys under which transformers writes the same value."""

WINDOWS: Mapping[str, int] = MappingProxyType({"mistral": 4096, "gemma2": 4096, "dots1": 4096})
"""transformers' default sliding window, by family, for configs without one."""


def read_mlx_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read a model's config in mlx-lm's form from plain data, a `config.json` or a folder with one.

    Raises:
        ModelError: It cannot be read, or it is quantized in a way that mlx-lm must convert first.
    """
    config = plain_numbers(read_config(source))
    _add_tie(config, source)
    _complete(config)
    _rename(config)
    for part in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(part), dict):
            _rename(config[part])
            _add_window(config[part])
    _add_window(config)
    _name_quantization(config)
    return config


def plain_numbers(value: Any) -> Any:
    """A copy in which values such as `{"__float__": "Infinity"}`, which transformers writes, are numbers."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: plain_numbers(item) for key, item in value.items()}
    return [plain_numbers(item) for item in value] if isinstance(value, (list, tuple)) else value


def _add_tie(config: dict[str, Any], source: str | Path | Mapping[str, Any]) -> None:
    """If the config does not define whether the head is tied, decide by whether the weights on disk have a head."""
    if isinstance(source, Mapping) or not Path(source).is_dir() or "tie_word_embeddings" in text_config(config):
        return
    try:
        names = open_checkpoint(Path(source)).tensors
    except CheckpointError:
        return  # a config without weights, or weights that raise when they are read
    part: Any = text_config(config)
    part["tie_word_embeddings"] = not any(HEAD.search(name) for name in names)


HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
"""Names of heads."""


def _complete(config: dict[str, Any]) -> None:
    """Fill in transformers' defaults for missing keys, if transformers supports the family."""
    known = transformers_config(config)
    if known is not None:
        _fill(config, plain_numbers(known.to_dict()))


def transformers_config(config: Mapping[str, Any]) -> Any:
    """The config as transformers' own class reads it, without torch; None if transformers lacks the family or rejects it."""
    try:
        with quiet():
            return config_class(config["model_type"]).from_dict(_without_old_rotary_keys(config))
    except DependencyError:
        raise
    except Exception:
        return None


def _without_old_rotary_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without `rope_scaling` if it has `rope_parameters`, since transformers would prefer the old key."""
    old = {"rope_scaling"} if isinstance(config.get("rope_parameters"), Mapping) else set()
    return {
        key: _without_old_rotary_keys(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in copy.deepcopy(dict(config)).items()
        if key not in old
    }


def _fill(config: dict[str, Any], whole: Mapping[str, Any]) -> None:
    has_rope = any(name in config for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    for name, value in whole.items():
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            if name.endswith("_config") and name != "quantization_config":
                _fill(config[name], value)
        elif name not in config and (
            isinstance(value, bool | int | float | str) or (name == "rope_parameters" and not has_rope)
        ):
            config[name] = value


def _rename(config: dict[str, Any]) -> None:
    for name, other in _OTHER_NAMES:
        if config.get(name) is None and config.get(other) is not None:
            config[name] = config[other]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    full = rope.get("full_attention", rope)
    for name, value in _rope_keys(full).items():
        if config.get(name) is None:
            config[name] = value
    sliding = rope.get("sliding_attention")
    if isinstance(sliding, dict) and config.get("rope_local_base_freq") is None and "rope_theta" in sliding:
        config["rope_local_base_freq"] = sliding["rope_theta"]


def _add_window(config: dict[str, Any]) -> None:
    """Set the window explicitly: mlx-lm's arguments cannot distinguish a missing window from a disabled one."""
    if config.get("model_type") in WINDOWS:
        config.setdefault("sliding_window", WINDOWS[config["model_type"]])


def _rope_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters under the keys that transformers wrote before version 5."""
    keys: dict[str, Any] = {}
    if "rope_theta" in rope:
        keys |= {"rope_theta": rope["rope_theta"], "rotary_emb_base": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        keys |= {
            "partial_rotary_factor": rope["partial_rotary_factor"],
            "rotary_pct": rope["partial_rotary_factor"],
        }
    kind = rope.get("rope_type", "default")
    if kind != "default":
        keys["rope_scaling"] = {**rope, "type": kind}
    return keys


COMPUTED_OTHERWISE: Mapping[str, str] = MappingProxyType(
    {
        "glm": "mlx-lm rotates whole heads, where the model rotates half of each",
        "afmoe": "mlx-lm's logits differ from transformers'",
    }
)
"""mlx-lm families whose results differ from transformers' for the same weights, measured on small models."""


def check_family(config: Mapping[str, Any]) -> None:
    """Check that mlx-lm computes the model that was trained.

    Raises:
        ModelError: It computes something else.
    """
    why = COMPUTED_OTHERWISE.get(config["model_type"])
    if why is not None:
        raise ModelError(f"{config['model_type']} would give different results on MLX: {why}. Use the torch engine.")


def check_rope(config: Mapping[str, Any], arguments: Any) -> None:
    """Check that mlx-lm's `arguments` of a model can express its rotary bases.

    Raises:
        ModelError: Layer types have different bases, the arguments have no field for them, and the config does not define
            each layer's type.
    """
    text = text_config(config)
    rope = text.get("rope_parameters")
    fields = {field.name for field in dataclasses.fields(arguments)} if dataclasses.is_dataclass(arguments) else set()
    if not isinstance(rope, Mapping) or text is not config or {"rope_parameters", "text_config"} & fields:
        return
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)]
    if isinstance(getattr(transformers_config(config), "layer_types", None), list):
        return  # correct_rotary sets the base of each layer
    if any(kind != kinds[0] for kind in kinds) and "rope_local_base_freq" not in fields:
        raise ModelError(
            f"the layers of this {config['model_type']} have rotary embeddings of {len(kinds)} kinds, but mlx-lm's model "
            "supports one only, so it would give different results. Use the torch engine."
        )


def check_activation(config: Mapping[str, Any], arguments: Any) -> None:
    """Check that the config's activation is the one built into mlx-lm's model.

    Raises:
        ModelError: It differs from the family's usual one, and mlx-lm's `arguments` and model do not support it.
    """
    text = text_config(config)
    fields = {field.name for field in dataclasses.fields(arguments)} if dataclasses.is_dataclass(arguments) else set()
    try:
        with quiet():
            usual = config_class(text["model_type"])()
    except DependencyError:
        raise
    except Exception:  # transformers does not support the family
        return
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        asked, known = text.get(name), getattr(usual, name, None)
        if not isinstance(asked, str) or not isinstance(known, str) or _alike(asked) == _alike(known) or name in fields:
            continue
        if asked not in inspect.getsource(sys.modules[arguments.__module__]):
            raise ModelError(
                f"the config of this {config['model_type']} has {name} {asked!r}, but mlx-lm's model always computes "
                f"{known!r}. Use the torch engine."
            )


def _alike(activation: str) -> str:
    """A canonical name of an activation that has several names, or of one that differs by rounding only."""
    same = {"swish": "silu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}
    return same.get(activation, activation)


def _name_quantization(config: dict[str, Any]) -> None:
    quantized = settings_of(config)
    if not quantized or "quantization" in config:
        return
    method = str(quantized.get("quant_method") or "")
    if method in FORMATS:
        config["quantization"] = dict(FORMATS[method])
    elif method not in METHODS:
        raise ModelError(
            f"the model is quantized by {method or 'an unknown method'}, which MLX does not support. Convert it with "
            "mlx_lm.convert, and use the result."
        )


def others_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Mapping[str, QuantizedWeight]:
    """The weights of a checkpoint that another package quantized; empty for MLX's own forms."""
    return {} if "quantization" in config else quantized_weights(checkpoint, config)
