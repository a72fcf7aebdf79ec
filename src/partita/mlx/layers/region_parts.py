"""Modules inside a split region, or at its edge, that are not column or row layers: norms of heads, latents, experts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.mappings import copy_to, reduce_from
from partita.mlx.mlx_lm_internals import last_of_stack


class Around(nn.Module):
    """A wrapper of a module `inner`, which provides all attributes except the call."""

    def __init__(self, inner: nn.Module) -> None:
        """Wrap `inner`."""
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "inner" not in self:
                raise
            return getattr(self["inner"], name)


class _OfRegion(Around):
    def __init__(self, inner: nn.Module, comm: Communicator) -> None:
        super().__init__(inner)
        self.comm = comm


class InsideRegion(_OfRegion):
    """A replicated module that receives only its rank's part (a norm of each head).

    Forward as it is. The gradient of each of its parameters, of which a rank has a part, is summed over the ranks.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        with _changed(self["inner"], lambda x: copy_to(x, self.comm)):
            return self["inner"](*args, **kwargs)


class EntersRegion(_OfRegion):
    """A replicated module whose last `count` outputs directly enter a split region.

    Forward as it is. Their gradient, of which each rank has a part, is summed over the ranks.
    """

    def __init__(self, inner: nn.Module, comm: Communicator, count: int) -> None:
        super().__init__(inner, comm)
        self.count = count

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """The module's output, `[..., out]`."""
        y = self["inner"](*args, **kwargs)
        rest = y.shape[-1] - self.count
        if rest == 0:
            return copy_to(y, self.comm)
        return mx.concatenate([y[..., :rest], copy_to(y[..., rest:], self.comm)], axis=-1)


class SplitExperts(_OfRegion):
    """mlx-lm's stacked experts, whose inner width I is split over the ranks.

    Rank r holds of E experts `gate_proj` and `up_proj [E, I_r, H]` and `down_proj [E, H, I_r]`.

        forward          y [..., k, H] = sum over the ranks of experts_r(x [..., H], indices [..., k])
        input gradient   sum over the ranks
        biases           of `down_proj [E, H]` added on the first rank, their gradient the same on all
    """

    def __call__(self, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """The output of the experts `indices` for `x`."""
        experts = self["inner"]
        x = copy_to(x, self.comm)
        with _changed(last_of_stack(experts), lambda bias: _on_first(bias, self.comm), only="bias"):
            y = experts(x, indices, *args, **kwargs)
        return reduce_from(y, self.comm)


def _on_first(x: mx.array, comm: Communicator) -> mx.array:
    """`x` on the first rank and zeros on others, for a later sum; backward as it is."""
    function: Any = mx.custom_function(lambda x: x if comm.rank == 0 else mx.zeros_like(x))
    function.vjp(lambda primal, cotangent, output: cotangent)
    return function(x)


@contextlib.contextmanager
def _changed(module: nn.Module, change: Callable[[mx.array], mx.array], only: str | None = None) -> Iterator[None]:
    """Replace a module's own floating parameters (or the one named `only`) by the result of `change` inside the context."""
    kept = {
        name: value
        for name, value in module.items()
        if isinstance(value, mx.array)
        and not name.startswith("_")
        and only in (None, name)
        and mx.issubdtype(value.dtype, mx.floating)
    }
    for name, value in kept.items():
        module[name] = change(value)
    try:
        yield
    finally:
        for name, value in kept.items():
            module[name] = value
