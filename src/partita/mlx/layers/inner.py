"""The inner layers that sharded layers wrap: their classes, and how to extract a part of one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import mlx.core as mx
import mlx.nn as nn

from partita.core.sharding.split import Range
from partita.errors import ModelError, PlanError

M = TypeVar("M", bound=nn.Module)
Dimension = Literal["outputs", "inputs"]

PACKED_BITS = 32
"""Bits of the words in which a quantized weight's entries are packed."""

QUANTIZATION_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
"""Default group size and bits of each of MLX's modes."""


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, plain or quantized.

    Raises:
        ModelError: The layer cannot be split.
    """
    weight = linear.get("weight")
    if isinstance(linear, nn.Linear | nn.QuantizedLinear) and weight is not None and weight.ndim == 2:
        return weight.shape[0], dense_width(linear)
    raise ModelError(
        f"{type(linear).__module__}.{type(linear).__name__} cannot be split: only nn.Linear and "
        "nn.QuantizedLinear can. Split the model before its layers are replaced, or keep this one unsplit with the rule "
        "`replicate`."
    )


def multiplies_by_columns(module: nn.Module, dtype: mx.Dtype) -> bool:
    """Whether products with the weight of `module` are fastest with contiguous columns instead of rows.

    The BLAS in MLX's wheels for Linux computes `x @ weight.T` by dot products for contiguous rows, and by sums of columns, with
    vector instructions, for contiguous columns: for one row and a float32 weight of 2048 x 768, 1.4 ms instead of 0.6 ms. Shape
    and values of an array are the same either way. An embedding may be a tied head.
    """
    is_matrix = isinstance(module, nn.Linear | nn.Embedding) and dtype == mx.float32
    return is_matrix and sys.platform == "linux" and mx.default_device() == mx.cpu


def in_columns(array: mx.array) -> mx.array:
    """The same matrix with contiguous columns in memory."""
    return mx.contiguous(array.T).T


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is packed, with scales."""
    return "scales" in module and "weight" in module


def dense_width(module: nn.Module) -> int:
    """The last dimension of a module's weight `[..., inputs]`, counted in unpacked entries."""
    width = int(module["weight"].shape[-1])
    return width * PACKED_BITS // int(module.bits) if is_quantized(module) else width


def quantization_unit(module: nn.Module) -> int:
    """Number of inputs that share a scale and must stay on one rank: the group size; 1 for a plain weight."""
    return int(module.group_size) if hasattr(module, "group_size") else 1


def slice_module(module: M, dimension: Dimension, ranges: Sequence[Range], *, bias: bool) -> M:
    """A module of the same class that holds `ranges` of the outputs or of the inputs of another's weight.

    Args:
        module: Of weight `[..., outputs, inputs]`, plain or quantized along the inputs, and perhaps bias `[..., outputs]`:
            a linear layer, a stack of them (experts, heads), an embedding.
        dimension: The dimension to split.
        ranges: The ranges to keep, in local order, in unpacked entries.
        bias: Whether to keep a bias.

    Raises:
        PlanError: A range of inputs divides a quantization group.
    """
    twin = copy_module(module)
    if "bias" in twin and not bias:
        del twin["bias"]
        twin._no_grad.discard("bias")
    for name in ("weight", "scales", "biases", "bias"):
        if name in twin and not (name == "bias" and dimension == "inputs"):
            twin[name] = slice_parameter(module, name, dimension, ranges)
    return twin


