"""The errors that Partita raises for problems that a user can fix."""

from __future__ import annotations


class PartitaError(Exception):
    """Base of every error that Partita raises on purpose. Its text says what is wrong and what to do instead."""


class LayoutError(PartitaError, ValueError):
    """A pipeline layout that cannot be read, or that does not fit its model."""


class PlanError(PartitaError, ValueError):
    """A mesh, split, rule or plan that is invalid."""


class ScheduleError(PartitaError, ValueError):
    """A pipeline schedule that cannot be built, read or run."""


class ModelError(PartitaError, ValueError):
    """A model that Partita does not support, or cannot split as requested."""


class UnknownFamilyError(ModelError):
    """A family that Partita does not know itself; transformers may know it."""


class DivergedError(ModelError):
    """A training run whose loss or gradient is not finite."""


class CheckpointError(PartitaError, ValueError):
    """Checkpoint files that are missing, malformed or of another model."""


class DependencyError(PartitaError, ImportError):
    """An installed library version that lacks something Partita needs, and is not supported."""


class DistributedError(PartitaError, RuntimeError):
    """Ranks are missing or disagree, or their group does not support the operation."""


class PeerFailed(DistributedError):
    """Another rank failed and reports its own error; the rank that raises this one only repeats it.

    Attributes:
        rank: The number of the rank that failed.
        reason: The type and the text of its error.
    """

    def __init__(self, rank: int, reason: str) -> None:
        """Repeat `reason`, the error of rank `rank`."""
        super().__init__(rank, reason)
        self.rank, self.reason = rank, reason

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.reason}"
