"""The bits of quantized weights, from a config's `quantization_config` (or MLX's `quantization`), or from a file's bytes.

Bits per element include scales, zero points and group indices. The forms are those of the methods' own packages as
transformers 5.24 loads them (`quantizers/`, `integrations/`); the headers of a checkpoint are more exact than its config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from partita.core.model.spec import ModelSpec, TensorSpec, text_config
from partita.errors import ModelError

_LARGEST_BITS = 64
_SUFFIX = re.compile(
    r"[._](weight_scale_inv|weight_scale_2|weight_scale|weight_packed|weight_shape|weight_zero_point|weight_g_idx|qweight|"
    r"qzeros|g_idx|scales|biases|blocks|input_scale|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)|"
    r"SCB|weight_format)$"
)


@dataclass(frozen=True)
class Quantization:
    """How a config says that weights are stored.

    Attributes:
        name: The method in words, such as `fp8, blocks of 128 x 128`.
        bits: Maps the shape of an unpacked weight [..., outputs, inputs] to the bits of one element.
        kept: Patterns of the modules that are not quantized.
        experts_only: Whether only experts are quantized.
        embeddings: Whether the embedding and the head are quantized too.
        head: Whether the head is quantized too.
    """

    name: str
    bits: Callable[[tuple[int, ...]], float]
    kept: tuple[str, ...] = ()
    experts_only: bool = False
    embeddings: bool = False
    head: bool = False

    def applies(self, spec: ModelSpec, tensor: TensorSpec) -> bool:
        """Whether `tensor` is stored in this form."""
        path, _, attribute = tensor.name.rpartition(".")
        is_expert = ".experts." in f".{tensor.name}" and "bias" not in attribute and len(tensor.shape) > 2
        if len(tensor.shape) < 2 or tensor.is_buffer or spec.is_in_tower(tensor.name) or self._is_kept(tensor.name):
            return False
        if self.experts_only:
            return is_expert
        if spec.layer_of(tensor.name) is None:
            return attribute == "weight" and (
                self.embeddings
                or (self.head and "embed" not in path and re.search(r"(^|\.)(lm_)?head$", path) is not None)
            )
        is_linear = attribute == "weight" and (
            path in spec.linears
            if spec.linears is not None
            else re.search(r"(norm|gate|router|embed\w*)$", path) is None
        )
        return is_expert or is_linear

    def _is_kept(self, name: str) -> bool:
        path = name.rpartition(".")[0]
        return any(
            re.match(kept[3:], path) if kept.startswith("re:") else fnmatchcase(f".{name}", f"*.{kept}.*")
            for kept in self.kept
        )


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """The quantization that a config names, or None if it names none or one whose sizes are not known.

    Raises:
        ModelError: A pattern of modules that are not quantized is not a regular expression.
    """
    mlx = config.get("quantization")
    if isinstance(mlx, Mapping) and isinstance(mlx.get("bits"), int):
        return _mlx(mlx)
    given = settings_of(config)
    if given is None:
        return None
    method = str(given.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in given else ""))
    reader = _METHODS.get(method)
    found = reader(given) if reader is not None else None
    if found is None:
        return None
    names = given.get("modules_to_not_convert") or given.get("ignore") or given.get("llm_int8_skip_modules") or ()
    kept = tuple(str(name) for name in names) if isinstance(names, list | tuple) else ()
    for pattern in kept:
        _check_pattern(pattern)
    return replace(found, kept=kept)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern[3:] if pattern.startswith("re:") else "")
    except re.error as error:
        raise ModelError(
            f"quantization_config: the modules that are not quantized must be names or regular expressions (`re:...`), but one "
            f"is {pattern!r:.60}: {error}. Correct it in config.json."
        ) from error


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a config or of its text part; None if neither has one."""
    given = config.get("quantization_config") or text_config(config).get("quantization_config")
    return given if isinstance(given, Mapping) else None


