"""Verification before use: rules that were not measured for a family are tested on a small model of it first."""

from __future__ import annotations

import copy
import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.layout.placement import Placement
from partita.core.mesh import Mesh
from partita.core.model.shrink import shrunk_configs, with_short_windows
from partita.core.plan import Plan
from partita.core.sharding.rules import Rules, isolated_rules
from partita.errors import ModelError, PartitaError
from partita.proof.differences import Difference, first_wrong
from partita.proof.rounding import Measured
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import ParallelGroups, single_groups
from partita.torch.collectives.threads import run_as_threads
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.towers import media_of, sample_media
from partita.torch.model.transformers_models import build_on_meta, config_like, rules_of, spec_of
from partita.torch.proof.compare import compare
from partita.torch.proof.rounding import compare_rounding, in_float64, name_of
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from partita.torch.transformers_internals import new_model, quiet, text_config_of
from partita.torch.weights.initial import FreshFill, record_initialization
from partita.torch.weights.materialize import make_unsaved_buffers, materialize

TOLERANCE = 1e-9
"""Largest relative error of a correct split in float64: far above rounding, far below any mistake."""

LARGEST_PARAMETERS = 100_000_000
"""Maximum number of parameters of a small model."""

LARGEST_ROUNDED = 25_000_000
"""Larger small models are compared in float64 only: other dtypes need a third and a fourth copy on each rank."""


def plan_of_model(
    model: nn.Module,
    mesh: Mesh,
    layout: Any = None,
    rules: Rules | None = None,
    *,
    vpp: int | None = None,
    placement: Placement = "loop",
) -> Plan:
    """The plan of an unsplit model (on any device): with its family's rules if these were measured, else with rules that pass.

    Raises:
        PlanError: The model cannot be distributed this way.
        ModelError: No split matches the unsplit model; the message says where each differs.
    """
    spec = spec_of(model)
    first = rules if rules is not None else rules_of(model, spec)
    if not mesh.layer_meshes or first.proven:
        return Plan.make(spec, mesh, layout, first, vpp=vpp, placement=placement)
    reasons = []
    isolated = isolated_rules(spec)
    if mesh.ep > 1:
        isolated = Rules((*isolated, *(rule for rule in first if rule.style == "experts")))
    for candidate in dict.fromkeys([first] if rules is not None else [first, isolated]):
        try:
            plan = Plan.make(spec, mesh, layout, candidate, vpp=vpp, placement=placement)
            prove(model, plan)
        except PartitaError as error:
            reasons.append(str(error))
        else:
            return plan
    why = reasons[0] if len(set(reasons)) == 1 else f"{reasons[0]} With each linear layer split by itself: {reasons[1]}"
    over = " with ".join(f"{axis}={getattr(mesh, axis)}" for axis in ("tp", "ep") if getattr(mesh, axis) > 1)
    raise ModelError(f"{spec.family} cannot be split over {over}: {why}")


def prove_unless_proven(model: nn.Module, plan: Plan) -> Plan:
    """Return `plan` if its rules were measured for its family or pass now.

    Raises:
        ModelError: They do not pass.
    """
    if plan.mesh.layer_meshes and not plan.rules.proven:
        prove(model, plan)
    return plan


def prove(model: nn.Module, plan: Plan) -> None:
    """Measure the rules of `plan` on a small random model of the family of `model`, with threads of this process as ranks.

    Raises:
        ModelError: The split model differs from the unsplit one, or no small model can be built.
    """
    key = _key(model, plan)
    if key not in _proven:
        _proven[key] = _measure(model, plan)
    if _proven[key]:
        raise ModelError(_proven[key])


def _key(model: nn.Module, plan: Plan) -> tuple[Any, ...]:
    # Every config option counts: a result for one config does not hold for another.
    config = json.dumps(dict(plan.spec.config), sort_keys=True, default=str)
    return type(model).__name__, plan.spec.family, plan.mesh.layer_meshes, config, plan.rules, dtype_of(model)


_proven: dict[Any, str] = {}
_media: dict[Any, dict[str, str]] = {}


def unmeasured_media(model: nn.Module, plan: Plan) -> Mapping[str, str]:
    """The kinds of media for which `plan` could not be verified, and why. Call `prove` first."""
    return _media.get(_key(model, plan), {}) if plan.mesh.layer_meshes else {}


