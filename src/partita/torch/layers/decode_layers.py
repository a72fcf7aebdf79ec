"""A whole decoder layer in four calls of C++ for one new token of each sequence on a CPU.

    [1] norm, queries, keys and values, rotary positions        partita_attention_inputs
        the cache appends keys and values                       the family's own cache
    [2] attention                                               partita_attend
    [3] its output's product                                    partita_products
        sum over the tensor ranks
    [4] residual, norm, gate, up, SiLU, down                    partita_feed_forward
        sum over the tensor ranks, residual

A layer has this form if its code, its attention's and its feed-forward part's are, instruction by instruction, those that most
families of transformers copy, if its norms, rotary positions and activation are known by their results (`decode_steps.py`),
and if its linear layers are plain or quantized ones of C++, split or not, without hooks or adapters. On its first token a
layer is computed in both ways, and keeps its own forward if results differ by more than rounding.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from partita.torch.layers.decode_steps import (
    DTYPES,
    Attentions,
    Forward,
    Kind,
    faster_norm,
    faster_rotary,
    inner_function,
)
from partita.torch.layers.inner import has_no_hooks
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.quantized.kernels import Products, threads
from partita.torch.quantized.native import library
from partita.torch.transformers_internals import (
    ATTENTIONS,
    ROTATE,
    attention_functions,
    attention_of,
    cache_argument,
    usual_layers,
)

ProductsOf = Callable[[list[nn.Linear]], tuple[Products, int] | None]
"""The products of layers of one input in one call, and for how many rows they are faster; None if there are none."""

_ADDRESS, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
"""Largest difference of the two ways, relative to the largest magnitude, from rounding sums and e^x differently."""


class _AttentionInputs(ctypes.Structure):
    """`AttentionInputs` of `kernels.cpp`."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("norm", "q_norm", "k_norm", "layers")),
        *((name, _SIZE) for name in ("hidden", "width")),
    )


class _FeedForward(ctypes.Structure):
    """`FeedForward` of `kernels.cpp`."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("norm", "gate_and_up", "down")),
        *((name, _SIZE) for name in ("hidden", "inner")),
        ("adds", ctypes.c_int32),
    )


def faster_layer(layer: nn.Module, products: ProductsOf) -> Forward | None:
    """A faster forward of a decoder layer, where no gradients are computed; None if it has none.

    To be called before the forwards of its parts are replaced.
    """
    if not _has_usual_code(layer):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, nn.Module)
    assert isinstance(mlp, nn.Module)
    found = {name for name, _ in attention.named_children()}, {name for name, _ in mlp.named_children()}
    has_norms = "q_norm" in inner_function(type(attention).forward).__code__.co_names  # type: ignore[union-attr]
    names = {"q_proj", "k_proj", "v_proj", "o_proj", *(("q_norm", "k_norm") if has_norms else ())}
    if (
        found != (names, {"gate_proj", "up_proj", "down_proj", "act_fn"})
        or len(list(layer.children())) != 4
        or not all(map(has_no_hooks, layer.modules()))
    ):
        return None
    if attention._parameters or attention._buffers or mlp._parameters or mlp._buffers or not _is_silu(mlp.act_fn):
        return None
    normed = [layer.input_layernorm, layer.post_attention_layernorm]
    norms = [faster_norm(norm) for norm in normed + ([attention.q_norm, attention.k_norm] if has_norms else [])]  # type: ignore[arg-type]
    enter = [_entering(one) for one in (attention.q_proj, attention.k_proj, attention.v_proj)]
    gate_up = [_entering(one) for one in (mlp.gate_proj, mlp.up_proj)]
    leave = [_leaving(one) for one in (attention.o_proj, mlp.down_proj)]
    if None in norms or None in enter or None in gate_up or None in leave:
        return None
    made = [products(inner) for inner in (enter, gate_up, [leave[0][0]], [leave[1][0]])]  # type: ignore[arg-type,index]
    if None in made:
        return None
    after, sums = [after for _, after in leave], _sums(attention.o_proj, mlp.down_proj)  # type: ignore[misc]
    return DecodeLayer(layer, norms, made, after, sums).forward  # type: ignore[arg-type]


def _has_usual_code(layer: nn.Module) -> bool:
    """Whether a module is the decoder layer that most families of transformers copy."""
    forward = inner_function(type(layer).forward)
    if forward is None or forward.__code__.co_names != (
        "input_layernorm",
        "self_attn",
        "post_attention_layernorm",
        "mlp",
    ):
        return False
    usual, attentions, mlp = usual_layers()
    attention: Any = getattr(layer, "self_attn", None)
    if not (
        _is_same_code(layer, usual)
        and any(_is_same_code(attention, one) for one in attentions)
        and _is_same_code(getattr(layer, "mlp", None), mlp)
    ):
        return False
    names: Any = inner_function(type(attention).forward)
    names = names.__globals__
    return names.get(ATTENTIONS) is attention_functions() and faster_rotary(names.get(ROTATE)) is not None


def _is_same_code(module: Any, kind: type[nn.Module]) -> bool:
    if not isinstance(module, nn.Module):
        return False
    ours, usual = inner_function(type(module).forward), inner_function(kind.forward)
    if ours is None or usual is None:
        return False
    facts = ("co_code", "co_consts", "co_names", "co_varnames", "co_flags", "co_argcount", "co_kwonlyargcount")
    return all(getattr(ours.__code__, fact) == getattr(usual.__code__, fact) for fact in facts)


def _entering(layer: Any) -> nn.Linear | None:
    """The inner layer of one whose outputs are this rank's."""
    if isinstance(layer, ColumnParallelLinear):
        if layer.sequence_parallel or layer.expand is not None or (layer.gather_output and layer.comm.size > 1):
            return None
        layer = layer.linear
    return layer if type(layer) is nn.Linear else None


