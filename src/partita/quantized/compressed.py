"""Weights of compressed-tensors: integers or floats of 4 or 8 bits in the formats that its config's groups name.

Layouts and names: compressed-tensors 0.20 (`compressors/*/base.py`), and `weight_g_idx` of earlier releases. A weight is
`(code - zero point) * scale`; `nvfp4-pack-quantized` divides the scale by `weight_global_scale`. Its tensors, and the group
whose targets match the layer, say its form. The package rounds the values to the scale's dtype, which is not done here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from partita.checkpoint.header import TensorInfo, brief
from partita.errors import CheckpointError, ModelError
from partita.quantized.array import Encoding
from partita.quantized.fp8 import EIGHT_BITS, scale_grid
from partita.quantized.mxfp4 import FP4_VALUES
from partita.quantized.packed import GroupedWeight, Matrix, Packed, read_small
from partita.quantized.weight import Grid, Infos, QuantizedWeight, ScaledBytes

FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mxfp8-quantized", "dense", "mixed-precision",
)  # fmt: skip

_EXTRA = (
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "weight_g_idx",
    "weight_shape",
)  # fmt: skip


_Groups = list[tuple[list[str], Mapping[str, Any]]]
"""The targets and the quantization of weights of each group of a config."""


def compressed_weights(infos: Infos, config: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The weights of a checkpoint of `quant_method: compressed-tensors`.

    Raises:
        ModelError: The config names a format that cannot be read, or is malformed.
        CheckpointError: Tensors are missing, or their shapes do not agree.
    """
    groups = _groups(config)
    found: list[QuantizedWeight] = []
    for name, info in infos.items():
        path, _, attribute = name.rpartition(".")
        if attribute == "weight_packed":
            found.append(_packed(infos, info, path, groups))
        elif attribute == "weight" and info.dtype in EIGHT_BITS:
            found.append(_eight_bits(infos, info, path, groups))
    return found


def has_activations(config: Mapping[str, Any]) -> bool:
    """Whether a config quantizes the inputs of layers too."""
    groups = config.get("config_groups")
    given = groups.values() if isinstance(groups, Mapping) else ()
    return any(isinstance(group, Mapping) and group.get("input_activations") for group in given)


def _groups(config: Mapping[str, Any]) -> _Groups:
    sparse = config.get("sparsity_config")
    sparse_format = sparse.get("format") if isinstance(sparse, Mapping) else None
    given, format_ = config.get("config_groups"), config.get("format") or "dense"
    if not isinstance(given, Mapping) or not all(isinstance(group, Mapping) for group in given.values()):
        raise ModelError("quantization_config: config_groups must be groups by name, but is not. Correct config.json.")
    groups: _Groups = []
    formats = [format_, sparse_format or "dense"]
    for group in given.values():
        targets, weights = group.get("targets"), group.get("weights")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ModelError(
                "quantization_config: the targets of a group must be a list of names. Correct config.json."
            )
        if isinstance(weights, Mapping):
            groups.append((targets, weights))
            formats.append(group.get("format") or "dense")
    for one in formats:
        if one not in FORMATS:
            raise ModelError(
                f"quantization_config: the format {one!r:.60} of compressed-tensors cannot be read: {', '.join(FORMATS[:-2])} "
                "can. Decompress the model with compressed-tensors, save that, and load it."
            )
    return groups


def _weights_of(path: str, groups: _Groups) -> Mapping[str, Any]:
    """The quantization of the module `path`: its own name goes before a pattern, that before its class."""
    exact = [group for group in groups if path in group[0]]
    matched = [g for g in groups if any(t.startswith("re:") and _matches(t[3:], path) for t in g[0])]
    kind = "Embedding" if re.search(r"(^|\.)(embed\w*|wte)$", path) else "Linear"
    by_class = [group for group in groups if kind in group[0]]
    chosen = (exact or matched or by_class or groups)[:1]
    if not chosen:
        raise ModelError(
            f"quantization_config: no group has a quantization of weights, but {brief(path)} is quantized. Correct config.json."
        )
    return chosen[0][1]


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.match(pattern, path) is not None
    except re.error as error:
        raise ModelError(
            f"quantization_config: the target re:{pattern:.60} must be a regular expression, but is not: {error}. Correct "
            "config.json."
        ) from error


