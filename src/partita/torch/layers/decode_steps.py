"""What a decoder layer computes beside its products, for one new token of each sequence on a CPU: norms, rotary positions and
attention over the cache, each in one call of C++ (`steps.h`) instead of many small operations of torch.

A norm or a rotary function is known by its results: it is called with random numbers, and it is replaced only if those of the
C++ are the same but for rounding. Attention is replaced where a module's own forward asks transformers for the implementation
`sdpa` and calls it without what the C++ lacks. The module's forward stays as it is: a copy of it sees our functions under the
names of the replaced ones. Everything else, every other shape and dtype is computed as before.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import math
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from partita.torch.quantized.kernels import threads
from partita.torch.quantized.native import library
from partita.torch.transformers_internals import ATTENTIONS, ROTATE, HookedAttention, attention_functions, plain_sdpa

DTYPES = {torch.float32: 0, torch.bfloat16: 1}

MOST_ELEMENTS = 1 << 16
"""Up to this many elements, a norm takes less time in one thread than in torch's operations."""

Forward = Callable[..., Any]


_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_int64


class _Norm(ctypes.Structure):
    """`Norm` of `steps.h`."""

    _fields_ = (
        ("weight", _ADDRESS),
        ("width", _SIZE),
        *((name, ctypes.c_float) for name in ("epsilon", "offset")),
        *((name, ctypes.c_int32) for name in ("dtype", "rounds")),
    )


class _Rotation(ctypes.Structure):
    """`Rotation` of `steps.h`."""

    _fields_ = tuple(
        (name, _SIZE) for name in ("batch", "heads", "batch_stride", "head_stride", "angle_stride", "width")
    )


class _Attention(ctypes.Structure):
    """`Attention` of `steps.h`, to which each call adds the addresses."""

    _fields_ = (
        *((name, _SIZE) for name in ("q_batch", "q_head", "k_batch", "k_head", "k_token")),
        *((name, _SIZE) for name in ("v_batch", "v_head", "v_token", "mask_batch")),
        *((name, _SIZE) for name in ("batch", "heads", "groups", "tokens", "width", "dtype")),
        *((name, _ADDRESS) for name in ("q", "k", "v", "mask", "y", "slots")),
    )


def faster_step(module: nn.Module) -> Forward | None:
    """A faster forward of a norm or an attention module without hooks, where no gradients are computed; None if it has none."""
    if any(True for _ in module.children()):
        return _faster_attention(module)
    fast: Forward | None = faster_norm(module)
    return fast


# --- norms --------------------------------------------------------------------------------------------------------------


def faster_norm(module: nn.Module) -> Any:
    """A faster forward of a norm, with its `_Norm` as attribute `norm`; None if it has none."""
    weight = module._parameters.get("weight")
    if len(module._parameters) != 1 or module._buffers or type(weight) not in (nn.Parameter, Tensor):
        return None
    assert weight is not None
    if weight.dim() != 1 or weight.dtype not in DTYPES or weight.device.type != "cpu" or weight.numel() == 0:
        return None
    epsilon = next((v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)), None)
    if epsilon is None or library() is None:
        return None
    plain = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, int | float | str)))
    form = _norm_form(Kind(module, (type(module), plain, weight.shape, weight.dtype)), epsilon)
    return None if form is None else _norm(weight.detach(), epsilon, form, type(module).forward.__get__(module))


class Kind:
    """A module, which equals others with the same `facts`."""

    def __init__(self, module: nn.Module, facts: Any) -> None:
        self.module, self.facts = module, facts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kind) and self.facts == other.facts

    def __hash__(self) -> int:
        return hash(self.facts)


@functools.lru_cache(maxsize=256)
def _norm_form(kind: Kind, epsilon: float) -> tuple[float, int] | None:
    """Offset of the weight and order of roundings (see `steps.h`) with which a norm is the C++'s; None if it is not."""
    twin = copy.copy(kind.module)
    width, dtype = kind.module.weight.numel(), kind.module.weight.dtype  # type: ignore[operator]
    weight = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(dtype)  # type: ignore[arg-type]
    twin._parameters = {"weight": nn.Parameter(weight)}
    twin.__dict__.pop("weight", None)
    kind.module = twin  # the key of the cache must not keep a model's weights
    forward: Forward = type(twin).forward.__get__(twin)
    for form in ((0.0, 1), (0.0, 0), (1.0, 0)):
        if _is_same_norm(forward, _norm(weight, epsilon, form, forward), weight, epsilon):
            return form
    return None


