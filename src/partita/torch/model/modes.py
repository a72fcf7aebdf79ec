"""What a call changes of a model and of torch, and restores at its end, also after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore the states of torch's generators, of the CPU and of the model's GPU, at the end of the context."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def checkpointing_set(model: Any) -> Iterator[None]:
    """Recompute the activations of a model of transformers in backward inside the context."""
    new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    was_set = getattr(model, "is_activation_checkpointing" if new else "is_gradient_checkpointing", False)
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if not was_set:
            getattr(model, f"{name}_disable")()
