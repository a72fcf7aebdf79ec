"""A quantized weight as a tensor: products with it compute from the codes, and its parameter's name, shape and dtype are those
of the weight as if it were not quantized.

So the layers around it, adapters, stages and ties know nothing of it. It is frozen: what would change its values is an error.
An operation that is not known here computes with the values of the whole weight, which is right, but takes their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from partita.checkpoint.read import Range
from partita.errors import ModelError
from partita.torch.quantized.part import Part
from partita.torch.quantized.products import PartProduct

FROZEN = (
    "the weight is quantized, and its values cannot change. Train adapters (--lora-rank, or peft); to train or merge into the "
    "weights themselves call partita.torch.dequantize(model) first."
)


class QuantizedTensor(torch.Tensor):
    """A weight `[outputs, inputs]`, or `[experts, outputs, inputs]`, whose values are computed from parts when needed.

    Attributes:
        experts: For each expert (one for a matrix) the parts that make up its outputs, one after the other.
        turned: Whether its last two dims are (inputs, outputs).
    """

    experts: tuple[tuple[Part, ...], ...]
    turned: bool
    _products: tuple[PartProduct, ...] | None
    _matrices: dict[int, QuantizedTensor]

    @staticmethod
    def __new__(
        cls, experts: Sequence[Sequence[Part]], dtype: torch.dtype, *, stacked: bool = False, turned: bool = False
    ) -> QuantizedTensor:
        """A tensor with the values of `experts` in `dtype`; with `stacked` it has a dim of experts."""
        first = experts[0]
        matrix = [sum(part.shape[0] for part in first), first[0].shape[1]]
        shape = [len(experts)] * stacked + (matrix[::-1] if turned else matrix)
        made: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=first[0].codes.device)
        made.experts, made.turned = tuple(tuple(parts) for parts in experts), turned
        made._products, made._matrices = None, {}
        return made  # type: ignore[no-any-return]

    @property
    def stored_bytes(self) -> int:
        """Bytes of memory of its parts."""
        return sum(part.nbytes for parts in self.experts for part in parts)

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            raise ModelError(FROZEN)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedTensor:
        """Raise `ModelError` if it is to be trained."""
        self.requires_grad = requires_grad
        return self

    @property
    def data(self) -> QuantizedTensor:
        """The same weight."""
        return self.alike()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, QuantizedTensor):
            raise ModelError(FROZEN)
        # `Module.to` moves a parameter in this way.
        with torch._C.DisableTorchFunctionSubclass():
            Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.experts, self.turned = value.experts, value.turned
        self._products, self._matrices = value._products, value._matrices

    @property
    def products(self) -> tuple[PartProduct, ...]:
        """The products with the parts of a matrix."""
        if self._products is None:
            self._products = tuple(PartProduct(part) for part in self.experts[0])
        return self._products

    def values(self, rows: slice = slice(None)) -> Tensor:
        """Its values; with `rows`, those of some outputs of a matrix."""
        if self.dim() == 2:
            found = self._matrix(0, rows)
            return found.T if self.turned else found
        stacked = torch.stack([self._matrix(expert, slice(None)) for expert in range(len(self.experts))])
        return stacked.transpose(1, 2) if self.turned else stacked

    def _matrix(self, expert: int, rows: slice) -> Tensor:
        """Outputs of an expert, `[outputs, inputs]`."""
        start, stop, _ = rows.indices(sum(part.shape[0] for part in self.experts[expert]))
        found, offset = [], 0
        for part in self.experts[expert]:
            low, high = max(start - offset, 0), min(stop - offset, part.shape[0])
            if low < high:
                found.append(part.rows(slice(low, high), self.dtype))
            offset += part.shape[0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def picked(self, ids: Tensor) -> Tensor:
        """The values of the outputs `ids` `[...]` of a matrix of one part: `[..., inputs]`, the lookup of an embedding."""
        flat = ids.reshape(-1)
        unique, places = flat.unique(return_inverse=True)
        [part] = self.experts[0]
        return part.rows(unique, self.dtype)[places].view(*ids.shape, part.shape[1])

    def expert(self, index: int) -> QuantizedTensor:
        """The matrix of one expert."""
        index = range(len(self.experts))[index]
        if index not in self._matrices:
            self._matrices[index] = QuantizedTensor([self.experts[index]], self.dtype, turned=self.turned)
        return self._matrices[index]

    def part(self, ranges: Sequence[Sequence[Range]]) -> QuantizedTensor:
        """Ranges of each dim, in their order, still quantized."""
        *which, first, second = [list(held) for held in ranges]
        rows, columns = (second, first) if self.turned else (first, second)
        chosen = [e for start, stop in which[0] for e in range(start, stop)] if which else [0]
        taken = [_take_rows(self.experts[e], rows, columns) for e in chosen]
        return QuantizedTensor(taken, self.dtype, stacked=bool(which), turned=self.turned)

    def alike(
        self, change: Callable[[Part], Part] = lambda part: part, dtype: torch.dtype | None = None
    ) -> QuantizedTensor:
        """A tensor of changed parts."""
        experts = [[change(part) for part in parts] for parts in self.experts]
        return QuantizedTensor(experts, dtype or self.dtype, stacked=self.dim() == 3, turned=self.turned)

    def __deepcopy__(self, memo: dict[int, object]) -> QuantizedTensor:
        """A copy that shares its values, which never change."""
        made = self.alike()
        if getattr(self, "_is_param", False):
            made._is_param = True
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            "a quantized weight cannot be pickled. Use partita.torch.save(), which writes its bytes unchanged."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        forms = sorted({part.encoding.dtype or part.encoding.kind for parts in self.experts for part in parts})
        return f"QuantizedTensor({tuple(self.shape)}, {', '.join(forms)}, {self.dtype}, {self.stored_bytes:,} bytes)"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = _FUNCTIONS.get(func)
        if known is not None:
            found = known(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = _OPERATORS.get(func)
        if known is not None and isinstance(args[0], QuantizedTensor):
            return known(*args, **(kwargs or {}))
        if any(
            argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, QuantizedTensor)
            for argument, value in zip(func._schema.arguments, args, strict=False)
        ):
            raise ModelError(FROZEN)
        return func(*_plain(args), **{name: _plain(value) for name, value in (kwargs or {}).items()})


def has_quantized(model: nn.Module) -> bool:
    """Whether a weight of a model is quantized."""
    return any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters())


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Replace the quantized weights of a model by their values in its dtype, in place; tied weights stay tied.

    They can then be trained, merged with adapters, and saved like those of any model. Weights are replaced one at a time.

    Args:
        model: A model that `partita.torch.load` returned, on every rank.

    Returns:
        The model.

    Examples:
        >>> model = pt.dequantize(pt.load("./model", tp=2))  # no change for a model that is not quantized
    """
    replaced: dict[int, nn.Parameter] = {}
    module: Any
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, QuantizedTensor):
                if id(weight) not in replaced:
                    replaced[id(weight)] = nn.Parameter(weight.values().contiguous())
                module._parameters[name] = replaced[id(weight)]
    if hasattr(model, "partita_quantized"):
        del model.partita_quantized
    return model