def _leaving(layer: Any) -> tuple[nn.Linear, Callable[[Tensor], Tensor] | None] | None:
    """The inner layer of one whose outputs are summed over the ranks, and what is done with its product."""
    if type(layer) is nn.Linear:
        return layer, None
    if not isinstance(layer, RowParallelLinear) or layer.sequence_parallel or type(layer.linear) is not nn.Linear:
        return None
    if layer.comm.size == 1 and layer.bias is None:
        return layer.linear, None
    if layer.split_input:
        return None
    bias, all_reduce_ = layer.bias, layer.comm.all_reduce_
    return layer.linear, all_reduce_ if bias is None else lambda y: all_reduce_(y) + bias.to(y.dtype)


@dataclass(frozen=True)
class Sums:
    """How both products that leave a layer's parts are summed over the ranks: in place, or not at all."""

    all_reduce_: Callable[[Tensor], Tensor] | None


def _sums(*leaving: Any) -> Sums | None:
    """The only thing that is done with their products; None if there is more, as a bias to add."""
    kinds = {
        None if type(one) is nn.Linear or (one.comm.size == 1 and one.bias is None) else one.comm.all_reduce_
        for one in leaving
    }
    if len(kinds) > 1 or any(isinstance(one, RowParallelLinear) and one.bias is not None for one in leaving):
        return None
    return Sums(kinds.pop())


@functools.cache
def _silu() -> Any:
    functions = library()
    assert functions is not None
    call = functions.partita_silu
    call.argtypes, call.restype = (_ADDRESS, _SIZE, _ADDRESS, _INT), None
    return call


def _is_silu(activation: Any) -> bool:
    """Whether an activation is the C++'s, by its results."""
    if not isinstance(activation, nn.Module) or activation._parameters or activation._buffers or library() is None:
        return False
    own = {name: value for name, value in vars(activation).items() if name != "training" and name not in _MODULE_NAMES}
    if not all(value is None or isinstance(value, int | float | str) for value in own.values()):
        return False
    return _gives_silu(Kind(activation, (type(activation), tuple(sorted(own.items(), key=str)))))


_MODULE_NAMES = frozenset(vars(nn.Module()))


