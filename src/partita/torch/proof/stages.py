"""Verification of stages before use: a small model of an unmeasured family is split between all its layers.

The stages run in sequence in this process, forward and backward, then token by token with a cache.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.layout.layout import LayerType
from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.core.sharding.rules import Rules
from partita.errors import ModelError, PartitaError
from partita.proof.differences import SMALL
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import ParallelGroups, single_groups
from partita.torch.model.balance import SWITCH, asks_for_balance
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import local_tensors, main_output
from partita.torch.model.transformers_models import spec_of
from partita.torch.proof.compare import relative_error
from partita.torch.proof.family import TOLERANCE, dtype_of, measure_media, sample_inputs, small_model
from partita.torch.proof.rounding import name_of
from partita.torch.split.apply import apply_plan
from partita.torch.stages.cut import refuse_features_elsewhere, refuse_uncuttable, wire_stages
from partita.torch.stages.layers import Message
from partita.torch.stages.run import run_stage
from partita.torch.transformers_internals import cache_argument, cache_of

_verdicts: dict[Any, tuple[str, str]] = {}
_media: dict[Any, dict[str, str]] = {}


def prove_stages(model: nn.Module, plan: Plan) -> None:
    """Raise for a model that cannot be split into stages.

    Raises:
        ModelError: The stages do not match the unsplit model, or cannot be tested.
    """
    if plan.num_stages == 1:
        return
    refuse_uncuttable(model)
    refuse_features_elsewhere(plan)
    if plan.rules.proven:
        return
    key = _key(model, plan)
    if key not in _verdicts:
        _verdicts[key] = _measure(model, plan)
    if _verdicts[key][0]:
        raise ModelError(f"{plan.spec.family} cannot be split into stages: {_verdicts[key][0]} Use tp and pp=1.")


def media_without_stages(model: nn.Module, plan: Plan) -> Mapping[str, str]:
    """The kinds of media that a model accepts but that fail with stages, and why. Call `prove_stages` first."""
    return _media.get(_key(model, plan), {}) if plan.num_stages > 1 else {}


def refuse_undecodable(model: nn.Module, plan: Plan) -> None:
    """Raise `ModelError` for a model whose cache failed with stages."""
    reason = _verdicts.get(_key(model, plan), ("", ""))[1]
    if plan.num_stages > 1 and reason:
        raise ModelError(f"{plan.spec.family} cannot generate with pipeline stages: {reason} Use tp and pp=1.")


def _key(model: nn.Module, plan: Plan) -> tuple[Any, ...]:
    return type(model).__name__, dtype_of(model), json.dumps(dict(plan.spec.config), sort_keys=True, default=str)


def _measure(model: nn.Module, plan: Plan) -> tuple[str, str]:
    """Why stages fail, in forward and backward, and in generation; empty if they do not."""
    try:
        unsplit = small_model(model, plan.spec.num_heads)
        parts = Parts(unsplit)
    except PartitaError as error:
        return f"its stages were not measured, and cannot be tested: {error}", ""
    except Exception as error:
        return f"it cannot be tested: {_line(error)}", ""
    try:
        with Float64Everywhere():
            wrong = parts.difference(sample_inputs(unsplit))
    except Exception as error:
        return f"its stages fail: {_line(error)}", ""
    wrong = wrong or _difference_in(dtype_of(model), model, plan)
    if wrong:
        return wrong, ""
    _media[_key(model, plan)] = measure_media(unsplit, parts.difference_in_float64)
    try:
        with Float64Everywhere(), torch.no_grad():
            return "", parts.decoding_difference()
    except Exception as error:
        return "", f"its stages fail with a cache: {_line(error)}"


def _difference_in(dtype: torch.dtype, model: nn.Module, plan: Plan) -> str:
    """Description of differences in the dtype of the model; empty if the unsplit model does not run in it."""
    if dtype == torch.float64:
        return ""
    try:
        unsplit = small_model(model, plan.spec.num_heads, dtype=dtype)
    except ModelError:
        return ""
    try:
        wrong = Parts(unsplit).difference(sample_inputs(unsplit))
    except Exception as error:
        return f"its stages fail in {name_of(dtype)}: {_line(error)}"
    return f"in {name_of(dtype)} {wrong}" if wrong else ""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}."


class Parts:
    """A small model split between all its layers, one copy per stage."""

    def __init__(self, unsplit: nn.Module) -> None:
        spec = spec_of(unsplit)
        if not spec.layers or spec.num_layers < 1:
            raise ModelError("it has no list of layers.")
        first = [LayerType.decoder] * spec.feature_layers
        layers = [[LayerType.decoder] for _ in range(spec.num_layers - len(first))]
        layout = [[LayerType.embedding, *first], *layers, [LayerType.loss]]
        self.unsplit = unsplit
        dtype = dtype_of(unsplit)
        # Stages compute in the order of the unsplit model, except for the sum of a tied tensor's two gradients.
        self.tolerance = TOLERANCE if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
        self.plan = Plan.make(spec, Mesh(pp=len(layout)), layout, Rules(()))
        self.parts = []
        for rank in range(len(layout)):
            groups = _alone_at(rank, self.plan)
            part = apply_plan(copy.deepcopy(unsplit), self.plan, groups)
            wire_stages(part, self.plan, rank)
            self.parts.append(part)

    def run(self, inputs: dict[str, Any], caches: list[Any]) -> tuple[list[tuple[Message, Any]], Any]:
        """Inputs and outputs of each stage, and the model's output."""
        message, steps = Message(()), []
        for index, part in enumerate(self.parts):
            given = message.as_leaves() if torch.is_grad_enabled() else message
            named = {} if caches[index] is None else {cache_argument(part): caches[index]}
            made, cache = run_stage(part, self.plan, index, given, {**inputs, **named})
            caches[index] = cache
            steps.append((given, made))
            message = made if isinstance(made, Message) else Message(())
        return steps, steps[-1][1]

    def difference(self, inputs: Mapping[str, Any]) -> str:
        """Description of the first difference in a forward and backward."""
        given_inputs: dict[str, Any] = dict(inputs)
        if asks_for_balance(self.unsplit):
            given_inputs[SWITCH] = False  # the auxiliary loss is verified separately
        for model in (self.unsplit, *self.parts):
            model.zero_grad(set_to_none=True)
        expected = main_output(self.unsplit(**given_inputs))
        steps, made = self.run(given_inputs, [None] * len(self.parts))
        output = main_output(made)
        if output.dtype != expected.dtype:
            return f"the output is {name_of(output.dtype)} instead of {name_of(expected.dtype)}."
        if (error := relative_error(expected.detach(), output.detach())) > self.tolerance or error != error:
            return f"the output differs from the unsplit model's by {error:.1e}."
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=expected.dtype)
        (expected * weight).sum().backward()
        given: list[Tensor] = []
        for received, message in reversed(steps):
            if isinstance(message, Message):
                torch.autograd.backward(message.tensors, given)
            else:
                (output * weight).sum().backward()
            given = [torch.zeros_like(t) if t.grad is None else t.grad for t in received.tensors]
        return self._gradient_difference()

    def difference_in_float64(self, inputs: dict[str, Tensor]) -> str:
        """Like `difference`, without narrowing."""
        with Float64Everywhere():
            return self.difference(inputs)

    def _gradient_difference(self) -> str:
        whole = dict(self.unsplit.named_parameters(remove_duplicate=False))
        found: dict[str, Tensor] = {}
        for part in self.parts:
            local = local_tensors(part, self.plan)
            seen: set[int] = set()
            for name, tensor in local.items():
                if tensor.grad is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    main = self.plan.spec.tensors[name].tied_to or name
                    found[main] = found[main] + tensor.grad if main in found else tensor.grad
        largest = max((float(p.grad.abs().max()) for p in whole.values() if p.grad is not None), default=0.0)
        for name, parameter in whole.items():
            if self.plan.spec.tensors[name].tied_to is not None or parameter.grad is None:
                continue
            got = found.get(name, torch.zeros_like(parameter.grad))
            scale = max(float(parameter.grad.abs().max()), SMALL * largest)
            if (error := relative_error(parameter.grad, got, scale)) > self.tolerance or error != error:
                return f"the gradient of {name} differs from the unsplit model's by {error:.1e}."
        return ""

    def decoding_difference(self) -> str:
        """Description of the first difference in token-by-token generation."""
        ids = sample_inputs(self.unsplit)["input_ids"]
        caches: list[Any] = [None] * len(self.parts)
        cache: Any = None
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8)):
            inputs = {"input_ids": ids[:, start:stop], "use_cache": True}
            if asks_for_balance(self.unsplit):
                inputs[SWITCH] = False
            whole = self.unsplit(**inputs, **{cache_argument(self.unsplit): cache})
            cache = cache_of(whole)
            if cache is None:
                return ""  # The unsplit model does not generate token by token.
            _, made = self.run(inputs, caches)
            error = relative_error(main_output(whole), main_output(made))
            if not error <= self.tolerance:
                return f"token {start} differs from the unsplit model's by {error:.1e}."
        return ""


def _alone_at(rank: int, plan: Plan) -> ParallelGroups:
    """Groups of one process in the role of pipeline rank `rank`."""
    place = Communicator.single()
    place.rank, place.size = rank, plan.mesh.pp
    return single_groups(mesh=plan.mesh, pp=place)
