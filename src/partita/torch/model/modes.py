"""What a call changes of a model and of torch, and restores at its end, also after an error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from partita.core.plan import Plan
from partita.errors import ModelError
from partita.torch.layers.compiled import compiled_parts
from partita.torch.model.float64 import recomputed_alike


@contextmanager
def mode_set(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set the training flag of every module inside the context; each has its own value again afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def attributes_at_hand(model: nn.Module) -> Iterator[None]:
    """Make every module find its submodules and parameters as ordinary attributes inside the context.

    `nn.Module` finds them by `__getattr__`, after the usual search has failed, which is a twentieth of what a small layer takes
    for a token. Buffers are not included, since a forward may register them again. Compiled modules have guards on their
    attributes and stay as they are.
    """
    compiled = compiled_parts(model)
    added: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if module in compiled:
            continue
        for name, value in (*module._modules.items(), *module._parameters.items()):
            if value is not None and name not in vars(module):
                vars(module)[name] = value
                added.append((module, name))
    try:
        yield
    finally:
        for module, name in added:
            # It is gone if the attribute was set meanwhile.
            vars(module).pop(name, None)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore the states of torch's generators, of the CPU and of the model's GPU, at the end of the context."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def checkpointing_set(model: Any, which: bool | int | str, plan: Plan) -> Iterator[None]:
    """Recompute activations of a model of transformers in backward inside the context; see `TrainSettings.checkpointing`.

    Raises:
        ModelError: The family cannot recompute only a part.
    """
    if not which:
        yield
    elif which == "selective":
        with _attention_checkpointed(model, plan):
            yield
    else:
        with _layers_checkpointed(model, plan, 1 if which == "full" else int(which)):
            yield


@contextmanager
def _layers_checkpointed(model: Any, plan: Plan, every: int) -> Iterator[None]:
    before = [(module, module.gradient_checkpointing) for module in _flagged(model)]
    new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    was_set = getattr(model, "is_activation_checkpointing" if new else "is_gradient_checkpointing", False)
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    try:
        if every > 1:
            _keep_others(model, plan, every)
        yield
    finally:
        if not was_set:
            getattr(model, f"{name}_disable")()
        for module, flag in before:
            module.gradient_checkpointing = flag


def _flagged(module: nn.Module) -> list[Any]:
    return [one for one in module.modules() if hasattr(one, "gradient_checkpointing")]


def _keep_others(model: nn.Module, plan: Plan, every: int) -> None:
    """Keep the activations of the layers between every `every`th."""
    layers = list(model.get_submodule(plan.spec.layers).named_children()) if plan.spec.layers else []
    flagged = {name: _flagged(layer) for name, layer in layers}
    if not layers or not all(flagged.values()):
        if layers or not plan.spec.layers:
            raise ModelError(
                f"the layers of {plan.spec.family} do not choose by themselves whether they recompute their activations, so "
                f"checkpointing={every} is not possible. Use checkpointing='full' or 'selective'."
            )
        return  # a rank without layers
    for name, modules in flagged.items():
        for module in modules:
            module.gradient_checkpointing = int(name) % every == 0


@contextmanager
def _attention_checkpointed(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Recompute the attention modules only: what they keep grows with the square of the length, or with the heads."""
    layers = model.get_submodule(plan.spec.layers) if plan.spec.layers else nn.Module()
    held = _outermost_attentions(layers)
    if not held and list(layers.children()):
        raise ModelError(
            f"the layers of {plan.spec.family} have no attention module for checkpointing='selective'. Use 'full'."
        )
    before = [module.__dict__.get("forward") for module in held]
    try:
        for module in held:
            module.forward = _checkpointed(module, module.forward)
        yield
    finally:
        for module, own in zip(held, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own


def _outermost_attentions(module: nn.Module) -> list[nn.Module]:
    """The attention modules, as transformers calls their classes, that are in no other."""
    if "Attention" in type(module).__name__:
        return [module]
    return [found for child in module.children() for found in _outermost_attentions(child)]


def _checkpointed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not module.training or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **recomputed_alike(), **kwargs)

    return recomputed
