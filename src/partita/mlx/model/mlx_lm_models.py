"""mlx-lm's models: built from a config without evaluating anything, so without weights in memory."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.nn as nn

from partita.core.model.spec import (
    DTYPE_BYTES,
    ModelSpec,
    TensorSpec,
    config_dtype,
    config_heads,
    config_number,
    find_layers,
    spec_from_tensors,
    text_config,
)
from partita.core.sharding.rules import MLX_PROVEN, MLX_TABLES, MLX_USUAL, Rules, isolated_rules, rules_for
from partita.errors import DependencyError, ModelError
from partita.mlx.layers.inner import dense_width, is_quantized
from partita.mlx.mlx_lm_internals import arguments_of, classes_of, family_of, module_name, new_model
from partita.mlx.model.config import check_activation, check_family, check_rope
from partita.mlx.model.parts import is_packed, parameter_homes
from partita.mlx.model.rotary import correct_rotary
from partita.mlx.model.tree import named_modules


def model_classes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's model of a config and the class of its arguments.

    Raises:
        ModelError: The installed mlx-lm has none, or none that can be imported.
    """
    family = config["model_type"]
    if config.get("model_file") is not None:
        raise ModelError(
            f"the model ({family}) comes with its own code ({config['model_file']}), which is not run on "
            "MLX, even with --trust-remote-code: Partita splits only mlx-lm's own models there. Use a family that mlx-lm "
            "supports, or --engine torch."
        )
    names = config.get("architectures") or ()
    module = module_name(family, [names] if isinstance(names, str) else names)
    try:
        return classes_of(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise ModelError(f"mlx-lm's {family} needs {error.name}, which is not installed.") from error
        raise ModelError(
            f"the installed mlx-lm has no model for {family}. mlx_lm/models lists the supported ones."
        ) from error
    except (ImportError, AttributeError, SystemExit) as error:
        raise ModelError(
            f"mlx-lm's {family} cannot be imported here ({error}). It needs an additional package."
        ) from error


def build(config: Mapping[str, Any]) -> nn.Module:
    """The unsplit model of a config, in eval mode. Its weights are not evaluated, so they take no memory yet.

    If the config is quantized, every layer that supports it is; a checkpoint may override this (`quantize`).

    Raises:
        ModelError: mlx-lm has no such model, or cannot build it from this config.
    """
    cls, arguments = model_classes(config)
    check_family(config)
    check_rope(config, arguments)
    check_activation(config, arguments)
    try:
        model = new_model(cls, arguments, _completed(copy.deepcopy(dict(config)), arguments))
    except DependencyError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"mlx-lm cannot build {config['model_type']} from its config: {describe(error)}") from error
    correct_rotary(model, config)
    return model.eval()


def _completed(config: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """A config with the keys that transformers may omit but some of mlx-lm's arguments require."""
    fields = {field.name for field in dataclasses.fields(arguments)} if dataclasses.is_dataclass(arguments) else set()
    hidden, heads = config_number(config, "hidden_size"), config_number(config, "num_attention_heads")
    if "head_dim" in fields and config.get("head_dim") is None and hidden and heads:
        config["head_dim"] = hidden // heads
    if "rope_scaling" in fields:
        config.setdefault("rope_scaling", None)
    return config


def quantize(
    model: nn.Module, config: Mapping[str, Any], choose: Callable[[str, nn.Module], Any] | None = None
) -> None:
    """Quantize the layers of an unsplit model as `config["quantization"]` defines. Nothing is evaluated.

    Args:
        model: The model, modified in place.
        config: The config. Without `quantization`, nothing is done.
        choose: Maps a path and a module that the config does not name to its quantization, or False (default: like the
            others, if its inputs are a multiple of the group size).
    """
    settings = config.get("quantization")
    if not isinstance(settings, Mapping):
        return
    group_size = settings["group_size"]

    def predicate(path: str, module: nn.Module) -> Any:
        if path in settings:
            return settings[path]
        if not hasattr(module, "to_quantized") or "weight" not in module:
            return False
        return choose(path, module) if choose is not None else module["weight"].shape[-1] % group_size == 0

    nn.quantize(model, group_size, settings["bits"], mode=settings.get("mode", "affine"), class_predicate=predicate)


def describe(error: BaseException) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')[:200] if lines else 'no message'}."


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config of an mlx-lm model with all defaults, as plain data; {} if it stores none."""
    arguments = arguments_of(model)
    if not dataclasses.is_dataclass(arguments) or isinstance(arguments, type):
        return {}
    config: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(arguments), default=str))
    config.setdefault("model_type", getattr(model, "model_type", None) or family_of(type(model)))
    quantized = {path: m for path, m in named_modules(model).items() if is_quantized(m)}
    if quantized:
        config["quantization"] = {
            "group_size": math.lcm(*(m.group_size for m in quantized.values())),
            "bits": max(m.bits for m in quantized.values()),
            "mode": next(iter(quantized.values())).mode,
        }
    return config


def spec_of(model: nn.Module, config: Mapping[str, Any] | None = None) -> ModelSpec:
    """The `ModelSpec` of an unsplit model, quantized or not, with the shapes of unpacked weights. Nothing is evaluated.

    Args:
        model: An mlx-lm model.
        config: The config that it was built from; missing values come from the model's arguments.
    """
    own = config_of(model)
    data = {**own, **(config or {})}
    data.update({"quantization": own["quantization"]} if "quantization" in own else {})
    tensors = {}
    modules = named_modules(model)
    for name, (home, attribute) in parameter_homes(model).items():
        if not is_packed(home, attribute):
            tensors[name] = TensorSpec(name, tuple(home[attribute].shape))
        elif attribute == "weight":
            shape = (*home["weight"].shape[:-1], dense_width(home))
            # A scale and a bias per group in the model's dtype, or a scale of one byte.
            extra_bits = 16 * DTYPE_BYTES[config_dtype(data)] if home.mode == "affine" else 8
            tensors[name] = TensorSpec(name, shape, packed_bits=home.bits + extra_bits / home.group_size)
    heads = config_heads(data)
    if not heads[0]:
        heads = config_heads({**text_config(data), **text_config(own)})
    layers, num_layers = find_layers(list(tensors))
    return spec_from_tensors(
        tensors,
        data,
        family=str(data.get("model_type") or family_of(type(model))),
        architecture=_architecture(data),
        layers=layers,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        vocab_size=config_number(text_config(data), "vocab_size") or _rows_of_embedding(modules),
        dtype=config_dtype(data),
        linears=frozenset(path for path, m in modules.items() if type(m) in (nn.Linear, nn.QuantizedLinear)),
    )


def _rows_of_embedding(modules: Mapping[str, nn.Module]) -> int:
    """Number of rows of a model's first embedding; 0 if it has none."""
    return next(
        (int(m["weight"].shape[0]) for m in modules.values() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))), 0
    )


def rules_of(spec: ModelSpec) -> Rules:
    """The rules of a model: our table for its family, else rules for the usual names.

    If these match no module of the model's layers, every linear layer is split by itself.
    """
    rules = rules_for(spec, tables=MLX_TABLES, proven=MLX_PROVEN, usual=MLX_USUAL)
    if any(rules.find(path) is not None for path in spec.modules if spec.layer_of(path) is not None):
        return rules
    return isolated_rules(spec)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
