"""The trainable arrays of a model by unsplit name, and the gradients of a function of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.mlx.model.parts import is_packed, parameter_homes

Function = Callable[[list[mx.array]], list[mx.array]]
"""Takes arrays that are not parameters; reads the parameters from the model."""


class Trainable:
    """The floating arrays of a model that are neither frozen nor packed, this rank's part of each.

    Attributes:
        homes: By name in the unsplit model, what holds the array and under which key.
    """

    def __init__(self, model: nn.Module, keep: Callable[[str], bool] = lambda name: True) -> None:
        """Collect the trainable arrays of `model`, split or not, in its current frozen state, filtered by name."""
        self.homes = {
            name: (home, key)
            for name, (home, key) in parameter_homes(model).items()
            if mx.issubdtype(home[key].dtype, mx.floating)
            and not is_packed(home, key)
            and key not in getattr(home, "_no_grad", ())
            and keep(name)
        }

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Unsplit names of the arrays."""
        return tuple(self.homes)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays in the order of `names`."""
        return [home[key] for home, key in self.homes.values()]

    def set(self, arrays: Sequence[mx.array]) -> None:
        """Set the model's arrays."""
        for (home, key), array in zip(self.homes.values(), arrays, strict=True):
            home[key] = array

    @contextmanager
    def given(self, arrays: Sequence[mx.array]) -> Iterator[None]:
        """Replace the model's arrays inside the context, for example by those of a gradient trace."""
        kept = self.arrays
        self.set(arrays)
        try:
            yield
        finally:
            self.set(kept)

    def vjp(
        self, function: Function, others: list[mx.array], cotangents: list[mx.array]
    ) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
        """The result of `function` for the parameters and `others`, and its gradients weighted by `cotangents`; lazy.

        Returns:
            The result, the gradients of the parameters, and those of `others` (zeros for non-floating arrays).
        """
        count = len(self.names)
        floating = [i for i, x in enumerate(others) if mx.issubdtype(x.dtype, mx.floating)]

        def flat(*arrays: mx.array) -> list[mx.array]:
            full = list(others)
            for place, array in zip(floating, arrays[count:], strict=True):
                full[place] = array
            with self.given(arrays[:count]):
                return function(full)

        primals = [*self.arrays, *(others[i] for i in floating)]
        if not primals:
            return function(others), [], [mx.zeros_like(x) for x in others]
        made, found = mx.vjp(flat, primals, cotangents)
        gradients: dict[int, Any] = dict(zip(floating, found[count:], strict=True))
        return made, found[:count], [gradients.get(i, mx.zeros_like(x)) for i, x in enumerate(others)]