def method_of(config: Mapping[str, Any]) -> str:
    """The name of the method that a config gives for its quantized weights; empty if it gives none."""
    if isinstance(config.get("quantization"), Mapping):
        return "MLX"  # which repeats it as quantization_config, without a method
    given = settings_of(config)
    if given is None:
        return ""
    unnamed = "bitsandbytes" if "load_in_4bit" in given or "load_in_8bit" in given else "an unnamed method"
    return str(given.get("quant_method") or unnamed)


def is_scale(name: str) -> bool:
    """Whether a tensor on disk has the name of a part of a quantized weight (scales, zero points, packed codes)."""
    return _SUFFIX.search(name) is not None


def quantization_name(spec: ModelSpec) -> str | None:
    """The quantization of a model in words, or None if none of its weights is quantized."""
    if not spec.is_packed:
        return None
    found = read_quantization(spec.config)
    return found.name if found is not None else method_of(spec.config) or "quantized"


def with_quantization(spec: ModelSpec) -> ModelSpec:
    """`spec` with the bits of the weights that its config says are quantized."""
    found = read_quantization(spec.config)
    if found is None:
        return spec
    bits = {t.name: found.bits(t.shape) for t in spec.tensors.values() if found.applies(spec, t)}
    return _with_bits(spec, {name: number for name, number in bits.items() if number >= 1})


def with_stored_bytes(spec: ModelSpec, stored: Mapping[str, int]) -> ModelSpec:
    """`spec` with the bits that a file has for each tensor.

    A tensor of the file counts for the tensor of the model with its name, without the suffix of a scale. In a layer what has
    no such name (an expert of its own, where the model has them fused) counts for the model's tensors of that layer that
    nothing in the file is named after, in proportion to their elements.

    Args:
        spec: The model.
        stored: Bytes of each tensor of the file by its name.
    """
    found: dict[str, int] = {}
    others: dict[int | None, int] = {}
    number = re.compile(rf"(?:^|\.){re.escape(spec.layers.rpartition('.')[2])}\.(\d+)\.") if spec.layers else None
    for name, size in stored.items():
        target = _target(spec, name)
        if target is not None:
            found[target] = found.get(target, 0) + size
        else:
            match = number.search(name) if number is not None else None
            layer = int(match[1]) if match else None
            others[layer] = others.get(layer, 0) + size
    for layer, size in others.items():
        left = [
            t for t in spec.tensors.values()
            if t.name not in found and t.tied_to is None and spec.layer_of(t.name) == layer
        ]  # fmt: skip
        elements = sum(t.numel for t in left)
        found |= {t.name: round(size * t.numel / elements) for t in left if t.numel}
    return _with_bits(spec, {name: 8 * size / spec.tensors[name].numel for name, size in found.items()})


def _target(spec: ModelSpec, name: str) -> str | None:
    """The tensor of the model that a tensor of a file is part of, or None."""
    base = _SUFFIX.sub("", name)
    return next((known for known in (name, f"{base}.weight", base) if known in spec.tensors), None)


def _with_bits(spec: ModelSpec, bits: Mapping[str, float]) -> ModelSpec:
    plain = 8 * spec.dtype_bytes
    packed = {name: found for name, found in bits.items() if 0 < found <= _LARGEST_BITS and found != plain}
    tensors = {n: replace(t, packed_bits=packed[n]) if n in packed else t for n, t in spec.tensors.items()}
    # What is tied has its twin's memory.
    tied = {n: tensors[t.tied_to].packed_bits for n, t in tensors.items() if t.tied_to is not None}
    tensors |= {n: replace(tensors[n], packed_bits=found) for n, found in tied.items()}
    return replace(spec, tensors=MappingProxyType(tensors))


# --- the methods: bits per element of a weight [..., outputs, inputs] ---------------------------------------------------


def _number(data: Mapping[str, Any], name: str, default: int) -> int:
    value = data.get(name)
    return value if type(value) is int else default


