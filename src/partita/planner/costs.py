"""What the search asks of the costs of arrangements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from partita.core.mesh import Mesh
from partita.cost.work import Arrangement, Estimate, MemoryUse, Recompute, Work
from partita.planner.layers import Amounts, Memory
from partita.planner.space import Bound, Family, Group, Most, Settings


class Costs(Protocol):
    """The costs of one piece of work with one model on one machine."""

    most: Most

    def bound(self, mesh: Mesh) -> Bound:
        """What all arrangements of a mesh need at least. Raises `PlanError` for a mesh that cannot split the model."""

    def least_seconds_of_family(
        self, family: Family, recompute: Recompute = "none", parallel: Sequence[bool] = (False, True)
    ) -> float:
        """`least_seconds` of all groups of a family. Raises `PlanError` as `bound` does."""

    def least_share_of_family(self, family: Family, recompute: Recompute, chosen: Settings) -> float:
        """`least_share` of all groups of a family."""

    def least_seconds(
        self, group: Group, recompute: Recompute = "none", chosen: Settings | None = None,
        parallel: Sequence[bool] = (False, True),
    ) -> float:  # fmt: skip
        """The seconds that all arrangements of a group that recompute so much, or more, need at least: with the `chosen`
        settings, or with any whose sequence parallelism is one of `parallel`.

        Raises `PlanError` as `bound` does.
        """

    def least_seconds_of(self, arrangement: Arrangement) -> float:
        """The seconds that a complete arrangement needs at least; 0 if `estimate` says so as fast."""

    def stage_seconds(self, arrangement: Arrangement) -> Amounts:
        """Seconds of a micro-batch, forward and backward, by stage and layer; `arrangement.layers` does not count."""

    def stage_bytes(self, arrangement: Arrangement) -> Memory:
        """Bytes by stage and layer, which come to at least those of `estimate`, and the limits of the pipeline ranks."""

    def least_bytes(self, arrangement: Arrangement) -> float:
        """The bytes that an arrangement needs at least on the mean pipeline rank, by the sums of `stage_bytes`."""

    def is_short(self, arrangement: Arrangement, slack: float = 0.0) -> bool:
        """Whether no assignment of the layers fits, by the sums of `stage_bytes`, with so much more memory."""

    def least_share(self, arrangement: Arrangement) -> float:
        """The share of the memory of all ranks together that an arrangement needs at least, by the sums of `stage_bytes`."""

    def memory(self, arrangement: Arrangement) -> tuple[MemoryUse, ...]:
        """The bytes of every rank of a complete arrangement."""

    def limit(self, mesh: Mesh) -> tuple[int, ...]:
        """The bytes that every rank may use."""

    def estimate(self, arrangement: Arrangement) -> Estimate:
        """What a complete arrangement costs."""

    def seconds_of(self, estimate: Estimate) -> float:
        """Seconds of the work: of a training step, or of reading the prompts and decoding all tokens."""


CostsOf = Callable[[Work, int], Costs]
"""The costs of a piece of work on a number of ranks; raises `PlanError` if the machine has fewer."""
