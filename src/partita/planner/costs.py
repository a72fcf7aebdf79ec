"""What the search asks of the costs of arrangements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from partita.core.mesh import Mesh
from partita.cost.work import Arrangement, Estimate
from partita.planner.layers import Amounts, Memory
from partita.planner.space import Group


@dataclass(frozen=True)
class Bound:
    """What no arrangement of a mesh goes below.

    Attributes:
        seconds: Seconds of the work (see `Costs.seconds_of`).
        bytes: Bytes of the rank that needs most of its memory.
        limit: Bytes that this rank may use.
    """

    seconds: float
    bytes: int
    limit: int

    @property
    def can_fit(self) -> bool:
        """Whether an arrangement of the mesh may fit."""
        return self.bytes <= self.limit


class Costs(Protocol):
    """The costs of one piece of work with one model on one machine."""

    num_layers: int
    max_tp: int

    def bound(self, mesh: Mesh) -> Bound:
        """What all arrangements of a mesh need at least. Raises `PlanError` for a mesh that cannot split the model."""

    def least_seconds(self, group: Group) -> float:
        """The seconds that all arrangements of a group need at least."""

    def stage_seconds(self, arrangement: Arrangement) -> Amounts:
        """Seconds of a micro-batch, forward and backward, by stage and layer; `arrangement.layers` does not count."""

    def stage_bytes(self, arrangement: Arrangement) -> Memory:
        """Bytes by stage and layer, which come to at least those of `estimate`, and the limits of the pipeline ranks."""

    def estimate(self, arrangement: Arrangement) -> Estimate:
        """What a complete arrangement costs."""

    def seconds_of(self, estimate: Estimate) -> float:
        """Seconds of the work: of a training step, or of reading the prompts and decoding all tokens."""
