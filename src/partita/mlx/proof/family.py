"""Verification before use: rules that were not measured for a family are tested on a small model of it first."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.layout.placement import Placement
from partita.core.mesh import Mesh
from partita.core.model.shrink import shrunk_configs
from partita.core.model.spec import ModelSpec
from partita.core.plan import Plan
from partita.core.sharding.rules import Rules, isolated_rules, partly_isolated_rules, without_vocabulary
from partita.errors import ModelError, PartitaError, PlanError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.groups import single_groups
from partita.mlx.collectives.threads import run_as_threads
from partita.mlx.mlx_lm_internals import family_of
from partita.mlx.model.mlx_lm_models import build, config_of, describe, rules_of, spec_of
from partita.mlx.model.modes import random_state_kept
from partita.mlx.model.parts import main_output
from partita.mlx.model.tree import every_array
from partita.mlx.proof.compare import compare, generate_steps, gradients
from partita.mlx.proof.rounding import compare_rounding, in_wide_dtype
from partita.mlx.split.apply import apply_plan, finish
from partita.proof.differences import Difference, first_wrong
from partita.proof.rounding import Measured

TOLERANCES: Mapping[mx.Dtype, float] = {mx.float64: 1e-6, mx.float32: 1e-4}
"""Largest relative error of a correct split: far above rounding (models narrow to float32 inside), far below
any mistake."""

LARGEST_PARAMETERS = 30_000_000
"""Maximum number of parameters of a small model."""


def plan_of_model(
    model: nn.Module,
    mesh: Mesh,
    layout: Any = None,
    rules: Rules | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    vpp: int | None = None,
    placement: Placement = "loop",
) -> Plan:
    """The plan of an unsplit model: with its family's rules if these were measured, else with rules that pass.

    Args:
        model: An mlx-lm model, evaluated or not.
        mesh: The ranks.
        layout: Layers of each pipeline stage.
        rules: Rules of the split (default: derived from the model).
        config: The config that the model was built from, if available.
        vpp: Stages on each pipeline rank (default: as many as `layout` has, else 1).
        placement: Assignment of stages to ranks.

    Raises:
        PlanError: The model cannot be distributed this way.
        ModelError: No split matches the unsplit model; the message says where each differs.
    """
    spec = spec_of(model, config)
    first = rules if rules is not None else rules_of(spec)
    if mesh.tp == 1 or first.proven:
        return Plan.make(spec, mesh, layout, first, vpp=vpp, placement=placement)
    reasons = []
    for candidate in [first] if rules is not None else candidates(spec, first):
        try:
            plan = Plan.make(spec, mesh, layout, candidate, vpp=vpp, placement=placement)
            prove(model, plan)
        except PartitaError as error:
            reasons.append(str(error))
        else:
            return plan
    why = (
        reasons[0] if len(set(reasons)) == 1 else f"{reasons[0]} With each linear layer split by itself: {reasons[-1]}"
    )
    raise ModelError(f"{spec.family} cannot be split over tp={mesh.tp}: {why}")


def candidates(spec: ModelSpec, first: Rules) -> list[Rules]:
    """Rules to try in turn, from most to least split.

    These are `first`, then with an unsplit vocabulary, isolated attentions, everything else isolated, and everything isolated.
    """
    mixed = [partly_isolated_rules(spec, first, attention=attention) for attention in (True, False)]
    apart = isolated_rules(spec)
    return list(dict.fromkeys([first, without_vocabulary(first), *mixed, apart, without_vocabulary(apart)]))


def prove_unless_proven(model: nn.Module, plan: Plan) -> Plan:
    """Return `plan` if its rules were measured for its family or pass now.

    Raises:
        ModelError: They do not pass.
    """
    if plan.mesh.tp > 1 and not plan.rules.proven:
        prove(model, plan)
    return plan


def prove(model: nn.Module, plan: Plan) -> None:
    """Measure the rules of `plan` on a small random model of the family of `model`, with threads of this process as ranks.

    Raises:
        ModelError: The split model differs from the unsplit one, or no small model can be built.
    """
    config = config_of(model)
    config.pop("quantization", None)
    dtype = dtype_of(model)
    # Every config option counts: a result for one config does not hold for another.
    key = (type(model), plan.mesh.tp, plan.spec.num_heads, json.dumps(config, sort_keys=True), plan.rules, dtype)
    if key not in _proven:
        _proven[key] = _measure(model, config, plan, dtype)
    if _proven[key]:
        raise ModelError(_proven[key])


_proven: dict[Any, str] = {}


def _measure(model: nn.Module, config: Mapping[str, Any], plan: Plan, dtype: mx.Dtype) -> str:
    """Why the rules of `plan` fail; empty if they pass."""
    try:
        # In a separate thread, which does not change the user's random state.
        (small,) = run_as_threads(1, lambda _: small_model(type(model), config, plan.spec.num_heads))
    except PartitaError as error:
        return f"its rules were not measured, and cannot be tested: {error}"
    try:
        spec = spec_of(small.model, {"model_type": plan.spec.family})
        small_plan = Plan.make(spec, Mesh(tp=plan.mesh.tp), None, plan.rules)
        differences = compare_on_threads(small, small_plan)
    except (ModelError, PlanError) as error:
        return str(error)
    except Exception as error:
        return f"With its rules the forward fails: {describe(error)}"
    wrong = first_wrong(differences, TOLERANCES[small.dtype])
    if wrong is None:
        return _rounding_difference(small, small_plan, dtype)
    return f"With its rules the {wrong.kind} {wrong.name} differs from the unsplit model's by {wrong.error:.1e}."


def _rounding_difference(small: Small, plan: Plan, dtype: mx.Dtype) -> str:
    """Description of arrays that a split rounds worse, or in another dtype, than a small model in the large model's dtype."""
    unsplit = in_dtype(small, dtype)
    if unsplit is None:
        return ""  # MLX does not run the unsplit model in this dtype here, so there is nothing to compare with.
    name = str(dtype).removeprefix("mlx.core.")
    try:
        found = compare_rounding_on_threads(unsplit, plan, small.dtype)
    except Exception as error:
        return f"With its rules the forward fails in {name}: {describe(error)}"
    wrong = found.first_wrong(name)
    return f"With its rules {wrong}" if wrong else ""