def _norm(weight: Tensor, epsilon: float, form: tuple[float, int], forward: Forward) -> Forward:
    weight, width, dtype = weight.contiguous(), weight.numel(), weight.dtype
    norm = _Norm(weight.data_ptr(), width, epsilon, form[0], DTYPES[dtype], form[1])
    functions = library()
    assert functions is not None
    call, place = functions.partita_norm, ctypes.byref(norm)
    call.argtypes, call.restype = (_ADDRESS, _ADDRESS, _SIZE, _ADDRESS), None

    def fast(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return forward(*args, **kwargs)
        x = args[0]
        size = x.numel()
        if x.dtype is not dtype or x.shape[-1] != width or not 0 < size <= MOST_ELEMENTS or not x.is_contiguous():
            return forward(x)
        y = torch.empty_like(x)
        call(place, x.data_ptr(), size // width, y.data_ptr())
        return y

    fast.weight = weight  # type: ignore[attr-defined]  # its memory is in use
    fast.norm = norm  # type: ignore[attr-defined]
    return fast


def _is_same_norm(forward: Forward, fast: Forward, weight: Tensor, epsilon: float) -> bool:
    """Whether two norms return the same for rows of usual size, tiny ones, ones with an outlier, and ones with another mean."""
    noise = torch.randn(4, weight.numel(), generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([[1.0], [math.sqrt(epsilon)], [30.0], [1.0]])
    x = noise * scales + torch.tensor([[0.0], [0.0], [0.0], [2.0]])
    x[2, 0] = 1000.0
    x = x.to(weight.dtype)
    try:
        with torch.inference_mode():
            want, got = forward(x), fast(x)
    except Exception:
        return False
    if not isinstance(want, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
        return False
    # bfloat16: a sum that differs by its rounding moves few results to the next number; another order of roundings moves many.
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2.0**-7
    moved = (want != got).float().mean().item() if weight.dtype == torch.bfloat16 else 0.0
    return torch.allclose(want.float(), got.float(), rtol=tolerance, atol=1e-6) and moved < 0.02


# --- attention ----------------------------------------------------------------------------------------------------------


def _faster_attention(module: nn.Module) -> Forward | None:
    weight = next(module.parameters(), None)
    if weight is None or weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return None
    made: Any = _attention_forward(type(module))  # type: ignore[arg-type]
    return None if made is None else made.__get__(module)


@functools.cache
def _attention_forward(kind: type[nn.Module]) -> Forward | None:
    """A copy of a module's forward that calls our attention and rotary positions; None if it asks transformers for neither."""
    forward: Any = kind.forward
    inner = inner_function(forward)
    if inner is None or ATTENTIONS not in inner.__code__.co_names:
        return None
    functions = inner.__globals__.get(ATTENTIONS)
    if functions is not attention_functions() or library() is None:
        return None
    replaced: dict[str, Any] = {ATTENTIONS: Attentions(functions)}
    rotate = inner.__globals__.get(ROTATE)
    if ROTATE in inner.__code__.co_names and (fast := faster_rotary(rotate)) is not None:
        replaced[ROTATE] = fast
    made: Forward = with_globals(forward, replaced)
    return made


def inner_function(function: Any) -> FunctionType | None:
    """The function that decorators wrap, each of which says so and holds it."""
    while isinstance(function, FunctionType):
        if not hasattr(function, "__wrapped__"):
            return function
        inner = function.__wrapped__
        if not any(cell.cell_contents is inner for cell in function.__closure__ or ()):
            return None
        function = inner
    return None


def with_globals(function: Any, names: Mapping[str, Any]) -> Any:
    """A copy of a function that finds other values under some global names, with copies of its decorators."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return _copy(function, {**function.__globals__, **names}, function.__closure__)
    made = with_globals(inner, names)
    cells = tuple(CellType(made) if cell.cell_contents is inner else cell for cell in function.__closure__)
    return _copy(function, function.__globals__, cells)


def _copy(function: Any, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class Attentions:
    """transformers' table of attention implementations, with ours in place of `sdpa`."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions
        self._sdpa = plain_sdpa()
        self._fast = {self._sdpa: _attention(self._sdpa)}

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        """The function of an implementation."""
        return self._ours(self._functions.get_interface(*args, **kwargs))

    def __getitem__(self, name: str) -> Any:
        return self._ours(self._functions[name])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def _ours(self, found: Any) -> Any:
        """Ours in place of `found`; a row's result does not depend on other rows, so it also replaces one for each row."""
        if isinstance(found, HookedAttention):
            ours = self._ours(found.plain)
            return found if ours is found.plain else _Unhooked(found, ours)
        if found not in self._fast and getattr(found, "fused", None) is self._sdpa:
            self._fast = {self._sdpa: self._fast[self._sdpa], found: _attention(found)}
        return self._fast.get(found, found)


IGNORED = frozenset({"is_causal", "sliding_window", "position_ids", "use_cache", "cache", "cache_position"})
"""Arguments that transformers' function does not use for one query."""


def _attention(sdpa: Forward) -> Forward:
    functions = library()
    assert functions is not None
    call, empty = functions.partita_attend, torch.empty
    call.argtypes, call.restype = (*(_ADDRESS,) * 6, ctypes.c_float, ctypes.c_int), None

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        sizes = None
        if query.shape[2] == 1 and not dropout and all(v is None or name in IGNORED for name, v in kwargs.items()):
            mask = None if attention_mask is None else _form(attention_mask)
            shared = getattr(module, "num_key_value_groups", 1)
            sizes = _attention_sizes(_form(query), _form(key), _form(value), mask, shared)
        if sizes is None:
            return sdpa(  # type: ignore[no-any-return]
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        y = empty((query.shape[0], 1, query.shape[1], query.shape[3]), dtype=query.dtype)
        seen = None if attention_mask is None else attention_mask.data_ptr()
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        places = query.data_ptr(), key.data_ptr(), value.data_ptr(), seen, y.data_ptr()
        call(ctypes.byref(sizes), *places, scale, threads())
        return y, None

    attend.is_ours = True  # type: ignore[attr-defined]
    return attend


class _Unhooked:
    """Ours for the modules that a hook does not concern."""

    def __init__(self, hooked: HookedAttention, ours: Forward) -> None:
        self.hooked, self.ours = hooked, ours

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attend = self.hooked if self.hooked.concerns(module) else self.ours
        return attend(module, *args, **kwargs)


def is_ours(attend: Any, module: nn.Module) -> bool:
    """Whether an implementation of attention is that of the C++ for `module`."""
    if isinstance(attend, _Unhooked):
        return not attend.hooked.concerns(module) and is_ours(attend.ours, module)
    return getattr(attend, "is_ours", False)


def mask_stride(mask: Any, batch: int, tokens: int) -> int | None:
    """The elements from a sequence's mask to the next one's, 0 if they share one; None if the C++ does not take the mask."""
    return _mask_stride(_form(mask), batch, tokens) if isinstance(mask, Tensor) else None


def _mask_stride(mask: _Form, batch: int, tokens: int) -> int | None:
    shape, stride, kind, on_cpu = mask
    if len(shape) != 4 or shape[0] not in (1, batch) or tuple(shape[1:]) != (1, 1, tokens):
        return None
    if kind != torch.bool or not on_cpu or (tokens > 1 and stride[3] != 1):
        return None
    return stride[0] if shape[0] > 1 else 0


_Form = tuple[torch.Size, tuple[int, ...], torch.dtype, bool]
"""A tensor's shape, strides and dtype, and whether it is on the CPU."""


def _form(x: Tensor) -> _Form:
    return x.shape, x.stride(), x.dtype, x.is_cpu


@functools.lru_cache(maxsize=64)  # all layers of a step have the same
def _attention_sizes(query: _Form, key: _Form, value: _Form, mask: _Form | None, shared: int) -> _Attention | None:
    """The sizes of an attention for our C++; None if it does not take these tensors.

    `query` `[batch, heads, 1, width]`, `key` and `value` `[batch, heads / shared, tokens, width]`, `mask` `[batch or 1, 1, 1,
    tokens]`.
    """
    (batch, heads, _, width), q, dtype, _ = query
    k, v = key[1], value[1]
    if key[0] != value[0] or len(key[0]) != 4 or {key[2], value[2]} != {dtype} or dtype not in DTYPES:
        return None
    if (key[0][0], key[0][1] * shared, key[0][3]) != (batch, heads, width) or 0 in key[0]:
        return None
    if not (query[3] and key[3] and value[3]) or (width > 1 and not q[3] == k[3] == v[3] == 1):
        return None
    of_mask = 0 if mask is None else _mask_stride(mask, batch, key[0][2])
    if of_mask is None:
        return None
    sizes = batch, heads, key[0][1], key[0][2], width, DTYPES[dtype]
    return _Attention(q[0], q[1], k[0], k[1], k[2], v[0], v[1], v[2], of_mask, *sizes)


# --- rotary positions ---------------------------------------------------------------------------------------------------


@functools.cache
def faster_rotary(rotate: Any) -> Forward | None:
    """A faster form of a family's function that applies rotary positions to queries and keys, if it rotates halves."""
    if not callable(rotate):
        return None
    fast = _halves(rotate)
    for dtype in DTYPES:
        for batch in (1, 2):
            random = torch.Generator().manual_seed(batch)
            q, k = (torch.randn(batch, 1, n, 8, generator=random).to(dtype).transpose(1, 2) for n in (3, 2))
            cos, sin = (torch.randn(batch, 1, 8, generator=random).to(dtype) for _ in range(2))
            try:
                with torch.inference_mode():
                    want, got = rotate(q, k, cos, sin), fast(q, k, cos, sin)
            except Exception:
                return None
            if not (isinstance(want, tuple) and len(want) == 2):
                return None
            for one, other in zip(want, got, strict=True):
                # The sum of two products may be rounded once instead of twice in float32.
                close = 1e-6 if dtype == torch.float32 else 0.0
                if one.dtype is not other.dtype or one.shape != other.shape:
                    return None
                if not torch.allclose(one.float(), other.float(), rtol=close, atol=close):
                    return None
    return fast


def _halves(rotate: Forward) -> Forward:
    functions = library()
    assert functions is not None
    call, empty = functions.partita_rotate, torch.empty
    call.argtypes, call.restype = (_ADDRESS, ctypes.c_int, *(_ADDRESS,) * 6), None

    def fast(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes = None if args or kwargs else _rotation_sizes(_form(q), _form(k), _form(cos), _form(sin))
        if sizes is None:
            return rotate(q, k, cos, sin, *args, **kwargs)
        new_q, new_k = empty(q.shape, dtype=q.dtype), empty(k.shape, dtype=q.dtype)
        places = q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr(), new_q.data_ptr(), new_k.data_ptr()
        call(sizes, DTYPES[q.dtype], *places)
        return new_q, new_k

    return fast


@functools.lru_cache(maxsize=64)
def _rotation_sizes(q: _Form, k: _Form, cos: _Form, sin: _Form) -> Any:
    """The sizes of a rotation of queries and keys for our C++; None if it does not take these tensors.

    `q` and `k` `[batch, heads, 1, width]`, `cos` and `sin` `[batch or 1, 1, width]`.
    """
    if (
        not len(q[0]) == len(k[0]) == 4
        or len(cos[0]) != 3
        or not q[2] == k[2] == cos[2] == sin[2]
        or q[2] not in DTYPES
    ):
        return None
    (batch, _, tokens, width), heads = q[0], k[0][1]
    if tuple(k[0]) != (batch, heads, 1, width) or tokens != 1 or width % 2 or width == 0 or not (q[3] and cos[3]):
        return None
    if tuple(cos[0]) not in ((1, 1, width), (batch, 1, width)) or cos[:2] != sin[:2]:
        return None
    if not q[1][3] == k[1][3] == cos[1][2] == 1:
        return None
    angle_stride = cos[1][0] if cos[0][0] > 1 else 0
    return (_Rotation * 2)(*(_Rotation(batch, x[0][1], x[1][0], x[1][1], angle_stride, width) for x in (q, k)))