def measure_media(unsplit: nn.Module, measure: Callable[[dict[str, Tensor]], str]) -> dict[str, str]:
    """Why a small model fails with some kinds of media; `measure` returns the problem with given inputs, or an empty text."""
    reasons = {}
    for medium in media_of(unsplit):
        try:
            with Float64Everywhere():
                inputs = sample_media(unsplit, medium)
            reason = measure(inputs)
        except Exception as error:
            reason = str(error) if isinstance(error, PartitaError) else describe_error(error)
        if reason:
            reasons[medium.name] = reason
    return reasons


def describe_error(error: BaseException) -> str:
    """The class and the first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}."


def _measure(model: nn.Module, plan: Plan) -> str:
    try:
        unsplit = small_model(model, plan.spec.num_heads, experts=_experts(plan.mesh))
    except PartitaError as error:
        return f"its rules were not measured, and cannot be tested: {error}"
    try:
        spec = spec_of(unsplit)
        small = [Plan.make(spec, mesh, None, plan.rules) for mesh in plan.mesh.layer_meshes]
        reason = _first_difference(unsplit, small, sample_inputs(unsplit))
    except PartitaError as error:
        return str(error)
    except Exception as error:
        return f"With its rules the forward fails: {describe_error(error)}"
    if not reason:
        reason = _rounding_difference(model, plan)
    if not reason:
        _media[_key(model, plan)] = measure_media(unsplit, lambda inputs: _first_difference(unsplit, small, inputs))
    return reason


def _experts(mesh: Mesh) -> int:
    """The experts that all of `Mesh.layer_meshes` need."""
    return max((one.ep for one in mesh.layer_meshes), default=1)


def _first_difference(unsplit: nn.Module, plans: Sequence[Plan], inputs: dict[str, Any]) -> str:
    return next(filter(None, (difference_on_threads(unsplit, plan, inputs) for plan in plans)), "")


def difference_on_threads(unsplit: nn.Module, plan: Plan, inputs: dict[str, Any]) -> str:
    """Description of the first difference between a small model and its split form."""
    wrong = first_wrong(compare_on_threads(unsplit, plan, inputs), TOLERANCE)
    if wrong is None:
        return ""
    return f"With its rules the {wrong.kind} {wrong.name} differs from the unsplit model's by {wrong.error:.1e}."


def _rounding_difference(model: nn.Module, plan: Plan) -> str:
    """Description of tensors that a split rounds worse, or in another dtype, than a small model in the dtype of `model`."""
    dtype = dtype_of(model)
    if dtype == torch.float64:
        return ""
    try:
        unsplit = small_model(model, plan.spec.num_heads, experts=_experts(plan.mesh), dtype=dtype)
    except ModelError:
        return ""  # The unsplit model does not run in this dtype here, so there is nothing to compare with.
    if sum(p.numel() for p in unsplit.parameters()) > LARGEST_ROUNDED:
        return ""
    try:
        spec = spec_of(unsplit)
        small = [Plan.make(spec, mesh, None, plan.rules) for mesh in plan.mesh.layer_meshes]
        found = [compare_rounding_on_threads(unsplit, one) for one in small]
    except Exception as error:
        return f"With its rules the forward fails in {name_of(dtype)}: {describe_error(error)}"
    wrong = next(filter(None, (one.first_wrong(name_of(dtype)) for one in found)), None)
    return f"With its rules {wrong}" if wrong else ""


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's floating parameters."""
    counts = Counter({torch.float32: 0})
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def small_model(
    model: nn.Module,
    num_heads: int,
    *,
    layers: int = 0,
    experts: int = 1,
    dtype: torch.dtype = torch.float64,
    short_windows: bool = False,
) -> nn.Module:
    """A small model of the same class on the CPU, with random nonzero weights.

    Args:
        model: The large model, on any device including meta.
        num_heads: The number of attention heads, which stays the same.
        layers: Minimum number of layers.
        experts: Minimum number of experts, if the model has as many.
        dtype: The dtype of the small model.
        short_windows: Whether sliding windows become shorter than the texts that are compared.

    Raises:
        ModelError: The class has no config to reduce, or no small model can be built and run.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ModelError(
            f"{type(model).__name__} has no transformers config. Pass sample_input=... to shard(), on which the module is "
            "compared with itself unsplit."
        )
    reasons: list[str] = []
    runs_on_text: nn.Module | None = None
    for data in shrunk_configs(config.to_dict(), num_heads, layers, experts):
        try:
            small = config_like(config, with_short_windows(data) if short_windows else data)
            small.architectures = [type(model).__name__]
            built = build_on_meta(small, dtype, type(model))
            if sum(p.numel() for p in built.parameters()) > LARGEST_PARAMETERS:
                reasons.append("it is too large even when reduced")
                continue
            filled = _drawn(small, built, dtype)
            with torch.no_grad(), Float64Everywhere() if dtype == torch.float64 else nullcontext():
                filled(**sample_inputs(filled))
            if dtype != torch.float64 or not measure_media(filled, lambda inputs: ""):
                return filled
            runs_on_text = filled if runs_on_text is None else runs_on_text
        except PartitaError as error:
            reasons.append(str(error))
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
    if runs_on_text is not None:
        return runs_on_text
    raise ModelError(f"no small model of {type(model).__name__} can be built and run ({reasons[0]}).")


def _drawn(config: Any, built: Any, dtype: torch.dtype) -> nn.Module:
    """`built` with its own initialization, and noise on norms and biases."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model: nn.Module = new_model(type(built), config, dtype).eval()
        if dtype == torch.float64:
            model.double()
        # Some tensors stay in float32 in a narrower model.
        for tensor, like in zip(model.state_dict(keep_vars=True).values(), built.state_dict().values(), strict=True):
            tensor.data = tensor.data.to(like.dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def fill_unsplit(built: nn.Module, seed: int = 0) -> nn.Module:
    """Fill an unsplit model on the meta device with random weights, including biases and norms: zeros could hide mistakes."""
    groups = single_groups()
    plan = Plan.make(spec_of(built), Mesh())
    fill = FreshFill(record_initialization(built), seed, perturb=0.1)
    make_unsaved_buffers(built, torch.device("cpu"))
    filled = materialize(built, plan, groups, fill, torch.device("cpu"))
    return filled.check(finish(built, plan, groups))


def _groups_of(mesh: Mesh, comm: Communicator) -> ParallelGroups:
    """The groups of a rank of one of `Mesh.layer_meshes`."""
    alone = Communicator.single()
    tp, replicas, ep = (comm if size > 1 else alone for size in (mesh.tp, mesh.dp, mesh.ep))
    return ParallelGroups(mesh, tp, alone, replicas, alone, replicas, ep, alone)


def compare_on_threads(unsplit: nn.Module, plan: Plan, inputs: dict[str, Any] | None = None) -> list[Difference]:
    """Split copies of `unsplit` by `plan` over threads, and compare them with it on `inputs` (default: text only)."""
    given = sample_inputs(unsplit) if inputs is None else inputs

    def one(comm: Any) -> list[Difference]:
        groups = _groups_of(plan.mesh, comm)
        split = finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)
        with Float64Everywhere():
            return compare(copy.deepcopy(unsplit), split, plan, groups, given)

    return run_as_threads(plan.mesh.size, one)[0]


