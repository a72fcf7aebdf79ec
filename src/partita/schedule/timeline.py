"""`Timeline`: the start and end of each action of a schedule, predicted or measured, and the numbers that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from partita.schedule.action import Kind, Schedule


@dataclass(frozen=True)
class Timeline:
    """The start and end of each action. Bubbles count computations only: sends and receives occupy no rank.

    Attributes:
        schedule: The actions.
        starts: The start of each action, one row per rank in the schedule's order, in any unit of time.
        ends: The end of each action.
    """

    schedule: Schedule
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]

    @cached_property
    def _spans(self) -> tuple[tuple[float, float, float], ...]:
        """For each rank: the start of its first computation, the end of its last, and its busy time."""
        spans = []
        for row, starts, ends in zip(self.schedule.ranks, self.starts, self.ends, strict=True):
            times = [(start, end) for action, start, end in zip(row, starts, ends, strict=True) if action.is_compute]
            first = min((start for start, _ in times), default=math.inf)
            last = max((end for _, end in times), default=-math.inf)
            spans.append((first, last, sum(end - start for start, end in times)))
        return tuple(spans)

    @property
    def makespan(self) -> float:
        """The time from the first start of all ranks to the last end."""
        begin = min((start for start, _, _ in self._spans), default=math.inf)
        return max(0.0, max((end for _, end, _ in self._spans), default=-math.inf) - begin)

    @property
    def busy(self) -> tuple[float, ...]:
        """The time for which each rank computes."""
        return tuple(busy for _, _, busy in self._spans)

    @property
    def bubble_makespan(self) -> float:
        """The mean fraction of the makespan for which a rank is idle: 1 - mean of `busy` / `makespan`."""
        return self._idle(self.makespan)

    @property
    def bubble_span(self) -> float:
        """1 - mean of `busy` / the longest time from a rank's own first start to its own last end.

        This is the bubble rate of 2401.10241, whose cost of a schedule is the longest time from a stage's own start to its
        own end: ranks that start and end one after the other lose nothing if the next step starts in the same way.
        """
        return self._idle(max((end - start for start, end, _ in self._spans), default=0.0))

    def _idle(self, time: float) -> float:
        return 1 - sum(self.busy) / len(self.busy) / time if time > 0 else 0.0

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """For each rank, the largest number of micro-batches of virtual stages alive at the same time.

        A micro-batch is alive from the start of its forward to the end of its weight gradient, or of its forward in a
        schedule without backwards. The unit is one micro-batch of one virtual stage.
        """
        last = {Kind.BW, Kind.W} if self.schedule.trains else {Kind.F}
        return tuple(_peak([action.kind for action in row], last) for row in self.schedule.ranks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the numbers above, and every action as [text, start, end]."""
        return {
            "makespan": self.makespan,
            "bubble_makespan": self.bubble_makespan,
            "bubble_span": self.bubble_span,
            "busy": list(self.busy),
            "peak_activations": list(self.peak_activations),
            "ranks": [
                [[str(action), start, end] for action, start, end in zip(*row, strict=True)]
                for row in zip(self.schedule.ranks, self.starts, self.ends, strict=True)
            ],
        }


def _peak(kinds: list[Kind], last: set[Kind]) -> int:
    alive = peak = 0
    for kind in kinds:
        if kind is Kind.F:
            alive += 1
            peak = max(peak, alive)
        if kind in last:
            alive -= 1
    return peak
