"""Matrix products of few rows with large weights on a CPU while decoding: memory layout of the weights and operand order.

Reading the weight bounds a product of few rows, and BLAS does not read every layout equally fast. For a weight
of 1536 x 576, microseconds a product (MKL, oneDNN and FBGEMM of torch 2.13, AMD EPYC, one thread):

    rows                                        float32                       bfloat16
                                                1     2     3     4     8     1     2     3     4     8
    x @ W.T, rows of W one after another        215   313   370   308   365   116   119   119   118   133
    x @ W.T, columns one after another          134   221   266   274   333   165   165   163   167   181
    (W @ x.T).T, rows one after another         217   142   189   155   324   116   241   239   244   239
    sums of rows of W.T, columns one after ...  88    138   171   199   318   48    69    88    101   158
    reading the weight                          94                            57

The last is an embedding bag: a sum of rows, each times a factor, which FBGEMM computes in float32 for both dtypes. So the
weights are transposed for one sequence (for two in bfloat16) and multiplied as bags; for a few, the float32 product is
transposed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.torch.layers.compiled import compiled_parts
from partita.torch.layers.decode_steps import faster_step
from partita.torch.layers.inner import has_no_hooks
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.quantized.kernels import DTYPES, Kernel, Products
from partita.torch.quantized.kernels import FEW as FEW_ROWS
from partita.torch.quantized.tensor import QuantizedTensor, with_bias

PAYS_AFTER_TOKENS = 32
"""Transposing a weight, and looking for faster forms of a model's modules, pays off after about this many tokens."""

FEW = range(2, 9)
"""Numbers of rows for which the float32 product is transposed, and up to which bags are faster."""

BLOCK_BYTES = 512 << 10
"""Bags of several rows read a weight by blocks of columns of at most this size, which a core's cache keeps."""

LONGEST_SUM = 1024
"""float32 products of more inputs than this are sums of shorter ones, whose rounding errors are smaller."""

Product = Callable[[Tensor], Tensor]


@contextmanager
def decoding(model: nn.Module, rows: int, tokens: int) -> Iterator[None]:
    """Speed up the layers of `model` for `rows` rows inside the context, where no gradients are computed.

    The memory layout of weights may differ afterwards; shapes, values and parameters stay the same. One weight at a time is
    held twice.

    Args:
        model: A split or unsplit model.
        rows: Sequences in a batch.
        tokens: Maximum number of new tokens per sequence.
    """
    if torch.is_autocast_enabled("cpu"):
        yield
        return
    is_long = tokens >= PAYS_AFTER_TOKENS
    if is_long:
        for layer in model.modules():
            if type(layer) is nn.Linear and layer.weight.is_contiguous() and _prefers_columns(layer.weight, rows):
                layer.weight.data = layer.weight.data.T.contiguous().T
    compiled = compiled_parts(model)
    changed: list[nn.Module] = []
    together = _siblings(model)
    for layer in model.modules():
        forward = None if layer in compiled else _faster_forward(layer, rows, together.get(layer))
        if forward is None and is_long and layer not in compiled and has_no_hooks(layer):
            forward = faster_step(layer)
        if forward is not None:
            layer.forward = forward
            changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _prefers_columns(weight: Tensor, rows: int) -> bool:
    if weight.device.type != "cpu" or isinstance(weight, QuantizedTensor):
        return False
    if weight.dtype == torch.float32:
        return rows not in FEW
    return weight.dtype == torch.bfloat16 and rows <= 2 and _has_bags()


