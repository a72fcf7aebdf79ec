"""Comparing a split model with the unsplit one: outputs of every module, generation with a cache, every gradient, and every
parameter after training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.plan import Plan
from partita.core.sharding.cuts import ModulePlan
from partita.errors import ModelError
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.mlx_lm_internals import make_cache
from partita.mlx.model.head import local_logits
from partita.mlx.model.parts import (
    is_packed,
    local_ranges,
    main_output,
    parameter_homes,
    plan_of,
    take,
    unsplit_modules,
)
from partita.mlx.stages.copies import sum_copies
from partita.mlx.stages.layers import AbsentLayer, AbsentModule
from partita.mlx.stages.pipeline import Pipeline
from partita.proof.differences import SMALL, Difference, largest_of_ranks
from partita.schedule import Schedule

CACHED_STEPS = 2
"""Number of last tokens that pass through the model one by one, after a cache of the others."""


def compare(
    unsplit: nn.Module,
    split: nn.Module,
    plan: Plan,
    groups: ParallelGroups,
    inputs: mx.array,
    *,
    backward: bool = True,
    cached: bool = True,
    schedule: Schedule | None = None,
) -> list[Difference]:
    """Run both models on the same ids, forward, with a cache, and backward, and compare what comes. Every rank must call it.

    With several stages, generation with a cache is not compared, and the backward follows `schedule`, every micro-batch of
    which has the same ids.

    Args:
        unsplit: The unsplit model, on every rank.
        split: This rank's part of the split model, with the same weights.
        plan: The plan of the split model.
        groups: The groups of the plan's mesh.
        inputs: Ids `[batch, length]`, `length` more than `CACHED_STEPS`.
        backward: Whether to compare gradients, which not all models have.
        cached: Whether to compare generation with a cache.
        schedule: Schedule of the backward of a model with stages.

    Returns:
        Differences in the order of execution: modules, the outputs, then gradients in the model's order. The same on every
        rank.

    Raises:
        ModelError: The unsplit model's output contains NaN.
    """
    rank = groups.tp.rank
    expected, reference = forward(unsplit, inputs)
    if bool(mx.isnan(reference).any().item()):
        raise ModelError(
            "the unsplit model's output contains NaN, so nothing can be compared with it. Check its weights and its dtype."
        )
    found, output = forward(split, inputs, plan)
    differences = [
        Difference("module", path, relative_error(whole, found[path]))
        for path, whole in comparable(expected, plan, rank)
        if path in found and found[path].shape == whole.shape
    ]
    differences.append(Difference("output", "the model", relative_error(reference, output)))
    if cached and plan.num_stages == 1:
        differences.append(_compare_steps(unsplit, split, plan, inputs, rank))
    whole: dict[str, mx.array] = {}
    if backward and reference.shape == output.shape:
        whole = gradients(unsplit, inputs)
        mine = gradients(split, inputs) if schedule is None else pipeline_gradients(split, inputs, schedule)
        differences += _compare_gradients(whole, mine, split, plan, rank)
    return largest_of_ranks(differences, (groups.tp, groups.pp), [*expected, *whole], missing=whole)


def compare_parameters(unsplit: nn.Module, split: nn.Module, plan: Plan, groups: ParallelGroups) -> list[Difference]:
    """How far each floating array of the split model is from the unsplit one's; every rank calls it, and gets the same.

    Args:
        unsplit: The unsplit model, on every rank.
        split: This rank's part of the split model.
        plan: The plan of the split model.
        groups: The groups of the plan's mesh.

    Returns:
        One difference per array, in the model's order.
    """
    whole = {
        name: home[key]
        for name, (home, key) in parameter_homes(unsplit).items()
        if mx.issubdtype(home[key].dtype, mx.floating)
    }
    # A parameter that started at zero and has a zero gradient (a key bias) consists of rounding errors.
    least = SMALL * max((float(mx.abs(array).max()) for array in whole.values()), default=0.0)
    found = []
    for name, (home, key) in parameter_homes(split).items():
        if name in whole:
            part = take(whole[name], local_ranges(home, key, name, plan, groups.tp.rank))
            scale = max(float(mx.abs(whole[name]).max()), least)
            found.append(Difference("parameter", name, relative_error(part, home[key], scale)))
    return largest_of_ranks(found, (groups.tp, groups.pp), list(whole))


def forward(model: nn.Module, inputs: mx.array, plan: Plan | None = None) -> tuple[dict[str, mx.array], mx.array]:
    """The first output of every module by its path in the unsplit model, and the model's.

    If `plan` has several stages, only modules whose outputs depend on no stand-in: layers, modules inside
    them, and modules with arrays.
    """
    outputs: dict[str, mx.array] = {}

    def see(path: str, output: mx.array) -> None:
        if plan is None or plan.num_stages == 1 or plan.spec.layer_of(path) is not None or path in plan.spec.modules:
            outputs.setdefault(path, output)

    with _watch(model, see):
        output = main_output(model(inputs))
    mx.eval(output, list(outputs.values()))
    return outputs, output


def _compare_steps(unsplit: nn.Module, split: nn.Module, plan: Plan, inputs: mx.array, rank: int) -> Difference:
    """Compare generation with a cache, where each rank has its own part of the logits."""
    whole = generate_steps(unsplit, inputs)
    with local_logits(split, plan) as columns:
        mine = generate_steps(split, inputs)
    if columns is not None and mine.shape[-1] != columns.size:
        whole = take(whole, (*(((0, n),) for n in whole.shape[:-1]), columns.ranges(rank)))
    return Difference("output", "the model with a cache", relative_error(whole, mine))


def generate_steps(model: nn.Module, inputs: mx.array) -> mx.array:
    """The logits of the last ids, fed one by one, `[batch, CACHED_STEPS, vocabulary]`."""
    cache = make_cache(model)
    first = inputs.shape[1] - CACHED_STEPS
    mx.eval(main_output(model(inputs[:, :first], cache=cache)))
    steps = []
    for i in range(first, inputs.shape[1]):
        steps.append(main_output(model(inputs[:, i : i + 1], cache=cache)))
        mx.eval(steps[-1])
    return mx.concatenate(steps, axis=1)


def gradients(model: nn.Module, inputs: mx.array, *, dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
    """The gradients of a weighted sum of the logits, by the parameters' unsplit names.

    The sum's weights are rounded to `dtype` (default: that of the logits).
    """
    homes = {
        name: (home, attribute)
        for name, (home, attribute) in parameter_homes(model).items()
        if mx.issubdtype(home[attribute].dtype, mx.floating)
        and not is_packed(home, attribute)
        and attribute not in getattr(home, "_no_grad", ())
    }
    kept = [home[attribute] for home, attribute in homes.values()]

    def loss(arrays: list[mx.array]) -> mx.array:
        for (home, attribute), array in zip(homes.values(), arrays, strict=True):
            home[attribute] = array
        return _weighted_sum(main_output(model(inputs)), dtype)

    try:
        found = mx.grad(loss)(kept) if kept else []
        mx.eval(found)
    finally:
        for (home, attribute), array in zip(homes.values(), kept, strict=True):
            home[attribute] = array
    return dict(zip(homes, found, strict=True))


def pipeline_gradients(
    model: nn.Module,
    inputs: mx.array,
    schedule: Schedule,
    *,
    dtype: mx.Dtype | None = None,
) -> dict[str, mx.array]:
    """As `gradients`, of a model that is cut into stages: of what this rank holds. Every rank must call it."""
    plan, groups = plan_of(model)
    pipeline = Pipeline(model, schedule)
    count = schedule.num_microbatches

    def finish(output: Any, microbatch: int) -> mx.array:
        weighted = _weighted_sum(main_output(output), dtype) / count
        return weighted if weighted.dtype == mx.float64 else weighted.astype(mx.float32)

    pipeline.run(lambda microbatch: inputs, finish)
    sum_copies(pipeline.gradients, model, plan, groups)
    return pipeline.gradients


def _weighted_sum(logits: mx.array, dtype: mx.Dtype | None) -> mx.array:
    weight = mx.random.normal(logits.shape, key=mx.random.key(0)).astype(dtype or logits.dtype)
    return (logits * weight.astype(logits.dtype)).sum()


def _compare_gradients(
    whole: dict[str, mx.array], mine: dict[str, mx.array], split: nn.Module, plan: Plan, rank: int
) -> Iterator[Difference]:
    homes = parameter_homes(split)
    largest = max((float(mx.abs(g).max()) for g in whole.values()), default=0.0)
    for name, gradient in whole.items():
        if name not in mine:
            continue
        part = take(gradient, local_ranges(*homes[name], name, plan, rank))
        yield Difference(
            "gradient", name, relative_error(part, mine[name], max(float(mx.abs(gradient).max()), SMALL * largest))
        )


@contextmanager
def _watch(model: nn.Module, see: Callable[[str, mx.array], object]) -> Iterator[None]:
    """Call `see` with the outputs of every module inside the model and its unsplit path.

    Python looks up `__call__` on classes only, so each module temporarily gets its own class.
    """
    absent = (AbsentLayer, AbsentModule)
    modules = {p: module for p, module in unsplit_modules(model).items() if p and not issubclass(type(module), absent)}
    classes = {path: type(module) for path, module in modules.items()}
    for path, module in modules.items():
        module.__class__ = _watched(classes[path], path, see)
    try:
        yield
    finally:
        for path, module in modules.items():
            module.__class__ = classes[path]


def _watched(cls: type, path: str, see: Callable[[str, mx.array], object]) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.__call__(self, *args, **kwargs)
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, mx.array) and mx.issubdtype(first.dtype, mx.floating):
            see(path, first)
        return output

    return type(cls.__name__, (cls,), {"__call__": call})


def comparable(expected: dict[str, mx.array], plan: Plan, rank: int) -> Iterator[tuple[str, mx.array]]:
    """The outputs of the unsplit model that the split one also has, complete or this rank's part, in order of execution."""
    for path, whole in expected.items():
        module = plan.modules.get(path)
        if module is None:
            # Between projections an attention has its own heads only, and it is unknown which.
            if not any(path.startswith(f"{parent}.") for parent in plan.attention):
                yield path, whole
        elif module.style == "column" and not module.gather_output:
            yield path, _local_part(whole, module, rank)
        elif len(plan.tensor(f"{path}.weight").shape) != 3:
            # (The parts of stacked experts are summed after all of them.)
            yield path, whole


