"""Matrix products of few rows while decoding on a CPU: our C++ for each weight, one call for layers that share an input.

Reading the weight bounds a product of few rows, and BLAS reads a weight slower than memory allows: `x @ W.T` of torch 2.13
takes up to four times as long as ours for 2 to 8 rows in bfloat16, and up to twice as long in float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.torch.layers.compiled import compiled_parts
from partita.torch.layers.decode_layers import DecodeLayer, faster_layer
from partita.torch.layers.decode_stacks import Stack, can_follow
from partita.torch.layers.decode_steps import faster_step
from partita.torch.layers.inner import has_no_hooks
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.quantized.kernels import DTYPES, NativeWeight, Products, plain_weight
from partita.torch.quantized.kernels import FEW as FEW_ROWS
from partita.torch.quantized.tensor import QuantizedTensor, with_bias

PAYS_AFTER_TOKENS = 32
"""Looking for faster forms of a model's modules pays off after about this many tokens."""

MOST_PLAIN_ROWS = {torch.float32: 48, torch.bfloat16: 8}
"""Up to this many rows of x, our products with plain weights are faster than torch's."""

Product = Callable[[Tensor], Tensor]


@contextmanager
def decoding(model: nn.Module, rows: int, tokens: int) -> Iterator[None]:
    """Speed up the layers of `model` for `rows` rows inside the context, where no gradients are computed.

    Weights stay where they are and must not be moved inside, nor layers be replaced.

    Args:
        model: A split or unsplit model.
        rows: Sequences in a batch.
        tokens: Maximum number of new tokens per sequence.
    """
    forwards = faster_forwards(model, rows, tokens)
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in forwards:
            del layer.forward


def faster_forwards(model: nn.Module, rows: int, tokens: int) -> dict[nn.Module, Callable[..., Any]]:
    """The forwards that `decoding` gives to layers of `model`, which has none of them now; its arguments are the same."""
    if torch.is_autocast_enabled("cpu"):
        return {}
    is_long = tokens >= PAYS_AFTER_TOKENS
    compiled = compiled_parts(model)
    found: dict[nn.Module, Callable[..., Any]] = {}
    products = _products(model, rows if is_long else None)
    for layer in model.modules():
        forward = None if layer in compiled else _faster_forward(layer, products)
        if forward is None and is_long and compiled.isdisjoint(layer.modules()):
            forward = faster_layer(layer, lambda layers: _joint(layers, rows))
        if forward is None and is_long and layer not in compiled and has_no_hooks(layer):
            forward = faster_step(layer)
        if forward is not None:
            found[layer] = forward
    _stack(model, found)
    return found


def _stack(model: nn.Module, forwards: dict[nn.Module, Callable[..., Any]]) -> None:
    """Let layers that follow each other be computed together."""
    for parent in model.modules():
        if not isinstance(parent, nn.ModuleList):
            continue
        run: list[tuple[nn.Module, DecodeLayer]] = []
        for child in (*parent, nn.Module()):
            owner = getattr(forwards.get(child), "__self__", None)
            if isinstance(owner, DecodeLayer) and (not run or can_follow(run[-1][1], owner)):
                run.append((child, owner))
                continue
            if len(run) > 1:
                stack = Stack([fast for _, fast in run])
                for place, (layer, _) in enumerate(run):
                    forwards[layer] = functools.partial(stack.forward, place)
            run = [(child, owner)] if isinstance(owner, DecodeLayer) else []


def _faster_forward(layer: nn.Module, products: dict[nn.Module, Product]) -> Product | None:
    """A forward of `layer` with the same results, without gradients; None if it has none."""
    if not has_no_hooks(layer):
        return None
    if type(layer) is nn.Linear:
        return products.get(layer)
    if not isinstance(layer, ColumnParallelLinear | RowParallelLinear) or layer.sequence_parallel:
        return None
    inner = layer.linear
    if type(inner) is not nn.Linear or not has_no_hooks(inner) or inner.weight.device.type != "cpu":
        return None
    product = products.get(inner) or _usual_product(inner)
    return _column(layer, product) if isinstance(layer, ColumnParallelLinear) else _row(layer, product)


def _usual_product(layer: nn.Linear) -> Product:
    if isinstance(layer.weight, QuantizedTensor):
        return functools.partial(with_bias, weight=layer.weight, bias=layer.bias)
    return functools.partial(F.linear, weight=layer.weight, bias=layer.bias)


def _products(model: nn.Module, rows: int | None) -> dict[nn.Module, Product]:
    """The products of linear layers with quantized weights and, for `rows` rows, those with plain weights that are faster."""
    found: dict[nn.Module, Product] = {}
    for layers in ([model], *(parent.children() for parent in model.modules())):
        groups: dict[tuple[int, torch.dtype, int], list[tuple[nn.Linear, NativeWeight]]] = {}
        for layer in layers:
            inner = layer.linear if isinstance(layer, ColumnParallelLinear | RowParallelLinear) else layer
            if type(inner) is not nn.Linear or inner in found or not has_no_hooks(inner):
                continue
            if isinstance(inner.weight, QuantizedTensor):
                found[inner] = _usual_product(inner)
            weight, most = _native(inner, rows)
            if weight is not None:
                groups.setdefault((weight.shape[1], inner.weight.dtype, most), []).append((inner, weight))
        for (_, dtype, most), members in groups.items():
            siblings = _Siblings([inner for inner, _ in members], [weight for _, weight in members], dtype, most)
            for place, (inner, _) in enumerate(members):
                found[inner] = functools.partial(siblings.output, place)
    return found


