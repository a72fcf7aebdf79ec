"""What is recorded of a run besides its checkpoints: reporters, a profile, and the share of the peak that it uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from partita.errors import PlanError
from partita.training.reporting.reporter import Reporter


@dataclass(frozen=True)
class Profile:
    """A trace of some steps for every rank, in Chrome's format, for ui.perfetto.dev.

    Attributes:
        first: The first step, counted from 1.
        last: The last step.
        folder: The folder for `rank-0.json`, `rank-1.json`, ...
    """

    first: int
    last: int
    folder: str | os.PathLike[str]

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise PlanError(
                f"a profile needs steps FIRST:LAST with 1 <= FIRST <= LAST, but has {self.first}:{self.last}."
            )

    def check(self, done: int, steps: int) -> None:
        """Raise `PlanError` unless a run that has completed `done` of `steps` steps will run these."""
        if self.first <= done or self.last > steps:
            raise PlanError(
                f"a profile of steps {self.first}:{self.last} is not possible: this run has steps {done + 1} to {steps}."
            )

    def file(self, rank: int) -> Path:
        """The file of a rank."""
        return Path(self.folder) / f"rank-{rank}.json"


@dataclass(frozen=True)
class Follow:
    """What is recorded of a run.

    Attributes:
        reporters: Receive every step on rank 0.
        profile: The steps to trace.
        peak_flops: Operations per second of one device, for MFU; by default that of a known CUDA device.
    """

    reporters: Sequence[Reporter] = ()
    profile: Profile | None = None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        if self.peak_flops is not None and not 0 < self.peak_flops < float("inf"):
            raise PlanError(f"peak_flops must be a finite number above 0, but is {self.peak_flops!r}.")