@functools.cache
def _has_bags() -> bool:
    """Whether torch computes embedding bags with FBGEMM, which exists for x86 only."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def _faster_forward(layer: nn.Module, rows: int, together: Product | None) -> Product | None:
    """A forward of `layer` for `rows` rows with the same results, without gradients; None if it has none.

    `together` is its product with those of its siblings, if it has one.
    """
    if not has_no_hooks(layer):
        return None
    if type(layer) is nn.Linear:
        return together or _product(layer, rows)
    if not isinstance(layer, ColumnParallelLinear | RowParallelLinear) or layer.sequence_parallel:
        return None
    inner = layer.linear
    if type(inner) is not nn.Linear or not has_no_hooks(inner) or inner.weight.device.type != "cpu":
        return None
    product = together or _product(inner, rows) or functools.partial(F.linear, weight=inner.weight, bias=inner.bias)
    return _column(layer, product) if isinstance(layer, ColumnParallelLinear) else _row(layer, product)


def _siblings(model: nn.Module) -> dict[nn.Module, Product]:
    """The products of layers with native kernels; the children of a module with as many inputs share calls of C++."""
    found: dict[nn.Module, Product] = {}
    for parent in model.modules():
        groups: dict[tuple[int, torch.dtype], list[tuple[nn.Module, nn.Linear, Kernel]]] = {}
        for layer in parent.children():
            inner = getattr(layer, "linear", None) if isinstance(layer, ColumnParallelLinear) else layer
            if type(inner) is not nn.Linear or layer in found or not (has_no_hooks(layer) and has_no_hooks(inner)):
                continue
            kernel = _kernel(inner)
            if kernel is not None:
                groups.setdefault((kernel.shape[1], inner.weight.dtype), []).append((layer, inner, kernel))
        for (_, dtype), members in groups.items():
            products = _Siblings([inner for _, inner, _ in members], [kernel for _, _, kernel in members], dtype)
            for place, (layer, _, _) in enumerate(members):
                found[layer] = functools.partial(products.output, place)
    return found


def _kernel(layer: nn.Linear) -> Kernel | None:
    """The kernel that computes all products with the weight of `layer`, whatever its bias; None if there is none."""
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, QuantizedTensor) or weight.turned or weight.dim() != 2 or len(weight.products) != 1:
        return None
    if weight.dtype not in DTYPES or (bias is not None and bias.dtype != weight.dtype) or 0 in weight.shape:
        return None
    kernel = weight.products[0].kernel() if weight.device.type == "cpu" else None
    return kernel if kernel is not None and kernel.shape == tuple(weight.shape) else None


class _Siblings:
    """Layers that a module calls one after the other with the same tensor, as queries, keys and values are computed.

    The first call computes the outputs of all, the others return them. On the first round each computes its own output once
    more. If one differs, as after a change of the input in between, or if a layer was not called, each works alone from then
    on.
    """

    def __init__(self, layers: list[nn.Linear], kernels: list[Kernel], dtype: torch.dtype) -> None:
        self.layers, self.dtype, self.inputs = layers, dtype, kernels[0].shape[1]
        self.all = Products(kernels, dtype, [layer.bias for layer in layers])
        self.alone = [Products([kernel], dtype, [layer.bias]) for kernel, layer in zip(kernels, layers, strict=True)]
        self.are_together, self.is_checked = len(layers) > 1, False
        self.most = FEW_ROWS[dtype] * self.inputs
        self.input: Tensor | None = None
        self.outputs: list[Tensor | None] = []

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of layer `place` for `x`, `[..., in]` to `[..., out]`."""
        if x is self.input:
            y, self.outputs[place] = self.outputs[place], None
            if place == len(self.outputs) - 1:
                self._end()
            if y is not None and (self.is_checked or self._is_right(place, x, y)):
                return y
        if x.dtype is not self.dtype or not 0 < x.numel() <= self.most or not x.is_contiguous():
            return with_bias(x, self.layers[place].weight, self.layers[place].bias)  # type: ignore[arg-type]
        if place or not self.are_together:
            return self.alone[place](x)[0]
        if self.input is not None:
            # Some outputs of the previous round were computed in vain.
            self.are_together, self.input, self.outputs = False, None, []
            return self.alone[0](x)[0]
        first, *rest = self.all(x)
        self.input, self.outputs = x, [None, *rest]
        return first

    def _end(self) -> None:
        self.are_together = self.are_together and not any(y is not None for y in self.outputs)
        self.input, self.outputs = None, []

    def _is_right(self, place: int, x: Tensor, y: Tensor) -> bool:
        same = torch.equal(y, self.alone[place](x)[0])
        self.are_together = self.are_together and same
        self.is_checked = place == len(self.layers) - 1
        return same


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