def _joint(layers: Sequence[nn.Linear], rows: int) -> tuple[Products, int] | None:
    """The products of layers of one input in one call of C++, and for how many rows it is faster; None if there is none."""
    found, most = zip(*(_native(layer, rows) for layer in layers), strict=True)
    weights, dtypes = [weight for weight in found if weight is not None], {layer.weight.dtype for layer in layers}
    if len(weights) < len(layers) or len(dtypes) > 1 or len({weight.shape[1] for weight in weights}) > 1:
        return None
    return Products(weights, dtypes.pop(), [layer.bias for layer in layers]), min(most)


def _native(layer: nn.Linear, rows: int | None) -> tuple[NativeWeight | None, int]:
    """The kernel of a layer's weight, if it is faster for `rows` rows, and for how many rows it is at most."""
    if isinstance(layer.weight, QuantizedTensor):
        return _quantized(layer), FEW_ROWS.get(layer.weight.dtype, 0)
    most = MOST_PLAIN_ROWS.get(layer.weight.dtype, 0)
    return (_plain(layer) if rows is not None and rows <= most else None), most


def _quantized(layer: nn.Linear) -> NativeWeight | None:
    """The kernel that computes all products with the quantized weight of `layer`, whatever its bias; None if there is none."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, QuantizedTensor)
    if weight.turned or weight.dim() != 2 or len(weight.products) != 1:
        return None
    if weight.dtype not in DTYPES or (bias is not None and bias.dtype != weight.dtype) or 0 in weight.shape:
        return None
    kernel = weight.products[0].kernel() if weight.device.type == "cpu" else None
    return kernel if kernel is not None and kernel.shape == tuple(weight.shape) else None


def _plain(layer: nn.Linear) -> NativeWeight | None:
    weight, bias = layer.weight, layer.bias
    if type(weight) not in (nn.Parameter, Tensor) or (bias is not None and bias.dtype != weight.dtype):
        return None
    return plain_weight(weight)


class _Siblings:
    """Layers of a module with as many inputs. Those that it calls one after the other with the same tensor, as queries, keys
    and values are computed, share calls of C++; the first round of calls shows which.
    """

    def __init__(
        self, layers: list[nn.Linear], weights: list[NativeWeight], dtype: torch.dtype, most_rows: int
    ) -> None:
        self.weights, self.dtype, self.biases = weights, dtype, [layer.bias for layer in layers]
        self.usual = [_usual_product(layer) for layer in layers]
        self.alone = [self.products([place]) for place in range(len(layers))]
        self.groups: list[_Group | None] = [None] * len(layers)
        self.most = most_rows * weights[0].shape[1]
        self.calls: list[tuple[int, Tensor]] | None = [] if len(layers) > 1 else None

    def products(self, places: list[int]) -> Products:
        """The products of the layers at `places` in one call."""
        return Products([self.weights[i] for i in places], self.dtype, [self.biases[i] for i in places])

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of layer `place` for `x`, `[..., in]` to `[..., out]`."""
        if x.dtype is not self.dtype or not 0 < x.numel() <= self.most or not x.is_contiguous():
            return self.usual[place](x)
        if self.calls is not None:
            self._observe(place, x)
        group = self.groups[place]
        return self.alone[place](x)[0] if group is None else group.output(place, x)

    def _observe(self, place: int, x: Tensor) -> None:
        assert self.calls is not None
        if all(place != earlier for earlier, _ in self.calls):
            self.calls.append((place, x))
            return
        for _, calls in itertools.groupby(self.calls, key=lambda call: id(call[1])):
            places = [place for place, _ in calls]
            if len(places) > 1:
                group = _Group(self, places)
                for one in places:
                    self.groups[one] = group
        self.calls = None


class _Group:
    """Layers whose outputs the call of the first computes, and that of the others returns.

    On the first round each computes its own output once more. If one differs, as after a change of the input in between, or if
    a layer was not called, each works alone from then on.
    """

    def __init__(self, siblings: _Siblings, places: list[int]) -> None:
        self.siblings, self.places = siblings, places
        self.together, self.is_checked = siblings.products(places), False
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of layer `place` for `x`."""
        if place == self.places[0]:
            if self.outputs:  # computed in vain
                return self._apart(place, x)
            first, *rest = self.together(x)
            self.input, self.outputs = x, dict(zip(self.places[1:], rest, strict=True))
            return first
        y = self.outputs.pop(place, None) if x is self.input else None
        if y is None or not (self.is_checked or torch.equal(y, self.siblings.alone[place](x)[0])):
            return self._apart(place, x)
        if not self.outputs:
            self.input, self.is_checked = None, True
        return y

    def _apart(self, place: int, x: Tensor) -> Tensor:
        for one in self.places:
            self.siblings.groups[one] = None
        self.input, self.outputs = None, {}
        return self.siblings.alone[place](x)[0]


def _column(layer: ColumnParallelLinear, product: Product) -> Product | None:
    expand, split = layer.expand, layer.comm.size > 1

    def forward(x: Tensor) -> Tensor:
        y = product(x)
        if expand is not None:
            y = y.index_select(-1, expand)
        return layer._gather(y) if split and layer.gather_output else y

    return forward


def _row(layer: RowParallelLinear, product: Product) -> Product | None:
    if layer.split_input:
        return None
    bias, all_reduce_ = layer.bias, layer.comm.all_reduce_

    def forward(x: Tensor) -> Tensor:
        y = all_reduce_(product(x).contiguous())
        return y if bias is None else y + bias.to(y.dtype)

    return forward
