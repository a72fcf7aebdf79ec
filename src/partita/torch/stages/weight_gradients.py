"""Deferred weight gradients: the backward of a linear layer computes the input gradient, `complete` the weight gradient later.

        forward          y = x @ weight.T + bias
        backward         dx = dy @ weight, and x and dy are kept
        later            weight.grad += dy.T @ x

Zero-bubble schedules fill the bubble with the deferred part. Source: 2401.10241, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F


class _Kept(NamedTuple):
    weight: nn.Parameter
    left: Tensor
    right: Tensor

    @property
    def is_plain(self) -> bool:
        """Whether the gradient only needs to be accumulated.

        An autograd hook sums the gradients of parameters that several ranks hold.
        """
        hooks = self.weight._backward_hooks or self.weight._post_accumulate_grad_hooks
        return not hooks and self.left.dtype == self.weight.dtype

    def accumulate(self) -> None:
        """Add `left.T @ right` to the weight's gradient, in place if it exists."""
        weight, left, right = self.weight, _rows(self.left).t(), _rows(self.right)
        if not self.is_plain:
            torch.autograd.backward((weight,), ((left @ right).to(weight.dtype),))
        elif weight.grad is None:
            weight.grad = left @ right
        else:
            weight.grad.addmm_(left, right)


class WeightGradients:
    """Stores the operands of the deferred weight gradients of one model's linear layers."""

    def __init__(self) -> None:
        self._kept: list[_Kept] | None = None

    @contextmanager
    def put_off(self) -> Iterator[list[_Kept]]:
        """Defer weight gradients of backward inside the context; `complete` computes them from the yielded list."""
        kept: list[_Kept] = []
        self._kept = kept
        try:
            yield kept
        finally:
            self._kept = None

    @property
    def are_put_off(self) -> bool:
        """Whether backward currently defers weight gradients."""
        return self._kept is not None

    def keep(self, kept: _Kept) -> None:
        """Defer a weight's gradient."""
        assert self._kept is not None
        self._kept.append(kept)


def complete(kept: list[_Kept]) -> None:
    """Add the deferred gradients, and release their operands."""
    with torch.no_grad():
        for one in kept:
            one.accumulate()
    kept.clear()


@contextmanager
def deferrable(model: nn.Module, gradients: WeightGradients) -> Iterator[None]:
    """Allow the weight gradients of every linear layer of `model` to be deferred inside the context."""
    changed = []
    for module in model.modules():
        is_linear = type(module) is nn.Linear
        known = (is_linear or type(module).__name__ == "Conv1D") and "forward" not in module.__dict__
        # A hook on a weight (one sums the gradients of several ranks) must not be called before there is a gradient.
        if known and not (module.weight._backward_hooks or module.weight._post_accumulate_grad_hooks):
            module.forward = partial(_forward, module, gradients, not is_linear)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(module: Any, gradients: WeightGradients, transposed: bool, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and module.weight.requires_grad):
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return _Linear.apply(x, module.weight, module.bias, gradients, transposed)  # type: ignore[no-any-return]


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, gradients: WeightGradients, transposed: bool
    ) -> Tensor:
        ctx.x_dtype, ctx.gradients, ctx.transposed, ctx.weight = x.dtype, gradients, transposed, weight
        narrow: Tensor = weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, narrow = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, narrow)
        return F.linear(x, narrow.t() if transposed else narrow, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_grad = None
        if ctx.needs_input_grad[1]:
            left, right = (x, grad) if ctx.transposed else (grad, x)
            kept = _Kept(ctx.weight, left, right)
            if ctx.gradients.are_put_off:
                ctx.gradients.keep(kept)
            elif kept.is_plain:
                kept.accumulate()
            else:
                weight_grad = (_rows(left).t() @ _rows(right)).to(ctx.weight.dtype)
        bias_grad = _rows(grad).sum(0) if ctx.needs_input_grad[2] else None
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ (weight.t() if ctx.transposed else weight)).to(ctx.x_dtype)
        return x_grad, weight_grad, bias_grad, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
