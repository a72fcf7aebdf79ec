"""What this rank knows of a step besides its numbers: what is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from partita.mlx.collectives.groups import ParallelGroups
from partita.training.finite import Fault


@dataclass
class LocalStep:
    """The losses and gradients of this rank's replica in a step, before replicas are summed.

    Attributes:
        groups: This rank's groups.
        losses: The loss of each micro-batch, on the rank with the loss.
        zeros: The sum of each gradient's elements times zero, by name; not finite if an element is not.
    """

    groups: ParallelGroups
    losses: Sequence[mx.array] = ()
    zeros: dict[str, mx.array] = field(default_factory=dict)

    def before_sum(self, gradients: Mapping[str, mx.array], losses: Sequence[mx.array]) -> None:
        """Keep the losses, and what tells of each gradient whether it is finite. Replicas are about to sum them."""
        self.losses = losses
        self.zeros = {name: mx.sum(gradient * 0) for name, gradient in gradients.items()}
        mx.eval(self.zeros)

    def fault(self) -> Fault:
        """What is not finite."""
        names = [name for name, zero in self.zeros.items() if not math.isfinite(_number(zero))]
        bad = tuple(number for number, loss in enumerate(self.losses) if not math.isfinite(_number(loss)))
        return Fault(self.groups.rank, self.groups.dp.rank, bad, names[-1] if names else None)


def _number(array: mx.array) -> float:
    value = array.item()
    assert isinstance(value, (int, float))
    return float(value)
