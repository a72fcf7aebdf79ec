"""Calling a model that is split into stages: every rank calls it like the unsplit model and gets the full output.

        forward    each rank runs its stages when their inputs arrive; the last stage's output is sent to all ranks
        backward   from the output on the last stage, stage by stage to the first; other ranks' gradients of it are ignored
                   Gradients of inputs (embeddings, masks) are summed over the stages, so that every rank has them.

Such a call runs a single micro-batch; `pipeline.Pipeline` runs schedules of many.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from partita.core.plan import Plan
from partita.errors import ModelError
from partita.torch.collectives.comm import exactly_empty
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.layers.dropout import layer_randomness
from partita.torch.model.attentions import by_name, innermost_model
from partita.torch.model.cache import check_cache, counting_cache, find_cache
from partita.torch.model.parts import plan_of
from partita.torch.stages.copies import summed_copies
from partita.torch.stages.cut import is_cut, refuse_layer_drop
from partita.torch.stages.layers import RECORDED, Message
from partita.torch.stages.links import Links
from partita.torch.stages.run import run_stage
from partita.torch.transformers_internals import cache_argument, is_cache, recordable, rename_cache


def call_as_whole(model: nn.Module, plan: Plan, groups: ParallelGroups) -> None:
    """Make a call of `model`, which is split into stages, run the whole pipeline."""
    if not is_cut(plan):
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.partita_links = Links(groups.pp, device)  # type: ignore[assignment]

    # transformers reads the accepted arguments from the signature of `forward`.
    @wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    model.forward = MethodType(forward, model)


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the pipeline once, with the arguments and result of the unsplit model."""
    call = _Call(model, _bound(model, args, kwargs))
    if model.training and call.plan.num_stages > 1:
        refuse_layer_drop(model)
    outputs: list[Tensor] = []
    with call.randomness():
        output = call.forward()
    form = _take_apart(output, outputs) if call.is_last else None
    comm, last = call.groups.pp, call.plan.stage_rank(call.plan.loss_stage)
    described: Any = ([(t.dtype, tuple(t.shape)) for t in outputs], form)
    described = comm.broadcast_object(described, last)
    shapes, form = described
    if call.is_last:
        tensors = [t.detach().contiguous() for t in outputs]
    else:
        tensors = [exactly_empty(shape, dtype, call.links.device) for dtype, shape in shapes]
    for tensor in tensors:
        comm.broadcast_(tensor, last)
    if call.trains:
        call.outputs = outputs
        tensors = list(_Output.apply(torch.zeros((), requires_grad=True), call, *call.given, *tensors))
    if call.cache is None and call.plan.vpp == 1 and not call.has_layers and _has_cache(form):
        call.cache = counting_cache(model, call.inputs)
    return _put_together(form, tensors, call.cache)


