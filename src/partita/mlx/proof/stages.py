"""Verification of stages before use: a small model of the family is split between all its layers, one copy per stage.

The stages run in sequence in this process: forward, backward by one vjp per stage, then token by token with caches.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.layout.layout import LayerType
from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.core.sharding.rules import Rules
from partita.errors import ModelError, PartitaError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.threads import run_as_threads
from partita.mlx.mlx_lm_internals import make_cache
from partita.mlx.model.mlx_lm_models import config_of, describe, spec_of
from partita.mlx.model.parts import main_output
from partita.mlx.model.trainable import Trainable
from partita.mlx.proof.compare import CACHED_STEPS, generate_steps, gradients, relative_error
from partita.mlx.proof.family import TOLERANCES, Small, dtype_of, in_dtype, sample_inputs, small_model
from partita.mlx.split.apply import apply_plan
from partita.mlx.stages.layers import Message
from partita.mlx.stages.run import run_stage
from partita.proof.differences import SMALL

_verdicts: dict[Any, tuple[str, str]] = {}


def prove_stages(model: nn.Module, plan: Plan) -> None:
    """Raise for a model that cannot be split into stages.

    Raises:
        ModelError: The stages do not match the unsplit model, or cannot be tested.
    """
    if plan.num_mtp:
        raise ModelError("mlx-lm's models have no multi-token prediction. Leave `m` out of the layout.")
    if plan.num_stages > 1 and (reason := _reason(model, plan)):
        raise ModelError(f"{plan.spec.family} cannot be split into stages: {reason} Use tp and pp=1.")


def prove_parts(model: nn.Module, plan: Plan) -> None:
    """Raise `ModelError` for a model whose layers cannot be recomputed apart from each other, as stages of one layer are."""
    if reason := _reason(model, plan):
        raise ModelError(
            f"{plan.spec.family} cannot be trained with checkpointing, which recomputes its layers apart from each other: "
            f"{reason} Leave checkpointing out."
        )


def _reason(model: nn.Module, plan: Plan) -> str:
    key = _key(model)
    if key not in _verdicts:
        _verdicts[key] = _measure(model, plan.spec.num_heads)
    return _verdicts[key][0]


def refuse_undecodable(model: nn.Module, plan: Plan) -> None:
    """Raise `ModelError` for a model whose cache failed with stages."""
    reason = _verdicts.get(_key(model), ("", ""))[1]
    if plan.num_stages > 1 and reason:
        raise ModelError(f"{plan.spec.family} cannot generate with pipeline stages: {reason} Use tp and pp=1.")


def _key(model: nn.Module) -> tuple[Any, str, mx.Dtype]:
    cls: Any = getattr(type(model), "partita_unsplit", type(model))
    return cls, json.dumps(_plain_config(model), sort_keys=True), dtype_of(model)


def _plain_config(model: nn.Module) -> dict[str, Any]:
    config = config_of(model)
    config.pop("quantization", None)
    return config


def _measure(model: nn.Module, num_heads: int) -> tuple[str, str]:
    """Why stages of a model's family fail, in forward and backward, and in generation; empty if they do not."""
    config, dtype = _plain_config(model), dtype_of(model)
    try:
        # In a separate thread, which does not change the user's random state.
        (verdict,) = run_as_threads(1, lambda _: _verdict(type(model), config, num_heads, dtype))
    except PartitaError as error:
        return str(error), ""
    except Exception as error:
        return f"its stages fail: {describe(error)}", ""
    return verdict


def _verdict(cls: type[nn.Module], config: Mapping[str, Any], num_heads: int, dtype: mx.Dtype) -> tuple[str, str]:
    small = small_model(cls, config, num_heads)
    parts = _Parts(small)
    reason = parts.difference()
    narrow = None if reason else in_dtype(small, dtype)
    if narrow is not None and (wrong := _Parts(narrow).difference()):
        reason = f"in {str(dtype).removeprefix('mlx.core.')} {wrong}"
    if reason or not small.cached:
        return reason, ""
    try:
        return "", parts.decoding_difference()
    except Exception as error:
        return "", f"its stages fail with a cache: {describe(error)}"


