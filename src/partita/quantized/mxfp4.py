"""Experts of GPT-OSS in MXFP4: blocks of 32 elements of four bits that share an exponent [OCP Microscaling Formats 1.0].

`gate_up_proj_blocks` is [experts, outputs, inputs / 32, 16], two elements a byte, the first in the low bits, and
`gate_up_proj_scales` [experts, outputs, inputs / 32]. The model has `gate_up_proj` as [experts, inputs, outputs].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from partita.checkpoint.header import brief
from partita.errors import CheckpointError
from partita.quantized.array import Encoding
from partita.quantized.packed import GroupedWeight, Matrix, Packed
from partita.quantized.weight import Infos, QuantizedWeight

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the codes of FP4 (E2M1)."""

_BLOCK = 32


def mxfp4_weights(infos: Infos, config: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The weights of a checkpoint of `quant_method: mxfp4`: each `_blocks` with its `_scales`.

    Raises:
        CheckpointError: Scales are missing, or have another shape than their blocks.
    """
    found: list[QuantizedWeight] = []
    for name, info in infos.items():
        if not name.endswith("_blocks"):
            continue
        stem = name.removesuffix("_blocks")
        scales = infos.get(f"{stem}_scales")
        if (
            len(info.shape) != 4 or info.shape[3] != _BLOCK // 2 or info.dtype != "U8"
            or scales is None or scales.shape != info.shape[:3] or scales.dtype not in ("U8", "F8_E8M0")
        ):  # fmt: skip
            raise CheckpointError(
                f"{info.file}: {brief(name)} must be U8 [experts, outputs, blocks, 16] with U8 [experts, outputs, blocks] in "
                f"{brief(stem + '_scales')}, but is {info.dtype} {info.shape} with {scales.shape if scales else 'none'}. The "
                "checkpoint is incomplete: download it again."
            )
        experts, outputs, blocks, _ = info.shape
        size = (outputs, blocks * _BLOCK)
        codes = Packed(info, size, 4, per_block=_BLOCK, expert=-1)
        weight = GroupedWeight(
            stem, "mxfp4, groups of 32", size, codes, Encoding("table", 4, table=FP4_VALUES),
            Matrix(scales, dtype="F8_E8M0", expert=-1), (name, scales.name), group=_BLOCK, experts=experts, transposed=True,
        )  # fmt: skip
        found.append(weight)
    return found
