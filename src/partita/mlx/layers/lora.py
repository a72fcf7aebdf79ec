"""mlx-lm's LoRA and DoRA on the inner layer of a split one.

An adapter wraps the inner layer, so it is split with it. Names and shapes are mlx-lm's:

    style    split over the ranks              replicated
    column   lora_b [rank, out_r], m [out_r]   lora_a [in, rank]
    row      lora_a [in_r, rank]               lora_b [rank, out], m [out]
    vocab    lora_a [vocab_r, rank], m         lora_b [rank, width]

Replicated parts must start equal; each rank computes a part of their gradient, and the parts are summed. DoRA's `m` of a row
layer is not summed: it is applied after the sum over the ranks, like the norm of the unsplit rows.
Source: LoRA (Hu et al. 2021, 2106.09685), DoRA (Liu et al. 2024, 2402.09353).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.mappings import copy_shared, copy_to, reduce_from
from partita.mlx.layers.dropout import AdapterDropout
from partita.mlx.layers.inner import base_layer, check_groups, is_quantized, quantization_unit, slice_array

Style = Literal["column", "row", "vocab"]

_WHOLE = {"column": ("lora_a",), "row": ("lora_b", "m"), "vocab": ("lora_b",)}
_AXIS = {"lora_a": 0, "lora_b": 1, "m": 0}
"""An adapter's parameters, and the axis along which each can be split."""


def adopt(linear: nn.Module, comm: Communicator, split: Split, style: Style) -> None:
    """Fit an adapter on an inner layer to the split: replicated parts start equal on all ranks.

    A new adapter (whose `lora_b` is zero) is sampled again like that of the unsplit layer, and a row layer's `m` becomes the
    norm of the whole rows. Every rank must call it.

    Raises:
        ModelError: It is unknown whether parts of the adapter are split, or replicated parts differ between the ranks.
        PlanError: The inputs of a row layer divide a quantization group.
    """
    base = base_layer(linear)
    if style == "row" and is_quantized(base):
        check_groups(split.ranges(comm.rank), quantization_unit(base))
    if comm.size == 1 or base is linear or getattr(linear, "_is_adopted", False):
        return
    if linear.get("linear", linear.get("embedding")) is not base:
        raise ModelError(f"{type(linear).__name__} wraps another adapter. Only one adapter can be split.")
    added = [name for name, _ in tree_flatten(linear.parameters()) if not name.startswith(("linear.", "embedding."))]
    strange = [name for name in added if name not in _AXIS]
    if strange or not {"lora_a", "lora_b"} <= set(added):
        raise ModelError(
            f"{type(linear).__name__} has {', '.join(strange or added)}, which cannot be split. Use mlx-lm's LoRA or DoRA, "
            "or add it to the unsplit model, fuse it, and split that."
        )
    fresh = all(comm.all_gather_object(not mx.any(linear["lora_b"]).item()))
    if fresh:
        _begin(linear, comm, split, style)
    for name in added:
        if name in _WHOLE[style]:
            _must_be_equal(name, linear[name], comm)
    fit_dropout(linear, comm.rank, split, style)
    linear._is_adopted = True


def fit_dropout(adapter: nn.Module, rank: int, split: Split, style: Style) -> None:
    """Replace mlx-lm's dropout of split inputs by one that samples for the unsplit inputs."""
    dropout = adapter.get("dropout")
    if style == "row" and isinstance(dropout, nn.Dropout):
        adapter["dropout"] = AdapterDropout(dropout_of(adapter), split=split, rank=rank)
        adapter["dropout"].train(dropout.training)


def dropout_of(adapter: nn.Module) -> float:
    """The probability with which an adapter drops its inputs in training."""
    dropout: Any = adapter.get("dropout")
    if isinstance(dropout, AdapterDropout):
        return dropout.p
    return round(1 - dropout._p_1, 9) if isinstance(dropout, nn.Dropout) else 0.0


