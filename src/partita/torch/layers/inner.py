"""The inner layers that sharded layers wrap: their classes, and how to extract a part of one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from partita.core.sharding.split import Range
from partita.errors import ModelError
from partita.torch.quantized.tensor import QuantizedTensor

M = TypeVar("M", bound=nn.Module)

REPLACED = "_partita_replaced"
"""Attribute of a parameter of an unsplit model that this rank's part has replaced."""


def linear_shape(linear: nn.Module) -> tuple[int, int, bool]:
    """Outputs and inputs of a linear layer, and whether its weight is stored as [in, out].

    Raises:
        ModelError: The layer cannot be split.
    """
    weight = linear._parameters.get("weight")
    if isinstance(linear, nn.Linear) and weight is not None:
        if tuple(weight.shape) == (linear.out_features, linear.in_features):
            return linear.out_features, linear.in_features, False
        if type(linear) is nn.Linear:  # other classes pack their weights
            raise ModelError(
                f"the weight of a linear layer must have the shape (out_features, in_features), which is "
                f"({linear.out_features}, {linear.in_features}), but has {tuple(weight.shape)}. Set both to the weight's sizes."
            )
    elif type(linear).__name__ == "Conv1D" and hasattr(linear, "nf") and weight is not None:
        return weight.shape[1], weight.shape[0], True
    raise ModelError(
        f"{type(linear).__module__}.{type(linear).__name__} cannot be split: only nn.Linear and transformers' Conv1D "
        "with a plain weight can. "
        "Split the model before its layers are replaced, or keep this one unsplit with the rule `replicate`."
    )


def slice_linear(linear: nn.Module, dim: int, ranges: Sequence[Range], *, bias: bool) -> nn.Module:
    """A layer of the same class with `ranges` of the weight's `dim`, and of the bias if `dim` is the outputs."""
    _, _, transposed = linear_shape(linear)
    inner: nn.Module = copy_module(linear)
    local = slice_parameter(linear.weight, dim, ranges)  # type: ignore[arg-type]
    inner._parameters["weight"] = local
    outputs = dim == (1 if transposed else 0)
    whole_bias = linear._parameters.get("bias")
    if whole_bias is not None:
        inner._parameters["bias"] = slice_parameter(whole_bias, 0, ranges) if bias and outputs else None
    if transposed:
        inner.nf = local.shape[1]  # type: ignore[assignment]
        inner.nx = local.shape[0]  # type: ignore[assignment]
        if whole_bias is not None and not bias:
            # Conv1D's forward always adds a bias; the row layer adds the real bias after the sum.
            del inner._parameters["bias"]
            # A weight on the meta device is filled later, but this buffer would not be.
            device = "cpu" if local.device.type == "meta" else local.device
            zeros = torch.zeros(local.shape[1], dtype=local.dtype, device=device)
            inner.register_buffer("bias", zeros, persistent=False)
    else:
        inner.out_features, inner.in_features = local.shape  # type: ignore[assignment]
    return inner


def copy_module(module: M) -> M:
    """A module of the same class and state; hooks and parameters added to it do not affect `module`."""
    twin = copy.copy(module)
    twin.__dict__.update(
        {name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict | set)}
    )
    return twin


def empty_linear(
    in_features: int, out_features: int, *, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    """An `nn.Linear` with an uninitialized weight."""
    linear = nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype)
    return linear if str(device) == "meta" else linear.to_empty(device=device or torch.get_default_device())


def has_no_hooks(module: nn.Module) -> bool:
    """Whether calling a module only calls its class's forward, without hooks."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or _has_any_global_hook()
    )


def slice_parameter(parameter: Tensor, dim: int, ranges: Sequence[Range]) -> nn.Parameter:
    """A parameter with a copy of `ranges` of `dim` of another."""
    if isinstance(parameter, QuantizedTensor):
        held = [[(0, size)] for size in parameter.shape]
        held[dim] = list(ranges)
        return nn.Parameter(parameter.part(held), requires_grad=False)
    if parameter.is_meta:
        shape = list(parameter.shape)
        shape[dim] = sum(stop - start for start, stop in ranges)
        return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)
    with torch.no_grad():
        pieces = [parameter.narrow(dim, start, stop - start) for start, stop in ranges]
        local = torch.cat(pieces or [parameter.narrow(dim, 0, 0)], dim)
    return nn.Parameter(local.contiguous(), requires_grad=parameter.requires_grad)


def take_ranges(tensor: Tensor, ranges: Sequence[Sequence[Range]], first_dim: int = 0) -> Tensor:
    """The given ranges of each dim from `first_dim` on, in their order. A dim of which all is taken is not copied."""
    for dim, held in enumerate(ranges, first_dim):
        if tuple(held) != ((0, tensor.shape[dim]),):
            tensor = torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in held], dim)
    return tensor


def base_layer(linear: nn.Module) -> nn.Module:
    """The innermost layer of adapters that wrap one another (`base_layer` in peft and in ours)."""
    while isinstance(getattr(linear, "base_layer", None), nn.Module):
        linear = linear.base_layer  # type: ignore[assignment]
    return linear


def inner_weight(linear: nn.Module) -> nn.Parameter:
    """The weight of an inner layer, under any adapters."""
    return base_layer(linear).weight  # type: ignore[return-value]


def inner_bias(linear: nn.Module) -> nn.Parameter | None:
    """The bias of an inner layer, under any adapters, or None."""
    return base_layer(linear)._parameters.get("bias")
