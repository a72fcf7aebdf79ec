"""Weight gradients put off: the backward of a linear layer gives the input gradient, the weight's comes when it is asked for.

        forward          y = x @ weight.T + bias
        backward         dx = dy @ weight, and x and dy are kept
        later            weight.grad += dy.T @ x

Zero-bubble schedules fill the bubble with what comes later. Source: 2401.10241, section 2.
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
        """Whether nothing but an addition is to be done with the gradient.

        What several ranks hold is summed by a hook of autograd.
        """
        hooks = self.weight._backward_hooks or self.weight._post_accumulate_grad_hooks
        return not hooks and self.left.dtype == self.weight.dtype

    def accumulate(self) -> None:
        """Add `left.T @ right` to the weight's gradient, in its memory where it has one."""
        weight, left, right = self.weight, _rows(self.left).t(), _rows(self.right)
        if not self.is_plain:
            torch.autograd.backward((weight,), ((left @ right).to(weight.dtype),))
        elif weight.grad is None:
            weight.grad = left @ right
        else:
            weight.grad.addmm_(left, right)


class WeightGradients:
    """Where the linear layers of one model leave what their weight gradients are made of."""

    def __init__(self) -> None:
        self._kept: list[_Kept] | None = None

    @contextmanager
    def put_off(self) -> Iterator[list[_Kept]]:
        """While it lasts, backward leaves out weight gradients; `complete` makes them of what is yielded."""
        kept: list[_Kept] = []
        self._kept = kept
        try:
            yield kept
        finally:
            self._kept = None

    @property
    def are_put_off(self) -> bool:
        """Whether backward leaves them out now."""
        return self._kept is not None

    def keep(self, kept: _Kept) -> None:
        """Leave a weight's gradient for later."""
        assert self._kept is not None
        self._kept.append(kept)


def complete(kept: list[_Kept]) -> None:
    """Add the gradients that were put off, and forget what they were made of."""
    with torch.no_grad():
        for one in kept:
            one.accumulate()
    kept.clear()


@contextmanager
def deferrable(model: nn.Module, gradients: WeightGradients) -> Iterator[None]:
    """While it lasts, the weight gradients of every linear layer of `model` can be put off."""
    changed = []
    for module in model.modules():
        is_linear = type(module) is nn.Linear
        known = (is_linear or type(module).__name__ == "Conv1D") and "forward" not in module.__dict__
        # A hook on a weight (what several ranks hold is summed by one) must not be called before there is a gradient.
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