def _begin(linear: nn.Module, comm: Communicator, split: Split, style: Style) -> None:
    """Fill a new adapter with the unsplit adapter's values: all ranks sample, and the first rank's values count."""
    a = linear["lora_a"]
    size = a.shape[0] if style == "column" else split.size
    bound = 1.0 / math.sqrt(size)
    whole = mx.random.uniform(-bound, bound, (size, a.shape[1])).astype(a.dtype)
    whole = comm.broadcast(whole)
    linear["lora_a"] = whole if style == "column" else slice_array(whole, 0, split.ranges(comm.rank))
    if style == "row" and "m" in linear:
        linear["m"] = mx.sqrt(comm.all_sum(mx.square(linear["m"])))
    mx.eval(linear["lora_a"], linear.get("m", []))


def _must_be_equal(name: str, value: mx.array, comm: Communicator) -> None:
    first = comm.broadcast(value)
    if not all(comm.all_gather_object(mx.array_equal(first, value).item())):
        raise ModelError(
            f"{name} must be equal on all ranks if the adapter changes the output, but it differs. "
            "Add an adapter that changes nothing at first (a zero lora_b), then load its weights."
        )


def split_axis(style: Style, name: str) -> int | None:
    """The axis along which an adapter's parameter is split on a layer of a style; None if it is replicated."""
    return None if name in _WHOLE[style] else _AXIS[name]


def is_adapter(linear: nn.Module) -> bool:
    """Whether a layer is an adapter around another."""
    return base_layer(linear) is not linear


@contextlib.contextmanager
def summed(linear: nn.Module, comm: Communicator, split: Split, style: Style) -> Iterator[None]:
    """Sum the gradients of an inner layer's parts that several ranks hold over these ranks, inside the context.

    These are an adapter's replicated parts, and all parts that other ranks hold copies of.
    """
    with contextlib.ExitStack() as stack:
        if is_adapter(linear):
            for name in _WHOLE[style]:
                if name in linear and not (style == "row" and name == "m"):
                    stack.enter_context(_replaced(linear, name, lambda x: copy_to(x, comm)))
        if not split.is_partition:
            _sum_copies(stack, linear, comm, split, style)
        yield


def _sum_copies(stack: contextlib.ExitStack, linear: nn.Module, comm: Communicator, split: Split, style: Style) -> None:
    base = base_layer(linear)
    if not is_quantized(base):
        for name in ("weight", "bias"):
            if name in base:
                stack.enter_context(_replaced(base, name, lambda x: copy_shared(x, comm, split)))
    if is_adapter(linear):
        # All ranks must build the same graph, so the order is the same.
        for name, axis in _AXIS.items():
            if name in linear and name not in _WHOLE[style]:
                shared = functools.partial(copy_shared, comm=comm, split=split, axis=axis)
                stack.enter_context(_replaced(linear, name, shared))


@contextlib.contextmanager
def _replaced(module: nn.Module, name: str, change: Callable[[mx.array], mx.array]) -> Iterator[None]:
    kept = module[name]
    module[name] = change(kept)
    try:
        yield
    finally:
        module[name] = kept


def is_dora(linear: nn.Module) -> bool:
    """Whether an inner layer is DoRA's, which scales each output by the norm of its unsplit row."""
    return is_adapter(linear) and "m" in linear


def dora_row(
    linear: Any, x: mx.array, comm: Communicator, leave: Callable[[mx.array], mx.array], *, scatters: bool
) -> mx.array:
    """The output of DoRA on a row layer, without its bias: the norms cover rows that are split over the ranks.

    Args:
        linear: mlx-lm's `DoRALinear` around this rank's part.
        x: This rank's inputs, `[..., in_r]`.
        comm: The ranks.
        leave: Reduces partial outputs.
        scatters: Whether `leave` gives each rank its part of the sequence, so that each computes a part of `m`'s gradient.
    """
    weight = linear._dequantized_weight()
    lora_a, lora_b = linear["lora_a"], copy_to(linear["lora_b"], comm)
    update = (linear.dropout(x) @ lora_a) @ lora_b
    y = leave(x @ weight.T + (linear.scale * update).astype(x.dtype))
    adapted = weight + (linear.scale * lora_b.T) @ lora_a.T
    norm = mx.sqrt(reduce_from(mx.square(adapted).sum(axis=1), comm))
    m = copy_to(linear["m"], comm) if scatters else linear["m"]
    return (m / mx.stop_gradient(norm)).astype(x.dtype) * y