def _number(weights: Mapping[str, Any], name: str, default: int) -> int:
    value = weights.get(name)
    return value if type(value) is int else default


def _tensor(infos: Infos, path: str, attribute: str, info: TensorInfo) -> TensorInfo:
    found = infos.get(f"{path}.{attribute}")
    if found is None:
        raise CheckpointError(
            f"{info.file}: {brief(info.name)} is {info.dtype}, but has no {attribute} beside it, without which its values are "
            "unknown. The checkpoint is incomplete: download it again."
        )
    return found


def _names(infos: Infos, path: str, *attributes: str) -> tuple[str, ...]:
    """The names of what is there for a weight, what is not read included."""
    return tuple(name for one in (*attributes, *_EXTRA) if (name := f"{path}.{one}") in infos)


def _eight_bits(infos: Infos, info: TensorInfo, path: str, groups: _Groups) -> QuantizedWeight:
    """A weight whose elements are bytes: naive, integers, floats, or floats with exponents as scales."""
    weights = _weights_of(path, groups)
    scales, zeros = _tensor(infos, path, "weight_scale", info), infos.get(f"{path}.weight_zero_point")
    group, block = _number(weights, "group_size", -1), _block(weights)
    extra = _names(infos, path)
    index = _index(infos, path, info.shape)
    if len(info.shape) == 2 and len(scales.shape) == 2 and group > 0 and weights.get("strategy") != "block":
        _check_groups(info, scales, info.shape, group)
        if index is not None:
            return _with_index(infos, info, path, index, scales, zeros, weights)
        grid = Grid(scales, 1, group)
    else:
        grid = scale_grid(info, scales, block)
    form = f"compressed-tensors, {'fp8' if info.dtype.startswith('F8') else 'int8'}" + _units(group, block)
    return ScaledBytes(
        info.name, form, info, grid, Grid(zeros, grid.rows, grid.columns) if zeros is not None else None, extra=extra,
        scale_dtype="F8_E8M0" if scales.dtype == "U8" else "",
    )  # fmt: skip


def _with_index(
    infos: Infos,
    info: TensorInfo,
    path: str,
    index: TensorInfo,
    scales: TensorInfo,
    zeros: TensorInfo | None,
    weights: Any,
) -> QuantizedWeight:
    size = (info.shape[0], info.shape[1])
    signed = Encoding("bytes", dtype=info.dtype)
    form = "compressed-tensors, int8" + _units(_number(weights, "group_size", -1), None) + ", ordered by activation"
    return GroupedWeight(
        info.name, form, size, Packed(info, size, 8), signed, Matrix(scales),
        (info.name, *_names(infos, path, "weight_scale", "weight_zero_point")), index=index,
        zeros=Matrix(zeros) if zeros is not None else None,
    )  # fmt: skip


def _packed(infos: Infos, info: TensorInfo, path: str, groups: _Groups) -> QuantizedWeight:
    weights = _weights_of(path, groups)
    if info.dtype == "U8":
        return _fp4(infos, info, path, weights)
    bits, group = _number(weights, "num_bits", 4), _number(weights, "group_size", -1)
    scales, shape = _tensor(infos, path, "weight_scale", info), _tensor(infos, path, "weight_shape", info)
    sizes = read_small(shape).astype(int).reshape(-1).tolist()
    if len(sizes) != 2 or not 1 <= bits <= 8 or not _is_dense(info, sizes, bits):
        raise CheckpointError(
            f"{info.file}: {brief(info.name)} of {info.dtype} {info.shape} cannot be {tuple(sizes)} elements of {bits} bits in "
            "dense words. Quantize the model with compressed-tensors 0.20 or newer, or correct num_bits in config.json."
        )
    size = (sizes[0], sizes[1])
    index = _index(infos, path, size)
    if group > 0:
        _check_groups(info, scales, size, group)
    elif math.prod(scales.shape) not in (1, size[0]):
        raise _wrong_scales(scales, size, "one, or one for each output")
    zeros = infos.get(f"{path}.weight_zero_point")
    return GroupedWeight(
        f"{path}.weight", f"compressed-tensors, {bits} bits" + _units(group, None), size, Packed(info, size, bits),
        Encoding("ints", bits), Matrix(scales),
        (info.name, *_names(infos, path, "weight_scale", "weight_zero_point")), group=max(group, 0),
        zeros=_packed_zeros(zeros, size, scales, bits), index=index if group > 0 else None,
    )  # fmt: skip


