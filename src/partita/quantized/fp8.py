"""Eight-bit weights beside their scales: FP8 as DeepSeek and Qwen publish it, per tensor, per channel or in blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from partita.checkpoint.header import TensorInfo, brief
from partita.errors import CheckpointError
from partita.quantized.weight import Grid, Infos, QuantizedWeight, ScaledBytes

EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")

_SCALES = ("weight_scale_inv", "weight_scale")


def fp8_weights(infos: Infos, config: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The weights of a checkpoint of `quant_method: fp8` or `fbgemm_fp8`: each `weight` with a `weight_scale_inv` or a
    `weight_scale` beside it, by which it is multiplied.

    Raises:
        CheckpointError: A weight has no scale, or scales of another shape than its blocks.
    """
    block = config.get("weight_block_size")
    found: list[QuantizedWeight] = []
    for name, info in infos.items():
        if info.dtype not in (*EIGHT_BITS, "U8") or len(info.shape) != 2:
            continue
        stem = name.removesuffix("weight")
        # Experts that are one tensor each have no attribute of their own.
        names = [f"{stem}{scale}" for scale in _SCALES] if stem != name else [f"{name}_scale_inv", f"{name}_scale"]
        scales = next((infos[one] for one in names if one in infos), None)
        if not info.dtype.startswith("F8"):
            if scales is None:
                continue
            raise CheckpointError(
                f"{info.file}: {brief(name)} with scales beside it must be F8_E4M3 or F8_E5M2 where quant_method is fp8, but "
                f"is {info.dtype}, whose values are unknown. Correct quantization_config in config.json, or download the "
                "checkpoint again."
            )
        if scales is None:
            raise CheckpointError(
                f"{info.file}: {brief(name)} is {info.dtype}, but has no scale beside it ({names[0]}), without which its "
                "values are unknown. The checkpoint is incomplete: download it again."
            )
        extra = tuple(one for one in (f"{stem}input_scale", f"{stem}activation_scale") if one in infos)
        found.append(ScaledBytes(name, _words(block), info, scale_grid(info, scales, block), extra=extra))
    return found


def scale_grid(info: TensorInfo, scales: TensorInfo, block: Any) -> Grid:
    """The grid of a weight's scales: one for all, one an output, or one a block of `block` rows and columns.

    Raises:
        CheckpointError: The shape is none of these.
    """
    rows, columns = info.shape
    if math.prod(scales.shape) == 1:
        return Grid(scales, 0, 0)
    if scales.shape in ((rows,), (rows, 1)):
        return Grid(scales, 1, 0)
    if isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        expected = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
        if scales.shape == expected:
            return Grid(scales, block[0], block[1])
        wanted = f"for blocks of {block[0]} x {block[1]} {expected}"
    else:
        wanted = f"(1,), ({rows},) or ({rows}, 1), and config.json names no weight_block_size"
    raise CheckpointError(
        f"{scales.file}: the shape of {brief(scales.name)} must be {wanted} for a weight of {info.shape}, but is "
        f"{scales.shape}. Correct quantization_config in config.json, or download the checkpoint again."
    )


def _words(block: Any) -> str:
    return f"fp8, blocks of {block[0]} x {block[1]}" if isinstance(block, list | tuple) and len(block) == 2 else "fp8"
