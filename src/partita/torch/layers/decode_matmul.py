"""Matrix products of few rows with large weights on a CPU while decoding: memory layout of the weights and operand order.

Reading the weight bounds a product of few rows, and BLAS does not read every layout equally fast. For a weight
of 1376 x 512 in float32, microseconds a product (MKL of torch 2.13, AMD EPYC, one thread):

    rows                                  1     2     3     4     8    16
    x @ W.T, rows of W one after another  281   452   502   386   450   629
    x @ W.T, columns one after another    181   247   292   346   439   601
    (W @ x.T).T, rows one after another   295   149   203   285   399   627

So the weights are transposed for one sequence, and the product for a few. Other dtypes gain nothing or lose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from partita.torch.layers.compiled import compiled_parts
from partita.torch.layers.inner import has_no_hooks

PAYS_AFTER_TOKENS = 32
"""Transposing a weight pays off after about this many tokens."""

FEW = range(2, 9)
"""Numbers of rows for which the product is transposed."""


@contextmanager
def decoding(model: nn.Module, rows: int, tokens: int) -> Iterator[None]:
    """Speed up the linear layers of `model` for `rows` rows inside the context.

    The memory layout of weights may differ afterwards; shapes, values and parameters stay the same. One weight at a time is
    held twice.

    Args:
        model: A split or unsplit model.
        rows: Sequences in a batch.
        tokens: Maximum number of new tokens per sequence.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _gains(module.weight)]
    if tokens >= PAYS_AFTER_TOKENS and rows not in FEW:
        for layer in layers:
            if layer.weight.is_contiguous():
                layer.weight.data = layer.weight.data.T.contiguous().T
    compiled = compiled_parts(model)
    turned = [
        layer
        for layer in layers
        if rows in FEW and layer.weight.is_contiguous() and has_no_hooks(layer) and layer not in compiled
    ]
    for layer in turned:
        layer.forward = partial(_turned, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in turned:
            del layer.forward


def _gains(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def _turned(layer: nn.Linear, x: Tensor) -> Tensor:
    """The output of `layer` for `x`, `[..., in]` to `[..., out]`."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] not in FEW:
        return nn.functional.linear(x, layer.weight, layer.bias)
    y = (layer.weight @ flat.T).T.reshape(*x.shape[:-1], -1)
    return y if layer.bias is None else y + layer.bias
