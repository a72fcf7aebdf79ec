"""Weights of GPTQ and AWQ: integers in 32-bit words beside the scales and zero points of groups of inputs.

GPTQ [Frantar et al., arXiv 2210.17323] packs along the inputs: `qweight [inputs * bits / 32, outputs]`, `scales [groups,
outputs]`, `qzeros [groups, outputs * bits / 32]` and, for each input, its group `g_idx [inputs]`. AWQ [Lin et al., arXiv
2306.00978] packs along the outputs (`gemm`), eight in the order 0 2 4 6 1 3 5 7, or along the inputs with everything stored as
[outputs, inputs] (`gemv`). Layouts: gptqmodel 7.7 (`qlinear/torch.py`, `utils/model.py`) and autoawq 0.2.9 (`modules/linear`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from partita.checkpoint.header import TensorInfo, brief
from partita.errors import CheckpointError, ModelError
from partita.quantized.array import Encoding
from partita.quantized.packed import GroupedWeight, Matrix, Packed
from partita.quantized.weight import Infos, QuantizedWeight

_GPTQ_BITS = (2, 3, 4, 8)
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ stores each of eight outputs in their word."""


def gptq_weights(infos: Infos, config: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The weights of a checkpoint of `quant_method: gptq`: each `qweight` with what is beside it.

    Raises:
        ModelError: The config names a form that cannot be read.
        CheckpointError: Tensors are missing, or their shapes do not agree.
    """
    checkpoint_format = config.get("checkpoint_format") or "gptq"
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ModelError(
            f"quantization_config: checkpoint_format must be gptq or gptq_v2 to be read, but is {checkpoint_format!r:.60}. "
            "Convert the checkpoint with gptqmodel to one of them."
        )
    return [_gptq(infos, info, config, checkpoint_format == "gptq") for info in _qweights(infos)]


def _qweights(infos: Infos) -> list[TensorInfo]:
    return [info for name, info in infos.items() if name.rpartition(".")[2] == "qweight"]


def _gptq(infos: Infos, qweight: TensorInfo, config: Mapping[str, Any], minus_one: bool) -> QuantizedWeight:
    stem = qweight.name.removesuffix("qweight")
    qzeros, scales = _beside(infos, qweight, "qzeros"), _beside(infos, qweight, "scales")
    index = infos.get(f"{stem}g_idx")
    groups, outputs = scales.shape
    bits = 32 * qzeros.shape[1] // outputs
    inputs = 32 * qweight.shape[0] // bits if bits in _GPTQ_BITS else 0
    if bits not in _GPTQ_BITS or any(part.dtype not in ("I32", "U32") for part in (qweight, qzeros)):
        raise ModelError(
            f"{qweight.file}: {brief(stem)} has {bits} bits in words of {qweight.dtype}, which cannot be read: GPTQ of "
            f"{', '.join(map(str, _GPTQ_BITS))} bits in I32 can. Quantize the model with one of these."
        )
    if index is not None and index.shape == (0,):
        index = None
    expected = {"qweight": (inputs * bits // 32, outputs), "qzeros": (groups, outputs * bits // 32)}
    _check(infos, stem, expected | ({"g_idx": (inputs,)} if index is not None else {}))
    if index is None and groups > 1 and config.get("desc_act") is True:
        raise CheckpointError(
            f"{qweight.file}: {brief(stem)} has no g_idx, which says the group of each input where desc_act is true in "
            "quantization_config. Download the checkpoint again, or set desc_act to false if its inputs are in order."
        )
    group = _group_size(config.get("group_size"), inputs, groups, qweight)
    zeros = Packed(
        qzeros, (outputs, groups), bits, along_rows=True, turned=True,
        plus=_ones(bits) if minus_one and bits != 3 else 0,
    )  # fmt: skip
    return GroupedWeight(
        f"{stem}weight", _words("gptq", bits, group), (outputs, inputs),
        Packed(qweight, (outputs, inputs), bits, turned=True), Encoding("ints", bits), Matrix(scales, turned=True),
        tuple(info.name for info in (qweight, qzeros, scales, index) if info is not None),
        group=group, zeros=zeros, zeros_plus=int(minus_one and bits == 3), index=index,
    )  # fmt: skip


def _ones(bits: int) -> int:
    """A word of elements that are one. gptqmodel adds it to whole words, so that a zero point of 0 borrows from the next."""
    return sum(1 << place for place in range(0, 32, bits))


def _group_size(given: Any, inputs: int, groups: int, info: TensorInfo) -> int:
    """Inputs of a group: `given` if it makes so many groups, else what divides the inputs into them; 0 if there is one."""
    if groups == 1:
        return 0
    if type(given) is int and given > 0 and math.ceil(inputs / given) == groups:
        return given
    if inputs % groups:
        raise CheckpointError(
            f"{info.file}: {brief(info.name)} has {inputs} inputs and {groups} groups, but config.json names groups of "
            f"{given}. Correct group_size in quantization_config."
        )
    return inputs // groups


def awq_weights(infos: Infos, config: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The weights of a checkpoint of `quant_method: awq`, version `gemm` or `gemv`.

    Raises:
        ModelError: The config names a form that cannot be read.
        CheckpointError: Tensors are missing, or their shapes do not agree.
    """
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    bits = config.get("bits", config.get("w_bit", 4))
    if version not in ("gemm", "gemv") or bits != 4:
        raise ModelError(
            f"quantization_config: AWQ must have 4 bits and the version gemm or gemv to be read, but has {bits!r:.20} bits and "
            f"{version!r:.40}. Quantize the model with one of them, or dequantize it and save that."
        )
    given = config.get("group_size", config.get("q_group_size", 128))
    make = _gemm if version == "gemm" else _gemv
    return [make(infos, info, given) for info in _qweights(infos)]


def _gemm(infos: Infos, qweight: TensorInfo, given: Any) -> QuantizedWeight:
    stem = qweight.name.removesuffix("qweight")
    scales, qzeros = _beside(infos, qweight, "scales"), infos.get(f"{stem}qzeros")
    (inputs, _), (groups, outputs) = qweight.shape, scales.shape
    expected = {"qweight": (inputs, outputs // 8)} | ({} if qzeros is None else {"qzeros": (groups, outputs // 8)})
    _check(infos, stem, expected)
    group = _group_size(given, inputs, groups, qweight)
    how: dict[str, Any] = {"along_rows": True, "turned": True, "places": _PLACES}
    return GroupedWeight(
        f"{stem}weight", _words("awq", 4, group), (outputs, inputs),
        Packed(qweight, (outputs, inputs), 4, **how), Encoding("ints", 4), Matrix(scales, turned=True),
        tuple(info.name for info in (qweight, qzeros, scales) if info is not None),
        group=group, zeros=8 if qzeros is None else Packed(qzeros, (outputs, groups), 4, **how),
    )  # fmt: skip


def _gemv(infos: Infos, qweight: TensorInfo, given: Any) -> QuantizedWeight:
    stem = qweight.name.removesuffix("qweight")
    qzeros, scales = _beside(infos, qweight, "qzeros"), _beside(infos, qweight, "scales")
    outputs, inputs = qweight.shape[0], 8 * qweight.shape[1]
    if type(given) is not int or not (given == -1 or given > 0):
        raise ModelError(f"quantization_config: group_size must be a size or -1, but is {given!r:.40}. Correct it.")
    group = inputs if given == -1 else given
    groups = inputs // group
    # Their last dim is rounded up, and filled with zeros.
    wide = {"scales": (outputs, scales.shape[1]), "qzeros": (outputs, scales.shape[1] // 8)}
    _check(infos, stem, wide)
    if inputs % group or scales.shape[1] < groups:
        raise CheckpointError(
            f"{scales.file}: {brief(scales.name)} must have at least {inputs} / {group} groups, but has {scales.shape[1]}. "
            "Correct group_size in quantization_config."
        )
    return GroupedWeight(
        f"{stem}weight", _words("awq gemv", 4, group), (outputs, inputs),
        Packed(qweight, (outputs, inputs), 4), Encoding("ints", 4), Matrix(scales),
        tuple(info.name for info in (qweight, qzeros, scales)),
        group=0 if groups == 1 else group, zeros=Packed(qzeros, (outputs, scales.shape[1]), 4),
    )  # fmt: skip


def _beside(infos: Infos, qweight: TensorInfo, name: str) -> TensorInfo:
    """The tensor `name` beside a `qweight`, which must have two dims, as it must."""
    wanted = qweight.name.removesuffix("qweight") + name
    found = infos.get(wanted)
    if found is None or len(found.shape) != 2 or len(qweight.shape) != 2 or 0 in found.shape:
        problem = "is missing" if found is None else f"has the shape {found.shape}"
        raise CheckpointError(
            f"{qweight.file}: {brief(qweight.name)} {qweight.shape} needs {brief(wanted)} of two dims, which {problem}. The "
            "checkpoint is incomplete: download it again."
        )
    return found


def _check(infos: Infos, stem: str, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        info = infos[stem + name]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: the shape of {brief(info.name)} must be {shape}, as the tensors beside it say, but is "
                f"{info.shape}. The checkpoint is damaged, or quantization_config in config.json belongs to another."
            )


def _words(method: str, bits: int, group: int) -> str:
    return f"{method}, {bits} bits" + (f", groups of {group}" if group else "")