def _product(layer: nn.Linear, rows: int) -> Product | None:
    """The product of a layer without hooks as bags or transposed; None if torch's own is as fast."""
    weight = layer.weight
    if isinstance(weight, QuantizedTensor):
        return functools.partial(with_bias, weight=weight, bias=layer.bias)
    if weight.device.type != "cpu" or rows >= FEW.stop or min(weight.shape) == 0:
        return None
    if weight.T.is_contiguous() and weight.dtype in (torch.float32, torch.bfloat16) and _has_bags():
        return _in_bags(layer)
    if weight.is_contiguous() and weight.dtype == torch.float32 and rows in FEW:
        return functools.partial(_turned, layer)
    return None


def _turned(layer: nn.Linear, x: Tensor) -> Tensor:
    """The output of `layer` for `x`, `[..., in]` to `[..., out]`."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] not in FEW:
        return F.linear(x, layer.weight, layer.bias)
    y = (layer.weight @ flat.T).T.reshape(*x.shape[:-1], -1)
    return y if layer.bias is None else y + layer.bias


def _in_bags(layer: nn.Linear) -> Product:
    weight, bias = layer.weight, layer.bias
    outputs, inputs = weight.shape
    columns, dtype, most = weight.detach().T, weight.dtype, (FEW.stop - 1) * inputs
    threads = torch.get_num_threads()

    def product(x: Tensor) -> Tensor:
        if x.dtype is not dtype or not 0 < x.numel() <= most:
            return F.linear(x, weight, bias)
        bags = _bags(dtype, inputs, outputs, x.numel() // inputs, threads)
        y = bags.sums(columns, x).view(*x.shape[:-1], outputs)
        return y if bias is None else y + bias

    return product


@dataclass(frozen=True)
class _Bags:
    """Bags for the products of `rows` rows with weights of one shape, by blocks of columns.

    Attributes:
        indices: Rows of the transposed weight `[in * blocks, out / blocks]`, int32 `[blocks * rows * in]`.
        offsets: Beginning of each bag in `indices`, int32 `[blocks * rows * parts]`.
        rows: Rows of the input.
        blocks: Blocks of columns.
        parts: Bags whose sum is one output.
    """

    indices: Tensor
    offsets: Tensor
    rows: int
    blocks: int
    parts: int

    def sums(self, columns: Tensor, x: Tensor) -> Tensor:
        """The product of `x`, `[..., in]` with `rows` rows, and the transposed weight `columns`, `[in, out]`; contiguous."""
        factors = x.reshape(-1)
        if self.blocks > 1:
            inputs, outputs = columns.shape
            factors = factors.expand(self.blocks, -1).reshape(-1)
            columns = columns.view(inputs * self.blocks, outputs // self.blocks)
        y: Tensor = torch._embedding_bag_forward_only(
            columns, self.indices, self.offsets, False, 0, False, factors, False, -1
        )[0]
        if self.parts > 1:
            y = y.view(self.blocks * self.rows, self.parts, -1).sum(1)
        if self.blocks > 1 and self.rows > 1:
            y = y.view(self.blocks, self.rows, -1).transpose(0, 1).contiguous()
        return y


@functools.cache
def _bags(dtype: torch.dtype, inputs: int, outputs: int, rows: int, threads: int) -> _Bags:
    """The bags for a shape: enough that every thread has one, and blocks that fit the cache where several rows read them."""
    block_bytes = BLOCK_BYTES if rows > 1 else inputs * outputs * dtype.itemsize
    wanted = max(-(-threads // rows), -(-inputs * outputs * dtype.itemsize // block_bytes))
    blocks = next(n for n in range(min(wanted, max(8, threads), outputs), 0, -1) if outputs % n == 0)
    parts = -(-inputs // LONGEST_SUM) if dtype == torch.float32 else 1
    places = torch.arange(inputs, dtype=torch.int32) * blocks + torch.arange(blocks, dtype=torch.int32)[:, None, None]
    begins = [bag * inputs + part * inputs // parts for bag in range(blocks * rows) for part in range(parts)]
    return _Bags(
        places.expand(blocks, rows, inputs).reshape(-1), torch.tensor(begins, dtype=torch.int32), rows, blocks, parts
    )
