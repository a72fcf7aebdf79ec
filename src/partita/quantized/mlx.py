"""Weights of MLX's folders: `weight` [outputs, inputs * bits / 32] in 32-bit words, with scales of groups of inputs.

`affine` adds `biases` after the scale. `mxfp4` and `mxfp8` have exponents as scales (E8M0), `nvfp4` eight-bit floats (E4M3).
Layouts: mlx 0.32, `mlx.core.quantize`, which packs the lowest bits first. Experts are one tensor of mlx-lm's `switch_mlp`; here
each is a weight of its own, with the name that it has in transformers' folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from partita.checkpoint.header import TensorInfo, brief
from partita.errors import CheckpointError, ModelError
from partita.quantized.array import Encoding
from partita.quantized.mxfp4 import FP4_VALUES
from partita.quantized.packed import GroupedWeight, Matrix, Packed
from partita.quantized.weight import Infos, QuantizedWeight

_MODES = {"affine": (64, 4, ""), "mxfp4": (32, 4, "F8_E8M0"), "nvfp4": (16, 4, "F8_E4M3"), "mxfp8": (32, 8, "F8_E8M0")}
"""The modes: the usual inputs of a group, the bits, and the dtype of scales that are stored as bytes."""

_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def mlx_weights(infos: Infos, config: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The weights of a folder with MLX's `quantization`: each `weight` with `scales` beside it.

    Raises:
        ModelError: A weight has a form that cannot be read.
        CheckpointError: Its tensors do not agree with the config.
    """
    found: list[QuantizedWeight] = []
    for name, info in infos.items():
        path, _, attribute = name.rpartition(".")
        if attribute != "weight" or f"{path}.scales" not in infos:
            continue
        own = config.get(path)
        found.extend(_weights(infos, info, path, {**config, **own} if isinstance(own, Mapping) else config))
    return found


def _weights(infos: Infos, info: TensorInfo, path: str, config: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The weight of a layer, or those of its experts."""
    mode = config.get("mode") or "affine"
    if mode not in _MODES:
        raise ModelError(
            f"quantization: mode must be one of {', '.join(_MODES)} to be read, but is {mode!r:.40}. Dequantize the model "
            "(mlx_lm.convert --dequantize), and load that."
        )
    usual_group, usual_bits, scale_dtype = _MODES[mode]
    group, bits = config.get("group_size", usual_group), config.get("bits", usual_bits)
    scales, biases = infos[f"{path}.scales"], infos.get(f"{path}.biases")
    parts = [info, scales, *([biases] if biases is not None else [])]
    lead = info.shape[:-2]
    inputs = scales.shape[-1] * group if type(group) is int and scales.shape else 0
    if (
        type(bits) is not int or not 1 <= bits <= 8 or len(info.shape) not in (2, 3) or info.dtype != "U32" or inputs < 1
        or info.shape[-1] * 32 != inputs * bits or any(part.shape[:-1] != info.shape[:-1] for part in parts)
        or (mode == "affine") != (biases is not None) or (biases is not None and biases.shape != scales.shape)
    ):  # fmt: skip
        seen = ", ".join(f"{part.name.removeprefix(path + '.')} {part.dtype} {part.shape}" for part in parts)
        raise CheckpointError(
            f"{info.file}: {brief(path)} ({seen}) is not a weight of {bits} bits in groups of {group} in the mode {mode}. "
            "Correct quantization in config.json."
        )
    encoding = Encoding("ints", bits)
    if mode != "affine":
        encoding = Encoding("bytes", dtype="F8_E4M3") if bits == 8 else Encoding("table", 4, table=FP4_VALUES)
    size = (info.shape[-2], inputs)
    form = f"MLX{'' if mode == 'affine' else ' ' + mode}, {bits} bits, groups of {group}"
    names = _names(path, lead[0]) if lead else [info.name]
    return [
        GroupedWeight(
            name, form, size, Packed(info, size, bits, expert=expert), encoding,
            Matrix(scales, dtype=scale_dtype, expert=expert), tuple(part.name for part in parts), group=group,
            biases=Matrix(biases, expert=expert) if biases is not None else None,
        )
        for expert, name in zip(range(lead[0]) if lead else [None], names, strict=True)
    ]  # fmt: skip


def _names(path: str, experts: int) -> list[str]:
    """The names that the experts of a stacked layer of mlx-lm have in transformers' folders."""
    parent, _, layer = path.rpartition(".")
    outer, _, kind = parent.rpartition(".")
    if kind != "switch_mlp":
        raise ModelError(
            f"{path} holds the matrices of several experts or heads as mlx-lm arranges them, which torch cannot read. Load the "
            "folder on MLX (--engine mlx), or load the model's original folder."
        )
    layer = _MIXTRAL.get(layer, layer) if outer.endswith("block_sparse_moe") else layer
    return [f"{outer}.experts.{expert}.{layer}.weight" for expert in range(experts)]
