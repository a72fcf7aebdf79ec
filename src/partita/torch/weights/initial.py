"""Initial weights that do not depend on how the model is split.

The model's own initialization runs once on the meta device, where it computes nothing but is recorded: this tensor is
filled with that distribution. Each rank then samples its part from generators seeded by the tensor's name, in blocks of
rows, so that no rank holds a large tensor unsplit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from partita.core.sharding.cuts import TensorPlan
from partita.errors import ModelError
from partita.torch.layers.inner import take_ranges
from partita.torch.transformers_internals import can_initialize, initialize

BLOCK_ELEMENTS = 1 << 22
"""Approximate number of elements to sample from one generator."""


@dataclass
class Recipe:
    """Initialization of one tensor: in-place operations on all of it, then rows that are set to a value."""

    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    rows: dict[int, float] = field(default_factory=dict)
    unknown: str = ""


_DRAWS = ("normal_", "uniform_", "fill_", "zero_", "copy_")
_CHANGES = ("mul_", "add_", "sub_", "div_", "erfinv_", "clamp_", "clamp_min_", "clamp_max_", "exp_", "log_", "neg_")


class _Recorder(TorchDispatchMode):
    """Records in-place operations on the tensors of a model on the meta device."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        for name, tensor in tensors.items():
            self.names.setdefault(id(tensor), name)
        self.recipes = {name: Recipe() for name in tensors}
        self.views: dict[int, tuple[Tensor, str, int]] = {}
        self.others: dict[int, tuple[Tensor, Recipe]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func._schema.name.removeprefix("aten::")
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is None:
            return result
        name = self.names.get(id(target))
        if name is not None:
            recipe = self.recipes[name]
            if operation in ("select", "slice") or (isinstance(result, Tensor) and result._is_view()):
                row = args[2] if operation == "select" and len(args) > 2 and args[1] == 0 else None
                self.views[id(result)] = (result, name, row % target.shape[0] if isinstance(row, int) else -1)
            else:
                self._record(recipe, target, func, args[1:], kwargs or {})
        elif id(target) in self.views:
            _, name, row = self.views[id(target)]
            if row >= 0 and operation in ("zero_", "fill_"):
                self.recipes[name].rows[row] = float(args[1]) if operation == "fill_" else 0.0
            elif operation.endswith("_"):
                self.recipes[name].unknown = f"{operation} on a part"
        elif target.device.type == "meta" and operation.endswith("_"):
            # Keeping the tensor keeps its `id` its own.
            _, recipe = self.others.setdefault(id(target), (target, Recipe()))
            self._record(recipe, target, func, args[1:], kwargs or {})
        return result

    def _record(self, recipe: Recipe, target: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record an operation on all of `target`."""
        operation = func._schema.name.removeprefix("aten::")
        source = self.others.get(id(args[0])) if operation == "copy_" else None
        if source is not None and source[0].shape == target.shape:
            # Sampled apart, and then copied: the same as sampled here.
            recipe.steps, recipe.rows, recipe.unknown = [*source[1].steps], {}, source[1].unknown
        elif operation in _DRAWS:
            recipe.steps, recipe.rows = [(func, args, kwargs)], {}
        elif operation in _CHANGES:
            recipe.steps.append((func, args, kwargs))
        elif operation.endswith("_"):
            recipe.unknown = operation


def record_initialization(model: nn.Module) -> dict[str, Recipe]:
    """Record how the model's own initialization fills each tensor of an unsplit model on the meta device."""
    tensors = dict(model.state_dict(keep_vars=True))
    recorder = _Recorder(tensors)
    if not can_initialize(model):
        raise ModelError(f"{type(model).__name__} is not a transformers model, so its initial weights are unknown.")
    with recorder:
        initialize(model)
    return recorder.recipes


class FreshFill:
    """Fills local tensors with their part of the unsplit initial weights."""

    def __init__(self, recipes: Mapping[str, Recipe], seed: int, perturb: float = 0.0) -> None:
        """Create the weights of `seed`. `perturb` is the standard deviation of noise added to one-dimensional tensors."""
        self.recipes, self.seed, self.perturb = recipes, seed, perturb

    def __call__(self, name: str, cut: TensorPlan, rank: int, local: Tensor) -> None:
        """Fill `local`, the part of tensor `name` that tensor rank `rank` holds."""
        recipe = self.recipes[name]
        if recipe.unknown or not recipe.steps:
            reason = f"it uses {recipe.unknown}" if recipe.unknown else "it leaves it unset"
            raise ModelError(
                f"the initial value of {name} cannot be derived from the model's initialization: {reason}."
            )
        shape = cut.shape or (1,)
        ranges = cut.ranges(rank) or (((0, 1),),)
        flat = local.view(-1) if not cut.shape else local
        inner = max(1, torch.Size(shape[1:]).numel())
        block_rows = max(1, BLOCK_ELEMENTS // inner)
        done = 0
        for start, stop in ranges[0]:
            row = start
            while row < stop:
                block = row // block_rows
                first, last = block * block_rows, min(shape[0], (block + 1) * block_rows)
                values = self._draw(recipe, name, block, (last - first, *shape[1:]), local.dtype, (first, last))
                end = min(stop, last)
                part = values[row - first : end - first]
                flat[done : done + end - row].copy_(take_ranges(part, ranges[1:], 1))
                done += end - row
                row = end

    def _draw(
        self, recipe: Recipe, name: str, block: int, shape: tuple[int, ...], dtype: torch.dtype, rows: tuple[int, int]
    ) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}:{name}:{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        # Sample in float32 or wider, so that a bfloat16 model starts at the rounded weights of the float32 model.
        values = torch.empty(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for func, args, kwargs in recipe.steps:
            operation = func._schema.name.removeprefix("aten::")
            if operation in ("normal_", "uniform_"):
                func(values, *args, **{**kwargs, "generator": generator})
            elif operation == "copy_":
                values.copy_(_rows_of(name, args[0], rows, values))
            else:
                func(values, *args, **kwargs)
        if self.perturb and len(shape) == 1:
            values += torch.empty_like(values).normal_(0.0, self.perturb, generator=generator)
        for row, value in recipe.rows.items():
            if rows[0] <= row < rows[1]:
                values[row - rows[0]] = value
        return values


def _rows_of(name: str, source: Tensor, rows: tuple[int, int], like: Tensor) -> Tensor:
    if source.device.type == "meta":
        raise ModelError(
            f"the initial value of {name} cannot be derived from the model's initialization: it is copied from elsewhere."
        )
    return source[rows[0] : rows[1]] if source.dim() == like.dim() else source.expand_as(like)
