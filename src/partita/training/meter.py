"""What a step cost: the memory of all ranks, and the share of the devices' peak that it used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from partita.core.plan import Plan
from partita.cost.flops import flops_per_token
from partita.ranks.agreement import Gathers
from partita.training.settings import TrainSettings

EVERY = 10
"""Steps between two exchanges of the peaks of memory, after the first steps; a peak only rises."""


@dataclass
class Meter:
    """Measures steps. Every rank calls it for the same steps.

    Attributes:
        axes: The groups of this rank with more than one rank.
        peak_bytes: Returns the peak of this rank's memory.
        token_flops: Operations of the model for a token.
        peak_flops: Operations per second of all devices; None if unknown.
        memory_bytes: The largest peak that was exchanged last.
    """

    axes: Sequence[Gathers]
    peak_bytes: Callable[[], int]
    token_flops: float
    peak_flops: float | None
    memory_bytes: int = field(default=0, init=False)

    @classmethod
    def of(
        cls,
        plan: Plan,
        settings: TrainSettings,
        axes: Sequence[Gathers],
        peak_bytes: Callable[[], int],
        peak_flops: float | None,
        *,
        is_frozen: bool,
    ) -> Meter:
        """The meter of a run, with the `peak_flops` of one device."""
        flops = flops_per_token(plan.spec, settings.sequence_length, is_frozen=is_frozen)
        return cls(axes, peak_bytes, flops, None if peak_flops is None else peak_flops * plan.mesh.size)

    def memory(self, step: int, first: int, last: int) -> int:
        """The largest peak of all ranks after step `step` of the steps from `first` to `last`."""
        if step - first < 2 or step % EVERY == 0 or step == last:
            self.memory_bytes = self.peak_bytes()
            for comm in self.axes:
                self.memory_bytes = max(comm.all_gather_object(self.memory_bytes))
        return self.memory_bytes

    def mfu(self, tokens: int, seconds: float) -> float | None:
        """The share of the peak that a step used."""
        return None if self.peak_flops is None else self.token_flops * tokens / seconds / self.peak_flops
