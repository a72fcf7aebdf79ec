"""Collectives as operators of torch, so that `torch.compile` traces a forward with collectives without graph breaks.

An operator takes no Python objects, so it names its communicator by `Communicator.key`. While a graph is compiled only shapes
are computed, without communication: ranks may compile at different times and different numbers of times. Operators are
effectful, so a compiler neither removes nor reorders them, and ranks whose graphs differ start their collectives in the same
order.

    all_reduce(x, key, op)               (*) -> (*)
    all_gather(x, key, dim, sizes)       [..., sizes[rank], ...] -> [..., sum(sizes), ...]
    reduce_scatter(x, key, dim, sizes)   [..., sum(sizes), ...] -> [..., sizes[rank], ...]

The results are new contiguous tensors. The gradients are those of `mappings`, whose functions call these operators. A call of
an operator costs more than a direct call, so the eager path calls the communicator directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library import simple_registry
from torch._library.effects import EffectType

if TYPE_CHECKING:
    from partita.torch.collectives.comm import Communicator

Method = TypeVar("Method", bound=Callable[..., Any])

_BY_KEY: WeakValueDictionary[str, Communicator] = WeakValueDictionary()
_counter = 0

_REDUCTIONS = {
    "sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.AVG, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}  # fmt: skip


def register(comm: Communicator) -> str:
    """The key of a new communicator.

    It contains the ranks, because compilers cache graphs on disk and ranks of one machine share the cache.
    """
    global _counter
    _counter += 1
    key = f"{_counter}: rank {comm.rank} of {comm.global_ranks}"
    _BY_KEY[key] = comm
    return key


_library = torch.library.Library("partita", "DEF")
_library.define("all_reduce(Tensor x, str key, str op) -> Tensor")
_library.define("all_gather(Tensor x, str key, int dim, SymInt[] sizes) -> Tensor")
_library.define("reduce_scatter(Tensor x, str key, int dim, SymInt[] sizes) -> Tensor")


def _all_reduce(x: Tensor, key: str, op: str) -> Tensor:
    return _BY_KEY[key].all_reduce_(x.clone(memory_format=torch.contiguous_format), _REDUCTIONS[op])


def _all_gather(x: Tensor, key: str, dim: int, sizes: Sequence[int]) -> Tensor:
    return _BY_KEY[key].all_gather(x, dim, sizes).contiguous()


def _reduce_scatter(x: Tensor, key: str, dim: int, sizes: Sequence[int]) -> Tensor:
    return _BY_KEY[key].reduce_scatter(x, dim, sizes).contiguous()


def _like(x: Tensor, dim: int, size: Any) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


_library.impl("all_reduce", _all_reduce, "CompositeExplicitAutograd")
_library.impl("all_gather", _all_gather, "CompositeExplicitAutograd")
_library.impl("reduce_scatter", _reduce_scatter, "CompositeExplicitAutograd")
torch.library.register_fake("partita::all_reduce", lambda x, key, op: x.new_empty(x.shape), lib=_library)
torch.library.register_fake("partita::all_gather", lambda x, key, dim, sizes: _like(x, dim, sum(sizes)), lib=_library)
torch.library.register_fake(
    "partita::reduce_scatter", lambda x, key, dim, sizes: _like(x, dim, sizes[_BY_KEY[key].rank]), lib=_library
)
for _name in ("all_reduce", "all_gather", "reduce_scatter"):
    # torch.library._register_effectful_op does the same, but imports torch._dynamo, which takes seconds.
    _holder = simple_registry.singleton.find(f"partita::{_name}").effect
    _library._registration_handles.append(_holder.register(EffectType.ORDERED))


def traced_as(traced: Callable[..., Any]) -> Callable[[Method], Method]:
    """Decorate a method of a communicator: call `traced` in its place while a graph is compiled."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return traced(*args, **kwargs)
            return method(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def all_reduce_(comm: Communicator, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """`Communicator.all_reduce_` in a compiled graph."""
    if comm.size == 1:
        return tensor
    name = next(name for name, value in _REDUCTIONS.items() if value == op)
    return tensor.copy_(torch.ops.partita.all_reduce(tensor, comm.key, name))


def all_gather(comm: Communicator, tensor: Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
    """`Communicator.all_gather` in a compiled graph."""
    if comm.size == 1:
        return tensor
    sizes = list(sizes) if sizes is not None else [tensor.shape[dim]] * comm.size
    result: Tensor = torch.ops.partita.all_gather(tensor, comm.key, dim, sizes)
    return result


def reduce_scatter(comm: Communicator, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """`Communicator.reduce_scatter` in a compiled graph."""
    if comm.size == 1:
        return tensor
    sizes = list(sizes) if sizes is not None else list(comm.even_sizes(tensor.shape[dim]))
    result: Tensor = torch.ops.partita.reduce_scatter(tensor, comm.key, dim, sizes)
    return result