def _local_part(whole: mx.array, module: ModulePlan, rank: int) -> mx.array:
    assert module.split is not None
    part = take(whole, (*(((0, n),) for n in whole.shape[:-1]), module.split.ranges(rank)))
    blocks = module.expand[rank] if module.expand else None
    if blocks is not None:
        width = module.expand_width
        part = mx.concatenate([part[..., b * width : (b + 1) * width] for b in blocks], axis=-1)
    return part


def relative_error(whole: mx.array, mine: mx.array, scale: float | None = None) -> float:
    """The largest difference, relative to the largest magnitude of `whole` or to `scale`; infinite if only one is finite."""
    if whole.shape != mine.shape:
        return float("inf")
    if whole.size == 0:
        return 0.0
    if mx.any(mx.isfinite(whole) != mx.isfinite(mine)).item():
        return float("inf")
    finite = mx.isfinite(whole)
    wide = mx.float64 if mx.default_device() == mx.cpu else mx.float32
    whole, mine = (mx.where(finite, x.astype(wide), mx.array(0.0, wide)) for x in (whole, mine))
    scale = float(mx.abs(whole).max()) if scale is None else scale
    difference = float(mx.abs(whole - mine).max())
    return 0.0 if difference == 0.0 else difference / scale if scale > 0.0 else float("inf")