@functools.lru_cache(maxsize=16)
def _gives_silu(kind: Kind) -> bool:
    for dtype in DTYPES:
        x = torch.cat([torch.linspace(-20, 20, 2001), torch.tensor([-1e4, -200.0, -0.0, 1e-20, 200.0, 1e4])]).to(dtype)
        y = torch.empty_like(x)
        _silu()(x.data_ptr(), x.numel(), y.data_ptr(), DTYPES[dtype])
        try:
            with torch.inference_mode():
                want = kind.module(x)
        except Exception:
            return False
        tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
        if not isinstance(want, Tensor) or want.dtype != dtype or want.shape != x.shape:
            return False
        if not torch.allclose(want.float(), y.float(), rtol=tolerance, atol=1e-30):
            return False
    return True


class DecodeLayer:
    """One decoder layer; see the module's description."""

    def __init__(
        self,
        layer: nn.Module,
        norms: list[Any],
        products: list[tuple[Products, int]],
        after: list[Callable[[Tensor], Tensor] | None],
        sums: Sums | None,
    ) -> None:
        attention: Any = layer.self_attn
        functions = library()
        assert functions is not None
        self.sums = sums
        self.usual: Forward = type(layer).forward.__get__(layer)
        self.attention, self.norms, self.after = attention, norms, after
        self.enter, self.gate_up, self.out, self.down = (one for one, _ in products)
        self.most_rows = min(most for _, most in products)
        self.dtype: torch.dtype = self.enter.dtype
        self.hidden, self.width = self.enter.inputs, attention.head_dim
        self.implementation, self.scaling = attention_of(attention), attention.scaling
        names = inner_function(type(attention).forward).__code__.co_consts  # type: ignore[union-attr]
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        self.window = (
            {"sliding_window": window}
            if any("sliding_window" in one for one in names if isinstance(one, tuple))
            else {}
        )
        self.cache_name = cache_argument(layer)
        self.fits = (
            len({one.dtype for one, _ in products} | {norm.weight.dtype for norm in norms}) == 1
            and self.dtype in DTYPES
            and {norm.weight.numel() for norm in norms[2:]} <= {self.width}
            and {norm.weight.numel() for norm in norms[:2]}
            | {self.gate_up.inputs, *self.out.outputs, *self.down.outputs}
            == {self.hidden}
            and len(set(self.gate_up.outputs)) == 1
            and self.gate_up.outputs == [self.down.inputs] * 2
            and self.enter.outputs[0] == self.out.inputs
            and self.enter.outputs[1] == self.enter.outputs[2]
            and not any(outputs % self.width for outputs in self.enter.outputs)
            and self.width % 2 == 0
            and attentions().get_interface(self.implementation, None) is not None
        )
        self.heads = [outputs // self.width for outputs in self.enter.outputs]
        places: list[Any] = [ctypes.addressof(norm.norm) for norm in norms]
        q_norm, k_norm = places[2:] or (None, None)
        layers = ctypes.addressof(self.enter.layers)
        self.inputs = _AttentionInputs(places[0], q_norm, k_norm, layers, self.hidden, self.width)
        self.rest = _FeedForward(
            places[1], ctypes.addressof(self.gate_up.layers), ctypes.addressof(self.down.layers),
            self.hidden, self.down.inputs, after[1] is None,
        )  # fmt: skip
        self.inputs_place, self.rest_place = ctypes.byref(self.inputs), ctypes.byref(self.rest)
        self.call_inputs, self.call_rest = functions.partita_attention_inputs, functions.partita_feed_forward
        self.call_inputs.argtypes = (_ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _INT, _INT)
        self.call_rest.argtypes = (_ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS, _INT, _INT)
        self.three = _ADDRESS * 3
        self.is_proven: bool | None = None if self.fits else False
        self.update_names: frozenset[str] = frozenset()

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, as its own forward gives it."""
        if args or self.is_proven is False or not self.takes(hidden, kwargs):
            return self.usual(hidden, *args, **kwargs)
        if self.is_proven is None:
            return self._proven(hidden, kwargs)
        return self._computed(hidden, kwargs, kwargs[self.cache_name])

    def takes(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> bool:
        """Whether C++ computes the layer for these arguments."""
        shape = hidden.shape
        if len(shape) != 3 or shape[1] != 1 or shape[2] != self.hidden or not 0 < shape[0] <= self.most_rows:
            return False
        angles = kwargs.get("position_embeddings")
        if kwargs.get(self.cache_name) is None or not isinstance(angles, tuple) or self.attention.training:
            return False
        cos, sin = angles
        return (
            hidden.dtype is self.dtype
            and hidden.is_contiguous()
            and cos.dtype is sin.dtype is self.dtype
            and cos.shape == sin.shape
            and cos.shape[1:] == (1, self.width)
            and cos.shape[0] in (1, shape[0])
            and cos.is_contiguous()
            and sin.is_contiguous()
        )

    def _computed(self, hidden: Tensor, kwargs: Mapping[str, Any], cache: Any) -> Tensor:
        rows, dtype = hidden.shape[0], DTYPES[self.dtype]
        more = {name: value for name, value in kwargs.items() if name not in _NAMED and name != self.cache_name}
        q, k, v = (hidden.new_empty((rows, count, 1, self.width)) for count in self.heads)
        cos, sin = kwargs["position_embeddings"]
        places = self.three(q.data_ptr(), k.data_ptr(), v.data_ptr())
        stride = self.width if cos.shape[0] > 1 else 0
        count = threads()
        if self.call_inputs(
            self.inputs_place, hidden.data_ptr(), rows, cos.data_ptr(), sin.data_ptr(), stride, places, dtype, count
        ):
            raise MemoryError("the input of an attention could not be allocated")
        given = {"kwargs": more} if self.update_names else {}
        keys, values = cache.update(k, v, self.attention.layer_idx, **given)
        attend = attentions().get_interface(self.implementation, None)
        mask = kwargs.get("attention_mask")
        found, _ = attend(
            self.attention, q, keys, values, mask, dropout=0.0, scaling=self.scaling, **self.window, **more
        )
        attended = self.out(found.reshape(rows, 1, -1).contiguous())[0]
        if self.after[0] is not None:
            attended = self.after[0](attended)
        residual, y = torch.empty_like(hidden), torch.empty_like(hidden)
        if self.call_rest(
            self.rest_place,
            hidden.data_ptr(),
            attended.data_ptr(),
            rows,
            residual.data_ptr(),
            y.data_ptr(),
            dtype,
            count,
        ):
            raise MemoryError("the input of a feed-forward layer could not be allocated")
        return y if self.after[1] is None else residual + self.after[1](y)

    def _proven(self, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        """The layer's own output, after which `is_proven` says whether ours is the same. All ranks call the same sums."""
        recorded = _Recorded(kwargs[self.cache_name])
        want = self.usual(hidden, **{**kwargs, self.cache_name: recorded})
        if recorded.results is None or recorded.names - {"kwargs"}:
            self.is_proven = False
            return want
        self.update_names = recorded.names
        got = self._computed(hidden, kwargs, recorded)
        self.is_proven = recorded.is_same and isinstance(want, Tensor) and _is_close(got, want)
        return want


_NAMED = frozenset({"position_embeddings", "attention_mask"})
"""Arguments of a layer that its attention does not pass on."""


class _Recorded:
    """A cache whose first update is recorded, and whose second returns the same if it is called with the same."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.given: tuple[Tensor, Tensor] | None = None
        self.results: tuple[Tensor, Tensor] | None = None
        self.names: frozenset[str] = frozenset()
        self.is_same = False

    def update(self, keys: Tensor, values: Tensor, index: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See transformers' `Cache.update`."""
        if self.given is not None and self.results is not None:
            self.is_same = all(_is_close(a, b) for a, b in zip((keys, values), self.given, strict=True))
            return self.results
        self.given, self.names = (keys, values), frozenset(kwargs) | ({"args"} if args else set())
        self.results = self.cache.update(keys, values, index, *args, **kwargs)
        return self.results

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _is_close(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    largest = want.abs().max().float()
    return bool((got.float() - want.float()).abs().max() <= TOLERANCES[want.dtype] * largest)


@functools.cache
def attentions() -> Attentions:
    """transformers' table of attention implementations, with ours in place of `sdpa`."""
    return Attentions(attention_functions())
