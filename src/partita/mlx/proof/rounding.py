"""Comparing the rounding of a split and an unsplit model in the run's dtype, both against the unsplit model in a wider one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.plan import Plan
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.model.parts import is_packed, local_ranges, main_output, parameter_homes, plan_of, take
from partita.mlx.proof.compare import comparable, forward, gradients, pipeline_gradients
from partita.proof.rounding import FACTOR, SAMPLES, Measured, Rounding, add_ranks, judge
from partita.schedule import Schedule


def widest() -> mx.Dtype:
    """The dtype of the exact model: float64, or float32 on GPUs, which have no float64."""
    return mx.float64 if mx.default_device() == mx.cpu else mx.float32


def in_wide_dtype(model: nn.Module, dtype: mx.Dtype | None = None) -> nn.Module:
    """A copy of an unsplit model, which must not be quantized, with the same weights in `dtype` (default: the widest)."""
    wide = copy.deepcopy(model)
    for home, key in parameter_homes(wide).values():
        if mx.issubdtype(home[key].dtype, mx.floating):
            home[key] = home[key].astype(dtype or widest())
    return wide


def is_quantized(model: nn.Module) -> bool:
    """Whether some weight of a model is packed, so that the model cannot run in another dtype."""
    return any(is_packed(home, key) for home, key in parameter_homes(model).values())


def compare_rounding(
    exact: nn.Module,
    unsplit: nn.Module,
    split: nn.Module,
    inputs: mx.array,
    *,
    backward: bool = True,
    schedule: Schedule | None = None,
) -> Measured:
    """Run all three on the same ids, forward and backward, and compare what comes. Every rank must call it.

    Args:
        exact: The result of `in_wide_dtype` for `unsplit`.
        unsplit: The unsplit model, on every rank.
        split: This rank's part of the split model, with the same weights.
        inputs: Ids `[batch, length]`.
        backward: Whether to compare gradients, which not all models have.
        schedule: Schedule of the backward of a model with stages.
    """
    plan, groups = plan_of(split)
    measured: list[Rounding] = []
    for sample in range(SAMPLES):
        ids = inputs if sample == 0 else _shuffled(inputs, sample)
        runs = _run_all(exact, unsplit, split, plan, ids, backward, schedule)
        found, dtypes, outputs = _over_ranks(*_measure(runs, split, plan, groups.tp.rank), groups)
        measured = add_ranks([measured, found])
        judged = judge(measured, unit_roundoff(runs[1].output.dtype))
        if all(one.error <= one.allowed for one in judged):
            break
    kinds = ("module", "output", "gradient")
    places = {name: place for place, name in enumerate([*runs[0].outputs, *runs[0].gradients])}
    judged.sort(key=lambda one: (kinds.index(one.kind), places.get(one.name, 0)))
    return Measured(judged, dtypes, outputs)


def moved_by_rounding(model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, mx.array]]:
    """A copy of `model` whose weights differ by at most one rounding each, and the differences, by name."""
    moved = copy.deepcopy(model)
    differences = {}
    for place, (name, (home, key)) in enumerate(parameter_homes(moved).items()):
        before = home[key]
        if mx.issubdtype(before.dtype, mx.floating):
            direction = mx.random.randint(-1, 2, before.shape, key=mx.random.key(seed * 100_003 + place))
            step = mx.finfo(before.dtype).eps * direction.astype(mx.float32)
            home[key] = (before.astype(mx.float32) * (1 + step)).astype(before.dtype)
            differences[name] = home[key].astype(mx.float32) - before.astype(mx.float32)
    return moved, differences


def trained_rounding(
    exact: nn.Module, unsplit: nn.Module, split: nn.Module, moved: Mapping[str, mx.array] | None = None
) -> list[Rounding]:
    """The rounding of every parameter after all three models were trained; every rank calls it, and gets the same.

    `moved` has the differences of the weights with which the unsplit model's training began.
    """
    plan, groups = plan_of(split)
    wide, whole = ({name: home[key] for name, (home, key) in parameter_homes(one).items()} for one in (exact, unsplit))
    whole |= {name: whole[name].astype(widest()) - difference for name, difference in (moved or {}).items()}
    measured = []
    for name, (home, key) in parameter_homes(split).items():
        if name in whole and mx.issubdtype(home[key].dtype, mx.floating):
            ranges = local_ranges(home, key, name, plan, groups.tp.rank)
            parts = [take(values[name], ranges) for values in (wide, whole)]
            measured.append(_rounding("parameter", name, parts[0], parts[1], home[key]))
    found, _, _ = _over_ranks(measured, {}, 0, groups)
    places = {name: place for place, name in enumerate(whole)}
    return sorted(found, key=lambda one: places[one.name])


def is_tie(exact: nn.Module, unsplit: nn.Module, prefix: Sequence[int], one: int, other: int) -> bool:
    """Whether two tokens' logits after the ids `prefix` are closer than the allowed rounding.

    See `partita.torch.proof.rounding.is_tie`.
    """
    ids = mx.array([list(prefix)])
    wide, own = (main_output(model(ids))[0, -1].astype(widest()) for model in (exact, unsplit))
    error = float(mx.abs(own - wide).max())
    return abs(float(wide[one]) - float(wide[other])) <= 2 * FACTOR * error


def unit_roundoff(dtype: mx.Dtype) -> float:
    """The largest relative error of one rounding in a floating dtype."""
    return float(mx.finfo(dtype).eps) / 2


def _shuffled(ids: mx.array, sample: int) -> mx.array:
    order = mx.random.permutation(ids.size, key=mx.random.key(sample))
    return ids.reshape(-1)[order].reshape(ids.shape)


@dataclass
class _Run:
    """The outputs of a model's modules by path, its own, and its gradients by name."""

    outputs: dict[str, mx.array]
    output: mx.array
    gradients: dict[str, mx.array]