def compare_rounding_on_threads(unsplit: nn.Module, plan: Plan) -> Measured:
    """Split copies of `unsplit` by `plan` over threads, and compare their rounding with that of `unsplit`."""
    inputs, exact = sample_inputs(unsplit), in_float64(unsplit)

    def one(comm: Any) -> Measured:
        groups = _groups_of(plan.mesh, comm)
        split = finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)
        return compare_rounding(copy.deepcopy(exact), copy.deepcopy(unsplit), split, plan, groups, inputs)

    return run_as_threads(plan.mesh.size, one)[0]


def sample_inputs(model: nn.Module, *, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Random ids with some padding at the end, as every transformers text model accepts, on the model's device.

    An encoder-decoder also gets ids for its decoder: some models make them from the encoder's, others require them.

    Raises:
        ModelError: The model has no vocabulary, or accepts no text.
    """
    main = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids" and "input_ids" not in inspect.signature(type(model).forward).parameters:
        raise ModelError(
            f"{type(model).__name__} takes {main} instead of text, and Partita has no sample of these to test it. Use one rank."
        )
    config: Any = model.config
    text = text_config_of(config)
    vocabulary = int(getattr(text, "vocab_size", 0) or 0)
    if vocabulary < 2:
        raise ModelError(f"{type(model).__name__} has no vocabulary, so its inputs are unknown.")
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    inputs = {"input_ids": ids, "attention_mask": mask}
    if takes_decoder_ids(model):
        inputs["decoder_input_ids"] = ids.flip(1)[:, : length - 2].contiguous()
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def takes_decoder_ids(model: nn.Module) -> bool:
    """Whether `model` is an encoder-decoder, whose forward takes the ids of its decoder beside those of its encoder."""
    is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return is_encoder_decoder and "decoder_input_ids" in inspect.signature(type(model).forward).parameters
