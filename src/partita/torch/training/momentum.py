"""SGD with momentum, and Muon, over the parameters of a split model.

Muon orthogonalizes the update of a matrix, which needs the unsplit one: the tensor ranks gather it, compute the same result,
and take their parts. Sources: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale of the update, with which
AdamW's learning rate and weight decay fit: Liu et al. 2025, 2502.16982, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from partita.core.optimizers import MOMENTUM
from partita.torch.training.optimizer import MasterAdamW, Mastered

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen by its author for the steepest slope at zero."""
ITERATIONS = 5

Gather = Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]
"""Maps a rank's part of a matrix to the unsplit matrix, and to the function that takes its part of another such matrix."""


class MasterSGD(Mastered):
    """`torch.optim.SGD` with momentum, and masters: velocity = momentum x velocity + gradient + weight decay x weight."""

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        """Step `params`, parameters or groups of them."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The velocity."""
        return MOMENTUM

    def update(
        self, stepped: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], place: Tensor
    ) -> None:
        """SGD's step."""
        velocity = state["momentum_buffer"]
        velocity.mul_(group["momentum"]).add_(grad).add_(stepped, alpha=group["weight_decay"])
        stepped.sub_(velocity, alpha=group["lr"])
        state["step"] += 1


class SplitMuon(MasterAdamW):
    """Muon for the groups with `matrix`, AdamW for the others."""

    def __init__(self, params: Any, gather: dict[int, Gather], **given: Any) -> None:
        """Step groups of parameters; `gather` has the function for each parameter that tensor ranks split, by its id."""
        super().__init__(params, **given)
        self._gather = gather

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Muon's momentum, or AdamW's running means."""
        return MOMENTUM if group["matrix"] else super().moments(group)

    def update(
        self, stepped: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], place: Tensor
    ) -> None:
        """Muon's step with Nesterov's momentum, or AdamW's."""
        if not group["matrix"]:
            super().update(stepped, grad, state, group, place)
            return
        velocity = state["momentum_buffer"]
        velocity.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(velocity, group["momentum"])
        take: Callable[[Tensor], Tensor] = _same
        if id(place) in self._gather:
            update, take = self._gather[id(place)](update)
        scale = 0.2 * max(update.shape[-2:]) ** 0.5
        stepped.mul_(1 - group["lr"] * group["weight_decay"])
        stepped.sub_(take(orthogonal(update)), alpha=group["lr"] * scale)
        state["step"] += 1


def _same(update: Tensor) -> Tensor:
    return update


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T for the singular value decomposition U S V^T of `matrix` `[..., rows, columns]`, in its own dtype."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = x.mT if is_tall else x
    return result
