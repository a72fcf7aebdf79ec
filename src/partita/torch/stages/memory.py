"""What happens to a stage's parameters and gradients around the actions of a schedule: nothing, unless replicas share them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


class StageMemory:
    """Keeps all parameters and gradients; a subclass gathers, reduces and releases them."""

    def opened(self) -> AbstractContextManager[None]:
        """A context around all actions of a step, and around what is done with its gradients before they are reduced."""
        return nullcontext()

    def forward(self, stage: int) -> AbstractContextManager[None]:
        """A context around a forward of a stage."""
        return nullcontext()

    def backward(self, stage: int, *, has_weights: bool, is_last: bool) -> AbstractContextManager[None]:
        """A context around a backward of a stage.

        Args:
            stage: The stage.
            has_weights: Whether it computes the gradients of the weights.
            is_last: Whether it is the stage's last one of the step.
        """
        return nullcontext()

    def weights_done(self, stage: int, *, is_last: bool) -> None:
        """Called after the deferred weight gradients of a stage are computed."""