def _bound(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises:
        ModelError: They request something that a single stage does not have.
    """
    inputs, cache_name = rename_cache(model, by_name(model, args, kwargs)), cache_argument(model)
    plan = plan_of(model)[0]
    _refuse_unrecorded(model, plan, inputs)
    if plan.num_mtp and model.training and inputs.get("input_ids") is None:
        raise ModelError(
            "multi-token prediction layers embed the ids of later positions, so training them needs input_ids, not "
            "inputs_embeds."
        )
    cache = inputs.get(cache_name)
    if hasattr(cache, "layers") and plan.num_stages > 1:
        check_cache(cache)
    if (cache is not None or inputs.get("use_cache")) and plan.vpp > 1:
        name = f"{cache_name}=..." if cache is not None else "use_cache=True"
        raise ModelError(
            f"{name} would share one cache between several stages of a rank, and each would count its tokens. Call "
            "partita.torch.generate(), or use vpp=1."
        )
    return inputs


def _refuse_unrecorded(model: Any, plan: Plan, inputs: Mapping[str, Any]) -> None:
    """Raise `ModelError` for requested per-layer outputs that stages cannot pass on."""
    can = recordable(model.get_submodule(innermost_model(model, plan.spec.layers)))
    for name, wanted in _requests(model, plan, inputs).items():
        label = name.removeprefix("output_")
        if not wanted or (can and label not in can):
            # transformers, too, ignores a request for outputs that a model does not have.
            continue
        if label not in can.intersection(RECORDED):
            raise ModelError(
                f"{name}=True requests outputs of every stage, but {type(model).__name__} does not record them in a way "
                "that stages can pass on. Leave it out, or use pp=1."
            )
        if plan.num_mtp and model.training:
            raise ModelError(
                f"{name}=True is not supported while multi-token prediction layers train. Leave it out, or call eval()."
            )


def _requests(model: Any, plan: Plan, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The per-layer outputs that a call or a config requests, by the argument's name."""
    inner = model.get_submodule(innermost_model(model, plan.spec.layers))
    configs = [getattr(module, "config", None) for module in (model, inner)]
    names = {f"output_{name}" for name in RECORDED} | {name for name in inputs if name.startswith("output_")}
    return {
        name: inputs[name] if name in inputs else next((v for c in configs if (v := getattr(c, name, False))), False)
        for name in sorted(names)
    }


class _Call:
    """One call of a model: inputs and outputs of each stage of this rank."""

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        self.plan, self.groups = plan_of(model)
        self.model, self.links = model, model.partita_links
        # A stage's backward ends at the inputs; the gradients of all stages are summed afterwards.
        self.given = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
        self.leaves = [v.detach().requires_grad_() for v in self.given]
        leaf_of = {id(v): leaf for v, leaf in zip(self.given, self.leaves, strict=True)}
        self.inputs = {name: leaf_of.get(id(v), v) for name, v in inputs.items()}
        trains = torch.is_grad_enabled() and bool(self.given or any(p.requires_grad for p in model.parameters()))
        dtypes = sorted({str(p.dtype) for p in model.parameters()})
        told: list[Any] = self.groups.pp.all_gather_object((trains, dtypes))
        self.trains = torch.is_grad_enabled() and any(one for one, _ in told)
        rank = self.groups.pp.rank
        self.stages = sorted(self.plan.stage_index(rank, vpp) for vpp in range(self.plan.vpp))
        self.is_last = self.plan.loss_stage in self.stages
        self.has_layers = any(self.plan.stage(rank, vpp).layers for vpp in range(self.plan.vpp))
        self.cache: Any = None
        requests = tuple((name, str(wanted)) for name, wanted in _requests(model, self.plan, inputs).items() if wanted)
        # The size of attention weights depends on the cache.
        past = find_cache((), inputs).get_seq_length() if requests and find_cache((), inputs) is not None else 0
        self.key = (model.training, requests, past, str(told), *_autocast(), *_shapes(inputs))
        self.outputs: list[Tensor] = []
        self._alive: dict[int, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def _is_here(self, stage: int) -> bool:
        return self.plan.stage_rank(stage) == self.groups.pp.rank

    def randomness(self) -> AbstractContextManager[None]:
        """Context around forward and backward in which layers of different stages drop different elements."""
        return layer_randomness(self.model, self.plan) if self.trains else nullcontext()

    def forward(self) -> Any:
        """Run this rank's stages. Returns the output of the last stage, or the message of any other."""
        result: Any = None
        message = Message(())
        for stage in self.stages:
            received = message
            if stage > 0 and not self._is_here(stage - 1):
                received = self.links.receive(self.plan.stage_rank(stage - 1), stage, self.key).wait()
            if self.trains:
                received = received.as_leaves()
            output, cache = run_stage(self.model, self.plan, stage, received, self.inputs)
            self.cache = cache if self.plan.vpp == 1 else None
            if stage == self.plan.loss_stage:
                result, output = output, Message(())
            message = output
            self._alive[stage] = (received.tensors, message.tensors)
            if stage + 1 < self.plan.num_stages and not self._is_here(stage + 1):
                self.links.send(self.plan.stage_rank(stage + 1), stage, message, self.key)
        self.links.flush()
        return result

    def backward(self, output_grads: tuple[Tensor | None, ...]) -> list[Tensor]:
        """Backward of this rank's stages, from the output's gradients on the last stage, from the next stage's message on
        others.

        Returns:
            Gradients of the inputs that require them, the same on every rank.
        """
        with summed_copies(self.model, self.plan, self.groups):
            left: list[Tensor] = []
            for stage in reversed(self.stages):
                received, outputs = self._alive.pop(stage)
                given: Any
                if stage == self.plan.num_stages - 1:
                    given = ()
                elif self._is_here(stage + 1):
                    given = left
                else:
                    source = self.plan.stage_rank(stage + 1)
                    given = self.links.receive_gradient(source, stage, self.key).wait().tensors
                if stage == self.plan.loss_stage:
                    outputs, given = tuple(self.outputs), output_grads
                pairs = [(t, g) for t, g in zip(outputs, given, strict=True) if t.requires_grad and g is not None]
                if pairs:
                    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
                left = [torch.zeros_like(t) if t.grad is None else t.grad for t in received]
                if stage > 0 and not self._is_here(stage - 1):
                    self.links.send_gradient(self.plan.stage_rank(stage - 1), left)
            self.links.flush()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        return [self.groups.pp.all_reduce_(grad) for grad in grads]


def _autocast() -> tuple[torch.dtype | None, ...]:
    """autocast's dtype on each device type; it determines the form of the stages' messages."""
    return tuple(torch.get_autocast_dtype(k) if torch.is_autocast_enabled(k) else None for k in ("cpu", "cuda"))


class _Output(Function):
    """The output of a pipeline; its backward runs the backward of the stages."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        tensors = tensors[len(call.given) :]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in tensors if not t.is_floating_point()))
        # A loss is often scaled in place, which torch forbids for one view of several.
        return tuple(t.clone() if t.dim() == 0 else t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.enable_grad(), ctx.call.randomness():
            given = ctx.call.backward(grads)
        return (torch.zeros(()), None, *given, *(None for _ in grads))


def _shapes(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, tuple(value.shape)) for name, value in inputs.items() if isinstance(value, Tensor))


class _Place(NamedTuple):
    """Placeholder for a tensor of an output."""

    number: int


class _Made(NamedTuple):
    """An object of type `kind` with these parts."""

    kind: Any
    parts: Any


_CACHE = "the cache"


def _take_apart(value: Any, tensors: list[Tensor]) -> Any:
    """`value` without its tensors, which are appended to `tensors`, and without its cache: every rank has its own."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if is_cache(value):
        return _Made(_CACHE, None)
    if isinstance(value, Mapping):
        return _Made(type(value), {name: _take_apart(part, tensors) for name, part in value.items()})
    if isinstance(value, (tuple, list)):
        return _Made(type(value), [_take_apart(part, tensors) for part in value])
    return value


def _has_cache(form: Any) -> bool:
    parts = (
        form.parts.values() if isinstance(form, _Made) and isinstance(form.parts, dict) else getattr(form, "parts", ())
    )
    return isinstance(form, _Made) and (form.kind == _CACHE or any(_has_cache(part) for part in parts or ()))


def _put_together(form: Any, tensors: list[Tensor], cache: Any) -> Any:
    if isinstance(form, _Place):
        return tensors[form.number]
    if not isinstance(form, _Made):
        return form
    if form.kind == _CACHE:
        return cache
    if isinstance(form.parts, dict):
        return form.kind(**{name: _put_together(part, tensors, cache) for name, part in form.parts.items()})
    return form.kind(_put_together(part, tensors, cache) for part in form.parts)