def _is_dense(info: TensorInfo, sizes: list[int], bits: int) -> bool:
    """Whether words hold all bits. Before 0.20 no element was in two words, so bits that do not divide 32 left some unused."""
    dense, sparse = math.ceil(sizes[1] * bits / 32), math.ceil(sizes[1] / (32 // bits))
    return info.dtype == "I32" and info.shape == (sizes[0], dense) and (32 % bits == 0 or dense != sparse)


def _packed_zeros(zeros: TensorInfo | None, size: tuple[int, int], scales: TensorInfo, bits: int) -> Packed | int:
    """The zero points of unsigned codes: packed along the outputs, or the middle of the codes if there are none."""
    middle = 1 << (bits - 1)
    if zeros is None:
        return middle
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    if zeros.dtype != "I32" or zeros.shape != (math.ceil(size[0] * bits / 32), groups):
        raise _wrong_scales(zeros, size, f"{(math.ceil(size[0] * bits / 32), groups)} in I32")
    return Packed(zeros, (size[0], groups), bits, along_rows=True)


def _fp4(infos: Infos, info: TensorInfo, path: str, weights: Mapping[str, Any]) -> QuantizedWeight:
    """Two elements of FP4 a byte, the first in the low bits."""
    scales, whole = _tensor(infos, path, "weight_scale", info), infos.get(f"{path}.weight_global_scale")
    size = (info.shape[0], 2 * info.shape[1])
    exponents = scales.dtype in ("U8", "F8_E8M0") and whole is None
    group = _number(weights, "group_size", 32 if exponents else 16)
    _check_groups(info, scales, size, group)
    if (whole is None) != exponents or (not exponents and scales.dtype == "U8"):
        raise CheckpointError(
            f"{info.file}: {brief(info.name)} has scales of {scales.dtype}, which are those of "
            f"{'mxfp4 and need no' if whole is not None else 'nvfp4 and need a'} weight_global_scale. Download it again."
        )
    factor = 1.0
    if whole is not None:
        factor = 1 / float(read_small(whole).reshape(-1)[0])
    return GroupedWeight(
        f"{path}.weight", f"compressed-tensors, {'mxfp4' if exponents else 'nvfp4'}" + _units(group, None), size,
        Packed(info, size, 4), Encoding("table", 4, table=FP4_VALUES), Matrix(scales, dtype="F8_E8M0" if exponents else ""),
        (info.name, *_names(infos, path, "weight_scale", "weight_global_scale")), group=group, factor=factor,
    )  # fmt: skip


def _index(infos: Infos, path: str, size: tuple[int, ...]) -> TensorInfo | None:
    """The group of each input, where inputs were ordered by their activation; older files hold -1 where they were not."""
    index = infos.get(f"{path}.weight_g_idx")
    if index is None:
        return None
    if index.shape != size[1:2]:
        raise _wrong_scales(index, size, f"{size[1:2]}")
    return index if (read_small(index) >= 0).all() else None


def _block(weights: Mapping[str, Any]) -> Any:
    block = weights.get("block_structure")
    if isinstance(block, str) and re.fullmatch(r"\d+x\d+", block):
        return [int(number) for number in block.split("x")]
    return block


def _units(group: int, block: Any) -> str:
    if isinstance(block, list | tuple) and len(block) == 2:
        return f", blocks of {block[0]} x {block[1]}"
    return f", groups of {group}" if group > 0 else ""


def _check_groups(info: TensorInfo, scales: TensorInfo, size: tuple[int, ...], group: int) -> None:
    expected = (size[0], math.ceil(size[1] / group))
    if scales.shape != expected:
        raise _wrong_scales(scales, size, f"{expected} for groups of {group}")


def _wrong_scales(info: TensorInfo, size: tuple[int, ...], expected: str) -> CheckpointError:
    return CheckpointError(
        f"{info.file}: the shape of {brief(info.name)} must be {expected} for a weight of {tuple(size)}, but is {info.shape} "
        f"in {info.dtype}. Correct quantization_config in config.json, or download the checkpoint again."
    )
