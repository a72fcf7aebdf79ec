"""Running a model entirely in float64, so that a split and an unsplit model can be compared to the last digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}

_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
"""Cast methods named after a dtype."""

_LIKE_OTHER = {Tensor.to, Tensor.type_as}
"""Casts that may take the dtype of another tensor."""

_REINTERPRETING = {Tensor.view, torch.frombuffer}
"""Functions whose dtype argument describes memory layout: another dtype would change the result."""


class Float64Everywhere(TorchFunctionMode):
    """Keep float64 where a model asks for a narrower floating-point dtype.

    The weights and inputs of the model must be float64. Model code narrows in many ways, mostly to float32 for speed;
    while the mode is active each returns float64 or complex128:

    - a dtype among the arguments: `x.to(torch.float32)`, `x.type(torch.float32)`, `softmax(x, -1, dtype=torch.float32)`,
      `torch.zeros(n, dtype=torch.float32)`;
    - a cast method: `x.float()`, `x.half()`, `x.bfloat16()`, `x.type("torch.FloatTensor")`;
    - a cast to the dtype of another tensor: `x.to(other)`, `x.type_as(other)`;
    - the default dtype: `torch.zeros(n)`, `torch.tensor(0.5)`, `ids / 2`.
    """

    def __enter__(self) -> Self:
        """Activate the mode."""
        _depth.set(_depth.get() + 1)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Deactivate the mode."""
        super().__exit__(*error)
        _depth.set(_depth.get() - 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _REINTERPRETING:
            return func(*args, **kwargs)
        if func in _CASTS:
            return Tensor.double(*args, **kwargs)
        if func in _LIKE_OTHER:
            other = next((t for t in (*args[1:2], *kwargs.values()) if isinstance(t, Tensor)), None)
            if other is not None and other.dtype in _WIDER:
                return Tensor.to(args[0], other.device, _WIDER[other.dtype])
        args = tuple(_widened(a) for a in args)
        kwargs = {name: _widened(value) for name, value in kwargs.items()}
        if func is Tensor.type and len(args) > 1:
            args = (args[0], _widened_type(args[1]), *args[2:])
        if func is torch.full and kwargs.get("dtype") is None and isinstance(_fill_value(args, kwargs), float):
            # Masks are filled with the smallest float64, which overflows the default dtype.
            kwargs["dtype"] = torch.float64
        result = func(*args, **kwargs)
        return _widened_default(result, [*args, *kwargs.values()])


_depth: ContextVar[int] = ContextVar("_depth", default=0)


def recomputed_alike() -> dict[str, Any]:
    """Arguments of `torch.utils.checkpoint.checkpoint` that recompute in float64 what is now computed so.

    torch deactivates the mode during backward, and so for what backward recomputes.
    """
    return {"context_fn": lambda: (nullcontext(), Float64Everywhere())} if _depth.get() else {}


def _widened_default(result: Any, given: Sequence[Any]) -> Any:
    """`result`, widened if its dtype is torch's default and no tensor in `given` has that dtype.

    So views of arguments and arguments changed in place stay unchanged.
    """
    if not isinstance(result, Tensor) or result.dtype not in _WIDER or result.requires_grad:
        return result
    if any(tensor.dtype in _WIDER for tensor in _tensors(given)):
        return result
    return result.to(_WIDER[result.dtype])


def _fill_value(args: Any, kwargs: Any) -> Any:
    return kwargs.get("fill_value", args[1] if len(args) > 1 else None)


def _widened(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _widened_type(kind: Any) -> Any:
    """Whether the argument of `Tensor.type` is a tensor class or the name of one."""
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}" if isinstance(kind, type) else ""
    for narrow in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        if name.endswith(f".{narrow}"):
            return name.removesuffix(narrow) + "DoubleTensor"
    return kind


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