def slice_parameter(module: nn.Module, name: str, dimension: Dimension, ranges: Sequence[Range]) -> mx.array:
    """`ranges` of the outputs or inputs of a module's `weight`, `scales`, `biases`, or of the outputs of its `bias`.

    Raises:
        PlanError: A range of inputs divides a quantization group.
    """
    if dimension == "outputs":
        return slice_array(module[name], -1 if name == "bias" else -2, ranges)
    if not is_quantized(module):
        return slice_array(module[name], -1, ranges)
    unit = quantization_unit(module)
    check_groups(ranges, unit)
    numerator, denominator = (int(module.bits), PACKED_BITS) if name == "weight" else (1, unit)
    return slice_array(
        module[name], -1, [(a * numerator // denominator, b * numerator // denominator) for a, b in ranges]
    )


def new_linear(weight: mx.array, bias: mx.array | None) -> nn.Linear:
    """An `nn.Linear` of a given weight `[outputs, inputs]` and bias, without sampling initial weights."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def new_quantized_linear(
    inputs: int, outputs: int, bias: bool, group_size: int | None, bits: int | None, mode: str
) -> nn.QuantizedLinear:
    """An `nn.QuantizedLinear` of zeros, frozen, without quantizing anything.

    Raises:
        PlanError: There is no such mode, or the inputs are not a multiple of the group size.
    """
    if mode not in QUANTIZATION_DEFAULTS:
        raise PlanError(f"mode must be one of {', '.join(QUANTIZATION_DEFAULTS)}; got {mode!r}.")
    linear = nn.QuantizedLinear.__new__(nn.QuantizedLinear)
    nn.Module.__init__(linear)
    linear.group_size = group_size or QUANTIZATION_DEFAULTS[mode][0]
    linear.bits = bits or QUANTIZATION_DEFAULTS[mode][1]
    linear.mode = mode
    if inputs % linear.group_size:
        raise PlanError(f"input_dims must be a multiple of group_size ({linear.group_size}); got {inputs}.")
    try:
        mx.quantize(mx.zeros((32, 128)), linear.group_size, linear.bits, mode)
    except ValueError as error:
        raise PlanError(
            f"MLX has no {mode} quantization of group_size {linear.group_size} and bits {linear.bits}. Leave them out for the "
            "usual ones."
        ) from error
    scales = outputs, inputs // linear.group_size
    linear.weight = mx.zeros((outputs, inputs * linear.bits // PACKED_BITS), mx.uint32)
    linear.scales = mx.zeros(scales, mx.float32 if mode == "affine" else mx.uint8)
    linear.biases = mx.zeros(scales) if mode == "affine" else None
    if bias:
        linear.bias = mx.zeros((outputs,))
    return linear.freeze()


def check_groups(ranges: Sequence[Range], unit: int) -> None:
    """Check that the inputs are split between quantization groups.

    Raises:
        PlanError: They are not.
    """
    for start, stop in ranges:
        if start % unit or stop % unit:
            raise PlanError(
                f"the inputs [{start}, {stop}) divide a quantization group of {unit}: split at multiples of "
                f"{unit} (Split.even(..., unit={unit})), or quantize in smaller groups."
            )


def slice_array(x: mx.array, axis: int, ranges: Sequence[Range]) -> mx.array:
    """`ranges` of an axis of an array, copied once evaluated, so that the original can be released."""
    axis %= x.ndim
    before = (slice(None),) * axis
    pieces = [x[(*before, slice(start, stop))] for start, stop in ranges]
    if not pieces:
        return x[(*before, slice(0, 0))]
    return mx.contiguous(pieces[0]) if len(pieces) == 1 else mx.concatenate(pieces, axis)


def copy_module(module: M) -> M:
    """A module of the same class and state, parameters added to it do not affect `module`."""
    kind: Any = type(module)
    twin = kind.__new__(kind)
    dict.update(twin, module)
    twin.__dict__.update(
        {name: set(value) if isinstance(value, set) else value for name, value in vars(module).items()}
    )
    return twin


def base_layer(module: nn.Module) -> nn.Module:
    """The innermost layer of adapters that wrap one another; mlx-lm's call it `linear` or `embedding`."""
    while True:
        wrapped = module.get("linear", module.get("embedding"))
        if not isinstance(wrapped, nn.Module):
            return module
        module = wrapped