def _take_rows(parts: Sequence[Part], rows: Sequence[Range], columns: list[Range]) -> list[Part]:
    """Ranges of the outputs of parts that stand one after the other, and of their inputs."""
    taken: list[Part] = []
    if len(parts) == 1:
        return [parts[0].take(list(rows), columns)]
    for start, stop in rows:
        offset = 0
        for part in parts:
            low, high = max(start - offset, 0), min(stop - offset, part.shape[0])
            if low < high:
                taken.append(part.take([(low, high)], columns))
            offset += part.shape[0]
    return taken


def _plain(value: Any) -> Any:
    if isinstance(value, QuantizedTensor):
        return value.values()
    return type(value)(_plain(one) for one in value) if isinstance(value, list | tuple) else value


class _Product(Function):
    """`x [..., inputs]` times a weight `[outputs, inputs]`; tiles of its outputs are computed one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedTensor) -> Tensor:
        ctx.weight = weight
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return input_gradient(grad, ctx.weight), None


def product(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """`x [..., inputs] @ weight.T`, `[..., outputs]`, without gradients."""
    parts = [one(x) for one in weight.products]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def input_gradient(grad: Tensor, weight: QuantizedTensor) -> Tensor:
    """`grad [..., outputs] @ weight`, `[..., inputs]`."""
    if len(weight.products) == 1:
        return weight.products[0].input_gradient(grad)
    sizes = [one.part.shape[0] for one in weight.products]
    parts = [one.input_gradient(part) for one, part in zip(weight.products, grad.split(sizes, -1), strict=True)]
    return torch.stack(parts).sum(0)


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, QuantizedTensor) or isinstance(x, QuantizedTensor) or weight.turned or weight.dim() != 2:
        return NotImplemented
    return with_bias(x, weight, bias)


def with_bias(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """`x [..., inputs] @ weight.T + bias`, `[..., outputs]`; the gradient of `x` is recorded."""
    y: Tensor = _Product.apply(x, weight) if torch.is_grad_enabled() and x.requires_grad else product(x, weight)
    return y if bias is None else y + bias


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """transformers' Conv1D: `bias + x @ weight` with a weight [inputs, outputs]."""
    if not isinstance(weight, QuantizedTensor) or not weight.turned or weight.dim() != 2 or (beta, alpha) != (1, 1):
        return NotImplemented
    return with_bias(x, weight, bias)


