"""Verification of any module, split and unsplit, on an input that the caller gives."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.model.spec import ModelSpec
from partita.core.plan import Plan
from partita.core.request import SplitRequest
from partita.core.sharding.rules import VOCABULARY, Rule, Rules
from partita.core.sharding.split import check_sizes
from partita.errors import ModelError, PartitaError
from partita.notes import note
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.transformers_models import rules_of, spec_of
from partita.torch.proof.family import LARGEST_PARAMETERS, describe_error, difference_on_threads
from partita.torch.proof.stages import Parts
from partita.torch.stages.cut import refuse_uncuttable


def spec_of_module(model: nn.Module, num_heads: int = 0, num_kv_heads: int = 0) -> ModelSpec:
    """The facts of any module, with head counts that its config does not have.

    Raises:
        ModelError: A head count is not positive, or `num_kv_heads` is given without `num_heads`.
    """
    spec = spec_of(model)
    if not num_heads and not num_kv_heads:
        return spec
    check_sizes(num_heads=num_heads, num_kv_heads=num_kv_heads or num_heads)
    return replace(spec, num_heads=num_heads, num_kv_heads=num_kv_heads or num_heads)


def plan_on_sample(model: nn.Module, spec: ModelSpec, how: SplitRequest, sample: Any) -> Plan:
    """The first plan of a module that computes the same output and gradients on `sample` as the unsplit module, in float64.

    Without rules, those of its family or for the usual names are tried, then each linear layer split by itself.

    Args:
        model: The unsplit module, which stays as it is.
        spec: Its facts.
        how: How to split it; its rules are the only ones to try.
        sample: Inputs of `model`: a tensor, a tuple of arguments, or a dict of arguments by name.

    Raises:
        ModelError: No split equals the unsplit module; the message names the first module that differs.
    """
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST_PARAMETERS:
        raise ModelError(
            f"{spec.architecture} has {size} parameters, and copies in float64 are compared on a sample of at most "
            f"{LARGEST_PARAMETERS}. Verify a smaller instance of it, then pass Rules(rules.table, proven=True)."
        )
    unsplit = copy.deepcopy(model).to(torch.float64).eval()
    inputs = named_inputs(unsplit, sample)
    if how.rules is not None:
        _refuse_unused(spec, how.rules)
    candidates = [how.rules] if how.rules is not None else [rules_of(model, spec), _each_by_itself(spec)]
    reasons = []
    for candidate in dict.fromkeys(candidates):
        try:
            plan = Plan.make(spec, how.mesh, how.layout, candidate, vpp=how.vpp, placement=how.placement)
            reason = _difference(unsplit, plan, inputs)
        except PartitaError as error:
            reason = str(error)
        if not reason:
            return plan
        reasons.append(reason)
    why = " With each linear layer by itself: ".join(reasons)
    raise ModelError(
        f"{spec.architecture} cannot be split over tp={how.mesh.tp}, pp={how.mesh.pp}: {why} "
        "A module without a rule stays whole; `gather_output` and `split_input` make a layer's neighbours see complete tensors."
    )


def _each_by_itself(spec: ModelSpec) -> Rules:
    linears = sorted(spec.linears or (), key=lambda path: (-path.count("."), path))
    return Rules((*VOCABULARY, *(Rule(path, "column", gather_output=True) for path in linears)))


def _refuse_unused(spec: ModelSpec, rules: Rules) -> None:
    for rule in rules:
        if not any(rule.matches(path) for path in spec.modules):
            some = ", ".join(list(spec.modules)[:8])
            raise ModelError(
                f"rule {rule.pattern!r} matches no module of {spec.architecture}, which has {some} and more. Correct its "
                "pattern, or remove it."
            )


def named_inputs(model: nn.Module, sample: Any) -> dict[str, Any]:
    """A sample as arguments by name, floating-point tensors in float64.

    Raises:
        ModelError: The sample does not fit the signature of the module's forward.
    """
    if isinstance(sample, Mapping):
        named = dict(sample)
    else:
        args = sample if isinstance(sample, tuple) else (sample,)
        try:
            bound = inspect.signature(type(model).forward).bind(model, *args).arguments
        except TypeError as error:
            raise ModelError(f"sample_input does not fit {type(model).__name__}.forward: {error}.") from error
        named = dict(list(bound.items())[1:])
        if any(isinstance(value, tuple) and value is not sample for value in named.values()):
            raise ModelError(
                f"{type(model).__name__}.forward has no names for its arguments. Pass sample_input as a dict."
            )
    return {
        name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in named.items()
    }


def _difference(unsplit: nn.Module, plan: Plan, inputs: dict[str, Any]) -> str:
    for mesh in plan.mesh.layer_meshes:
        if not any(cut.split is not None for cut in plan.cuts.values()):
            return "no rule splits any of its tensors."
        small = Plan.make(plan.spec, mesh, None, plan.rules)
        try:
            reason = difference_on_threads(unsplit, small, inputs)
        except Exception as error:
            reason = f"With its rules the forward fails: {describe_error(error)}"
        if reason:
            return reason
    if plan.num_stages > 1:
        try:
            refuse_uncuttable(unsplit)
            with Float64Everywhere():
                return Parts(unsplit).difference(inputs)
        except Exception as error:
            return f"Its stages fail: {describe_error(error)}"
    return ""


def note_replicated(plan: Plan, groups: ParallelGroups) -> None:
    """Say on rank 0 which parameters every tensor rank holds complete."""
    if plan.mesh.tp == 1 or groups.rank > 0:
        return
    whole = {
        name.rpartition(".")[0] or name: name
        for name, cut in plan.cuts.items()
        if cut.split is None and len(cut.shape) > 1 and not plan.spec.tensors[name].is_buffer
    }
    count = sum(plan.spec.tensors[name].numel for name, cut in plan.cuts.items() if cut.split is None)
    if whole:
        names = ", ".join([*list(whole)[:6], *(["..."] if len(whole) > 6 else [])])
        note(
            f"{plan.spec.architecture}: {count} of {plan.spec.parameters} parameters are not split, and every tensor rank has "
            f"them; they are in {names}."
        )