def _grouped(bits: float, per_group: float, group: int) -> Callable[[tuple[int, ...]], float]:
    """`bits` an element, and `per_group` bits for each `group` inputs; -1 is one group for all inputs of an output."""
    return lambda shape: bits + per_group / (group if group > 0 else shape[-1])


def _blocked(bits: float, per_block: float, block: Iterable[int]) -> Callable[[tuple[int, ...]], float]:
    rows, columns = block

    def count(shape: tuple[int, ...]) -> float:
        blocks = math.ceil(shape[-2] / rows) * math.ceil(shape[-1] / columns)
        return bits + per_block * blocks / (shape[-2] * shape[-1])

    return count


def _fp8(given: Mapping[str, Any]) -> Quantization:
    block = given.get("weight_block_size")
    if isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return Quantization(f"fp8, blocks of {block[0]} x {block[1]}", _blocked(8, 32, block))
    return Quantization("fp8", lambda shape: 8 + 32 / (shape[-2] * shape[-1]))


def _mxfp4(_: Mapping[str, Any]) -> Quantization:
    return Quantization("mxfp4, groups of 32", _grouped(4, 8, 32), experts_only=True)


def _gptq(given: Mapping[str, Any]) -> Quantization:
    bits, group = _number(given, "bits", 4), _number(given, "group_size", 128)
    grouped = _grouped(bits, 16 + bits, group)
    return Quantization(
        _named("gptq", bits, group), lambda shape: grouped(shape) + 32 / shape[-2], head=given.get("lm_head") is True
    )


def _awq(given: Mapping[str, Any]) -> Quantization:
    bits = _number(given, "bits", _number(given, "w_bit", 4))
    group = _number(given, "group_size", _number(given, "q_group_size", 128))
    return Quantization(_named("awq", bits, group), _grouped(bits, 16 + bits, group))


def _compressed(given: Mapping[str, Any]) -> Quantization | None:
    groups = given.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    bits, group = _number(weights, "num_bits", 8), _number(weights, "group_size", -1)
    block = weights.get("block_structure")
    name = _named("compressed-tensors", bits, group)
    if weights.get("strategy") == "tensor":
        return Quantization(name, lambda shape: bits + 16 / (shape[-2] * shape[-1]))
    if weights.get("strategy") == "block" and isinstance(block, list | tuple) and len(block) == 2:
        return Quantization(f"{name}, blocks of {block[0]} x {block[1]}", _blocked(bits, 16, block))
    # nvfp4 and mxfp4 have scales of one byte.
    scale = 8 if weights.get("type") == "float" and bits == 4 else 16
    return Quantization(name, _grouped(bits, scale + (0 if weights.get("symmetric", True) else bits), group))


def _bitsandbytes(given: Mapping[str, Any]) -> Quantization:
    if given.get("load_in_4bit") is True or given.get("_load_in_4bit") is True:
        # A scale for 64 elements: float32, or 8 bits with a float32 for 256 of them.
        scale = 8 + 32 / 256 if given.get("bnb_4bit_use_double_quant") is True else 32
        return Quantization(f"bitsandbytes, {given.get('bnb_4bit_quant_type', 'fp4')}", _grouped(4, scale, 64))
    return Quantization("bitsandbytes, int8", _grouped(8, 32, -1))


def _mlx(given: Mapping[str, Any]) -> Quantization:
    bits, group, mode = given["bits"], _number(given, "group_size", 64), str(given.get("mode", "affine"))
    name = _named("MLX" if mode == "affine" else f"MLX {mode}", bits, group)
    kept = tuple(path for path, own in given.items() if own is False)
    return Quantization(name, _grouped(bits, 32 if mode == "affine" else 8, group), kept, embeddings=True)


def _named(method: str, bits: int, group: int) -> str:
    return f"{method}, {bits} bits" + (f", groups of {group}" if group > 0 else "")


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Quantization | None]] = {
    "fp8": _fp8,
    "fbgemm_fp8": lambda given: Quantization("fp8", _grouped(8, 32, -1)),
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
}