def _embedding(ids: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(weight, QuantizedTensor) or weight.turned or len(weight.experts[0]) != 1:
        return NotImplemented
    return weight.picked(ids)


def _matmul(x: Any, weight: Any) -> Any:
    """`x @ weight`, as backward computes it, or the experts of some families."""
    if not isinstance(weight, QuantizedTensor) or isinstance(x, QuantizedTensor) or weight.dim() != 2:
        return NotImplemented
    if weight.turned:
        return with_bias(x, weight, None)
    return NotImplemented if torch.is_grad_enabled() and x.requires_grad else input_gradient(x, weight)


def _getitem(weight: Any, index: Any) -> Any:
    if not isinstance(weight, QuantizedTensor) or weight.dim() != 3:
        return NotImplemented
    if isinstance(index, Tensor) and index.dim() == 0:
        index = int(index)
    return weight.expert(index) if isinstance(index, int) else NotImplemented


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__getitem__: _getitem,
}


def _to_copy(weight: QuantizedTensor, *, dtype: Any = None, device: Any = None, **_: Any) -> QuantizedTensor:
    return weight.alike(
        lambda part: part.mapped(lambda tensor: tensor.to(device)) if device is not None else part, dtype
    )


def _turn(weight: QuantizedTensor, *_: Any) -> QuantizedTensor:
    return QuantizedTensor(weight.experts, weight.dtype, stacked=weight.dim() == 3, turned=not weight.turned)


def _transpose(weight: QuantizedTensor, first: int, second: int) -> Any:
    dims = {first % weight.dim(), second % weight.dim()}
    if dims == {weight.dim() - 2, weight.dim() - 1}:
        return _turn(weight)
    return weight.values().transpose(first, second)


_aten = torch.ops.aten
_OPERATORS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: lambda weight: weight.alike(),
    _aten.alias.default: lambda weight: weight.alike(),
    _aten.clone.default: lambda weight, **_: weight.alike(),
    _aten._to_copy.default: _to_copy,
    _aten.t.default: _turn,
    _aten.transpose.int: _transpose,
}
