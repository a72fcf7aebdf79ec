"""What a call changes of a model and of MLX, and restores at its end, also after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@contextmanager
def mode_set(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set the training flag of every module inside the context; each has its own value again afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module._set_training_mode(flag)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the state of MLX's generator at the end of the context."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # MLX has no other setter; the state is the seed until a number is sampled