def _run_all(
    exact: nn.Module,
    unsplit: nn.Module,
    split: nn.Module,
    plan: Plan,
    ids: mx.array,
    backward: bool,
    schedule: Schedule | None,
) -> list[_Run]:
    runs = []
    for model in (exact, unsplit, split):
        runs.append(_Run(*forward(model, ids, plan if model is split else None), {}))
    dtype = runs[1].output.dtype
    for model, run in zip((exact, unsplit, split) if backward else (), runs, strict=False):
        if model is split and schedule is not None:
            run.gradients = pipeline_gradients(model, ids, schedule, dtype=dtype)
        else:
            run.gradients = gradients(model, ids, dtype=dtype)
    return runs


def _measure(runs: list[_Run], split: nn.Module, plan: Plan, rank: int) -> tuple[list[Rounding], dict[str, str], int]:
    """This rank's parts of all arrays that can be compared, the dtypes that differ, and the number of compared dtypes."""
    exact, unsplit, mine = runs
    measured, dtypes = [], {}
    own = dict(comparable(unsplit.outputs, plan, rank))
    for path, wide in comparable(exact.outputs, plan, rank):
        if path not in own or path not in mine.outputs:
            continue
        if own[path].dtype != mine.outputs[path].dtype:
            dtypes[path] = f"{_name(mine.outputs[path].dtype)} instead of {_name(own[path].dtype)}"
        if wide.shape == mine.outputs[path].shape:
            measured.append(_rounding("module", path, wide, own[path], mine.outputs[path]))
    if unsplit.output.dtype != mine.output.dtype:
        dtypes["the model"] = f"{_name(mine.output.dtype)} instead of {_name(unsplit.output.dtype)}"
    measured.append(_rounding("output", "the model", exact.output, unsplit.output, mine.output))
    homes = parameter_homes(split)
    for name, gradient in mine.gradients.items():
        ranges = local_ranges(*homes[name], name, plan, rank)
        parts = [take(run.gradients[name], ranges) for run in (exact, unsplit)]
        if any(bool(mx.any(g).item()) for g in (*parts, gradient)):
            measured.append(_rounding("gradient", name, parts[0], parts[1], gradient))
    return measured, dtypes, len(mine.outputs) + 1


def _over_ranks(
    measured: list[Rounding], dtypes: dict[str, str], outputs: int, groups: ParallelGroups
) -> tuple[list[Rounding], dict[str, str], int]:
    for comm in (groups.tp, groups.pp):
        mine = [[m.kind, m.name, m.elements, m.exact, m.unsplit, m.split] for m in measured]
        parts: Any = comm.all_gather_object([mine, dtypes, outputs])
        measured = add_ranks([Rounding(*one) for one in part[0]] for part in parts)
        dtypes = {path: dtype for part in parts for path, dtype in part[1].items()}
        outputs = sum(part[2] for part in parts) if comm is groups.pp else outputs
    return measured, dtypes, outputs


def _rounding(kind: str, name: str, exact: mx.array, unsplit: mx.array, split: mx.array) -> Rounding:
    """The sums of squares of one array on this rank; where the unsplit model overflows, the split one must overflow too."""
    finite = mx.isfinite(unsplit) & mx.isfinite(exact)
    if exact.shape != split.shape or not bool(mx.array_equal(mx.isfinite(split) & mx.isfinite(exact), finite).item()):
        return Rounding(kind, name, exact.size, 1.0, 0.0, float("inf"))
    wide = [mx.where(finite, x.astype(widest()), mx.array(0.0, widest())) for x in (exact, unsplit, split)]
    squares = [float(mx.square(x).sum()) for x in (wide[0], wide[1] - wide[0], wide[2] - wide[0])]
    return Rounding(kind, name, exact.size, *squares)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