def in_dtype(small: Small, dtype: mx.Dtype) -> Small | None:
    """A copy of a small model in a narrower dtype, and its abilities in it; None if it does not run."""
    if dtype.size >= small.dtype.size:
        return None
    model = copy.deepcopy(small.model)
    model.set_dtype(dtype)
    ids = sample_inputs(model)
    if not runs(lambda model, ids: main_output(model(ids)), model, ids):
        return None
    return Small(model, dtype, small.backward and runs(gradients, model, ids), small.cached)


def dtype_of(model: nn.Module) -> mx.Dtype:
    """The dtype of most of a model's floating arrays; of a quantized model, that of its scales."""
    counts = Counter({mx.float32: 0})
    for array in every_array(model):
        if mx.issubdtype(array.dtype, mx.floating):
            counts[array.dtype] += array.size
    return counts.most_common(1)[0][0]


@dataclass(frozen=True)
class Small:
    """A small model, and the abilities of the unsplit model.

    Attributes:
        model: The model.
        dtype: dtype of the weight.
        backward: Whether MLX computes all its gradients.
        cached: Whether it generates with a cache.
    """

    model: nn.Module
    dtype: mx.Dtype
    backward: bool
    cached: bool


def small_model(cls: type[nn.Module], config: Mapping[str, Any], num_heads: int) -> Small:
    """A small model of a class, with random nonzero weights; must be called on the CPU.

    In float64 if all of the model runs in it, else in float32. Seeds MLX's generator of this thread.

    Raises:
        ModelError: No small model can be built and run.
    """
    family = family_of(cls)
    if family in CRASHES:
        raise ModelError(f"{CRASHES[family]}.")
    if not config:
        raise ModelError(f"{family} stores no arguments that could be reduced.")
    reasons: list[str] = []
    for data in shrunk_configs(config, num_heads):
        found: list[Small] = []
        for dtype in TOLERANCES:
            try:
                found.append(_tried(data, dtype))
            except PartitaError as error:
                reasons.append(str(error))
            except Exception as error:
                reasons.append(describe(error))
            else:
                if found[-1].backward and found[-1].cached:
                    break
        if found:
            return max(found, key=lambda small: (small.cached, small.backward))
    raise ModelError(f"no small model of {family} can be built and run ({reasons[0]}).")


