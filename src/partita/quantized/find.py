"""Which weights of a checkpoint are quantized, as its config says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from partita.checkpoint.header import brief
from partita.checkpoint.index import Checkpoint
from partita.checkpoint.unused import Unused
from partita.core.model.quantization import method_of, settings_of
from partita.errors import ModelError
from partita.quantized.bitsandbytes import bitsandbytes_weights
from partita.quantized.compressed import compressed_weights, has_activations
from partita.quantized.fp8 import fp8_weights
from partita.quantized.ggml import ggml_weights
from partita.quantized.gptq import awq_weights, gptq_weights
from partita.quantized.mlx import mlx_weights
from partita.quantized.mxfp4 import mxfp4_weights
from partita.quantized.weight import Infos, QuantizedWeight

Find = Callable[[Infos, Mapping[str, Any]], list[QuantizedWeight]]

METHODS: Mapping[str, Find] = MappingProxyType(
    {
        "fp8": fp8_weights, "fbgemm_fp8": fp8_weights, "gptq": gptq_weights, "awq": awq_weights,
        "compressed-tensors": compressed_weights, "bitsandbytes": bitsandbytes_weights, "mxfp4": mxfp4_weights,
        "MLX": mlx_weights, "gguf": ggml_weights,
    }
)  # fmt: skip
"""The methods that can be read: `quant_method` -> the function that finds their weights."""


def quantized_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Mapping[str, QuantizedWeight]:
    """The quantized weights of a checkpoint by their names as if they were not quantized; empty if there are none.

    Args:
        checkpoint: The checkpoint.
        config: Its config as plain data.

    Raises:
        ModelError: The method cannot be read.
        CheckpointError: The files do not agree with the config.
    """
    method = method_of(config)
    if not method:
        return {}
    find = METHODS.get(method)
    if find is None:
        raise ModelError(
            f"{checkpoint.folder} is quantized ({method}), which cannot be read: {', '.join(METHODS)} can. "
            "Dequantize it (transformers: model.dequantize()), save that, and load it."
        )
    found = {weight.name: weight for weight in find(checkpoint.tensors, _settings(config))}
    for name, weight in found.items():
        if name in checkpoint.tensors and name not in weight.tensors:
            raise ModelError(f"{checkpoint.folder}: {brief(name)} is there plain and quantized. Remove one of them.")
    return MappingProxyType(found)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization that a config names, MLX's first."""
    mlx = config.get("quantization")
    return mlx if isinstance(mlx, Mapping) and mlx else settings_of(config) or {}


def quantization_note(config: Mapping[str, Any]) -> str:
    """The note to print when quantized weights are loaded; empty if the method's own package computes the same."""
    said = _quantized_inputs(method_of(config), _settings(config))
    if said is None:
        return ""
    key, package = said
    return (
        f"config.json also quantizes the inputs of layers ({key}), which is not done here: results differ from those of "
        f"{package}, which rounds more."
    )


def _quantized_inputs(method: str, settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """Which setting quantizes the inputs of layers, and whose results therefore differ; None if they stay as they are."""
    if method == "compressed-tensors" and has_activations(settings):
        return "input_activations", "compressed-tensors"
    if method == "fp8":
        return f"activation_scheme {settings.get('activation_scheme') or 'dynamic'}", "transformers on a GPU"
    if method == "fbgemm_fp8":
        return "fbgemm_fp8, for every token", "FBGEMM"
    if method == "bitsandbytes" and settings.get("load_in_8bit"):
        return "load_in_8bit, for every token", "bitsandbytes"
    return None


def stored_shapes(checkpoint: Checkpoint, quantized: Mapping[str, QuantizedWeight]) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors by name, as if no weight were quantized."""
    parts = parts_of(quantized)
    plain = {name: info.shape for name, info in checkpoint.tensors.items() if name not in parts}
    return plain | {name: weight.shape for name, weight in quantized.items()}


def parts_of(quantized: Mapping[str, QuantizedWeight]) -> frozenset[str]:
    """The tensors on disk that quantized weights consist of."""
    return frozenset(name for weight in quantized.values() for name in weight.tensors)


@dataclass(frozen=True)
class KeptQuantized:
    """What a save needs to write quantized weights unchanged.

    Attributes:
        files: Their tensors on disk.
        weights: Their names as if they were not quantized.
        settings: The quantization of the config.
        form: The form in words.
    """

    files: Unused
    weights: frozenset[str]
    settings: Mapping[str, Any]
    form: str


def kept_quantized(
    checkpoint: Checkpoint, quantized: Mapping[str, QuantizedWeight], config: Mapping[str, Any]
) -> KeptQuantized | None:
    """What a save needs to write the quantized weights of a checkpoint unchanged; None if there are none.

    Those of a GGUF file are saved as values: safetensors has no form for them.
    """
    if not quantized or method_of(config) == "gguf":
        return None
    files = Unused(checkpoint.folder, {name: checkpoint.tensors[name] for name in sorted(parts_of(quantized))})
    return KeptQuantized(files, frozenset(quantized), _settings(config), next(iter(quantized.values())).form)
