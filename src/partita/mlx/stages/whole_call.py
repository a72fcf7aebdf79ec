"""Calling a model that is split into stages: every rank calls it like the unsplit model and gets the full output.

Such a call runs a single batch without gradients; `pipeline.Pipeline` runs schedules of many, forward and backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from functools import wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.plan import Plan
from partita.errors import ModelError
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.model.cache import count_tokens
from partita.mlx.stages.layers import Message
from partita.mlx.stages.links import Links
from partita.mlx.stages.run import length_of, run_stage


def call_as_whole(model: nn.Module, plan: Plan, groups: ParallelGroups) -> None:
    """Make a call of `model`, which is split into stages, run the whole pipeline."""
    if plan.num_stages == 1:
        return
    cls: Any = type(model)
    whole = _Whole(model, plan, groups)

    signature = inspect.signature(cls.__call__)

    # Python looks up `__call__` on classes only, so the model gets a subclass with the family's class name.
    @wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        # Families differ in the names and the order of their arguments: `x`, `tokens`, a mask before the cache.
        (_, (_, inputs), *rest) = signature.bind(self, *args, **kwargs).arguments.items()
        options = {name: value for name, value in rest if value is not None}
        return self.partita_whole(self, inputs, options.pop("cache", None), options)

    model.__class__ = type(
        cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "partita_unsplit": cls}
    )
    model.partita_whole = whole


class _Whole:
    """Runs one rank's stages of a call, and sends the output to every rank."""

    def __init__(self, model: nn.Module, plan: Plan, groups: ParallelGroups) -> None:
        self.plan, self.pp, self.links = plan, groups.pp, Links(groups.pp)
        mine = (plan.stage_index(groups.pp.rank, vpp) for vpp in range(plan.vpp))
        # A layout may have empty stages after the loss.
        self.stages = sorted(stage for stage in mine if stage <= plan.loss_stage)
        self.forms: dict[Hashable, Any] = {}

    def __call__(self, model: Any, inputs: mx.array, cache: Any, options: dict[str, Any]) -> mx.array:
        """Run one forward, with the arguments and result of the unsplit model."""
        if cache is not None and self.plan.vpp > 1:
            raise ModelError(
                "several stages of one rank would share a cache, and each would count its tokens. Call "
                "partita.mlx.generate(), or use vpp=1."
            )
        key = (_form(inputs), *((name, _form(value)) for name, value in sorted(options.items())))
        made: Any = None
        for stage in self.stages:
            received = made
            if stage > 0 and self.plan.stage_rank(stage - 1) != self.pp.rank:
                received = self.links.receive(self.plan.stage_rank(stage - 1), stage, key)
            made = run_stage(model, self.plan, stage, received, inputs, cache, options)
            _refuse_tracing(made)
            if stage < self.plan.loss_stage and self.plan.stage_rank(stage + 1) != self.pp.rank:
                self.links.send(self.plan.stage_rank(stage + 1), stage, made, key)
        if not self.stages and isinstance(cache, list):
            count_tokens(cache, [], length_of(inputs, options))
        return self._everywhere(made, key)

    def _everywhere(self, output: Any, key: Hashable) -> mx.array:
        last = self.plan.stage_rank(self.plan.loss_stage)
        form = self.forms.get(key)
        if form is None:
            mine = [str(output.dtype).removeprefix("mlx.core."), output.shape] if self.pp.rank == last else None
            name, shape = self.pp.broadcast_object(mine, last)
            form = self.forms[key] = getattr(mx, name), shape
        dtype, shape = form
        return self.pp.broadcast(output if self.pp.rank == last else mx.zeros(shape, dtype), last)


def _form(value: Any) -> Hashable:
    """What determines the form of a message: an array's shape and dtype."""
    return (value.shape, str(value.dtype)) if isinstance(value, mx.array) else str(type(value))


def _refuse_tracing(made: Any) -> None:
    """Raise `ModelError` within `mx.grad` and similar: calls have no gradients across stages."""
    if isinstance(made, Message):
        arrays = list(made.arrays)
    elif isinstance(made, mx.array):
        arrays = [made]
    else:
        raise ModelError(
            f"it returns {type(made).__name__}, not an array of logits, so it cannot be split into stages. Use pp=1."
        )
    try:
        mx.async_eval(arrays)
    except ValueError as error:
        raise ModelError(
            "calling a model that is split into stages returns its output only, without gradients across stages. Call "
            "partita.mlx.train(), or run its schedule with partita.mlx.Pipeline."
        ) from error