CRASHES: Mapping[str, str] = {
    "phi3small": "mlx-lm's phi3small writes out of bounds on MLX's CPU backend, which crashes the process"
}
"""Families that must not run on the CPU, not even unsplit."""


@random_state_kept()
def _tried(config: Mapping[str, Any], dtype: mx.Dtype) -> Small:
    """A model of a small config, and its abilities in a dtype."""
    mx.random.seed(0)
    model = build(config)
    if sum(array.size for array in every_array(model)) > LARGEST_PARAMETERS:
        raise ModelError("it is too large even when reduced")
    fill(model, dtype)
    ids = sample_inputs(model)
    mx.eval(main_output(model(ids)))
    return Small(model, dtype, runs(gradients, model, ids), runs(generate_steps, model, ids))


def runs(what: Callable[[nn.Module, mx.array], Any], model: nn.Module, ids: mx.array) -> bool:
    """Whether MLX can run `what` with a model and ids."""
    try:
        mx.eval(what(model, ids))
    except Exception:
        return False
    return True


def fill(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """Evaluate an unsplit model with its own initial weights, and add noise to zeros, norms and biases."""

    def drawn(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        if array.ndim <= 1 or not mx.any(array).item():
            array = array + 0.1 * mx.random.normal(array.shape)
        return array.astype(dtype)

    model.apply(drawn)
    mx.eval(every_array(model))
    return model


def compare_on_threads(small: Small, plan: Plan) -> list[Difference]:
    """Split copies of a model by `plan` over threads, and compare them with it."""
    inputs = sample_inputs(small.model)
    mx.eval(inputs)

    def one(comm: Communicator) -> list[Difference]:
        groups = single_groups(plan.mesh, tp=comm)
        split = apply_plan(copy.deepcopy(small.model), plan, comm)
        unsplit = copy.deepcopy(small.model)
        return compare(unsplit, split, plan, groups, inputs, backward=small.backward, cached=small.cached)

    return run_as_threads(plan.mesh.tp, one)[0]


def compare_rounding_on_threads(small: Small, plan: Plan, wide: mx.Dtype) -> Measured:
    """Split copies of a model by `plan` over threads, and compare their rounding with that of the model, against `wide`."""
    inputs, exact = sample_inputs(small.model), in_wide_dtype(small.model, wide)
    mx.eval(inputs, every_array(exact))

    def one(comm: Communicator) -> Measured:
        split = finish(apply_plan(copy.deepcopy(small.model), plan, comm), plan, single_groups(plan.mesh, tp=comm))
        return compare_rounding(
            copy.deepcopy(exact), copy.deepcopy(small.model), split, inputs, backward=small.backward
        )

    return run_as_threads(plan.mesh.tp, one)[0]


def sample_inputs(model: nn.Module, *, batch: int = 2, length: int = 9) -> mx.array:
    """Random ids, the input of every text model."""
    vocabulary = spec_of(model).vocab_size
    if vocabulary < 2:
        raise ModelError(f"{type(model).__module__} has no vocabulary, so its inputs are unknown.")
    return mx.random.randint(0, vocabulary, (batch, length), key=mx.random.key(0))