class _Parts:
    """A small model split between all its layers, one copy per stage."""

    def __init__(self, small: Small) -> None:
        spec = spec_of(small.model)
        if not spec.layers or spec.num_layers < 1:
            raise ModelError("it has no list of layers.")
        layers = [[LayerType.decoder] for _ in range(spec.num_layers)]
        layout = [[LayerType.embedding], *layers, [LayerType.loss]]
        self.small = small
        # Stages compute in the order of the unsplit model, except for the sum of a tied array's two gradients.
        self.tolerance = TOLERANCES.get(small.dtype, 4 * float(mx.finfo(small.dtype).eps))
        self.plan = Plan.make(spec, Mesh(pp=len(layout)), layout, Rules(()))
        self.inputs = sample_inputs(small.model)
        self.parts = [
            apply_plan(copy.deepcopy(small.model), self.plan, Communicator.single(), rank)
            for rank in range(len(layout))
        ]

    def run(self, inputs: mx.array, caches: list[Any]) -> tuple[list[Message | None], mx.array]:
        """Inputs of each stage, and the model's output."""
        given: list[Message | None] = []
        made: Any = None
        for index, part in enumerate(self.parts):
            given.append(made)
            made = run_stage(part, self.plan, index, made, inputs, caches[index])
            mx.eval(made.arrays if isinstance(made, Message) else main_output(made))
        return given, main_output(made)

    def difference(self) -> str:
        """Description of the first difference in a forward and backward."""
        expected = main_output(self.small.model(self.inputs))
        given, output = self.run(self.inputs, [None] * len(self.parts))
        error = relative_error(expected, output)
        if not error <= self.tolerance:
            return f"the output differs from the unsplit model's by {error:.1e}."
        return self._gradient_difference(given) if self.small.backward else ""

    def _gradient_difference(self, given: list[Message | None]) -> str:
        whole = gradients(self.small.model, self.inputs)
        found: dict[str, mx.array] = {}
        cotangents: list[mx.array] = []
        for index in reversed(range(len(self.parts))):
            names, mine, cotangents = self._backward(index, given[index], cotangents)
            for name, gradient in zip(names, mine, strict=True):
                found[name] = found[name] + gradient if name in found else gradient
        largest = max((float(mx.abs(g).max()) for g in whole.values()), default=0.0)
        for name, gradient in whole.items():
            got = found.get(name, mx.zeros_like(gradient))
            error = relative_error(gradient, got, max(float(mx.abs(gradient).max()), SMALL * largest))
            if not error <= self.tolerance:
                return f"the gradient of {name} differs from the unsplit model's by {error:.1e}."
        return ""

    def _backward(
        self, index: int, given: Message | None, cotangents: list[mx.array]
    ) -> tuple[list[str], list[mx.array], list[mx.array]]:
        """Names and gradients of a stage's parameters, and the gradients of its inputs."""
        part = self.parts[index]
        trainable = Trainable(part)
        arrays = [] if given is None else list(given.arrays)
        is_last = index == self.plan.loss_stage

        def stage(received: list[mx.array]) -> list[mx.array]:
            message = None if given is None else Message(tuple(received), given.places)
            made = run_stage(part, self.plan, index, message, self.inputs)
            if not is_last:
                return list(made.arrays)
            logits = main_output(made)
            # The same sum as in `compare.gradients`.
            return [(logits * mx.random.normal(logits.shape, key=mx.random.key(0)).astype(logits.dtype)).sum()]

        _, mine, received = trainable.vjp(stage, arrays, [mx.array(1.0, self.small.dtype)] if is_last else cotangents)
        mx.eval(mine, received)
        return list(trainable.names), mine, received

    def decoding_difference(self) -> str:
        """Description of the first difference in token-by-token generation."""
        expected = generate_steps(self.small.model, self.inputs)
        caches = [make_cache(part) for part in self.parts]
        first = self.inputs.shape[1] - CACHED_STEPS
        self.run(self.inputs[:, :first], caches)
        for step in range(CACHED_STEPS):
            _, output = self.run(self.inputs[:, first + step : first + step + 1], caches)
            error = relative_error(expected[:, step : step + 1], output)
            if not error <= self.tolerance:
                return f"token {first + step} differs from the unsplit model's by {error:.1e}."
        return ""
