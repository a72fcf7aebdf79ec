"""The errors that Partita raises for what a user can mend."""

from __future__ import annotations


class PartitaError(Exception):
    """Base of every error that Partita raises on purpose. Its text says what is wrong and what to do instead."""


class LayoutError(PartitaError, ValueError):
    """A pipeline layout that cannot be read, or that does not fit its model."""


class PlanError(PartitaError, ValueError):
    """A mesh, split, rule or plan that cannot be."""


class ScheduleError(PartitaError, ValueError):
    """A pipeline schedule that cannot be built, read or run."""


class ModelError(PartitaError, ValueError):
    """A model that is not understood, or that cannot be split as asked."""


class UnknownFamilyError(ModelError):
    """A family that Partita does not know itself; transformers may."""


class CheckpointError(PartitaError, ValueError):
    """Files of a checkpoint that are missing, malformed or not the model's."""


class DependencyError(PartitaError, ImportError):
    """An installed library that lacks what Partita needs of it: a version that is not supported."""


class DistributedError(PartitaError, RuntimeError):
    """Ranks that are missing, disagree, or were asked for what their group cannot do."""


class PeerFailed(DistributedError):
    """Another rank failed and reports its own error; the rank that raises this one only repeats it.

    Attributes:
        rank: The rank of the run that failed.
        reason: The type and the text of its error.
    """

    def __init__(self, rank: int, reason: str) -> None:
        """Repeat `reason`, the error of rank `rank`."""
        super().__init__(rank, reason)
        self.rank, self.reason = rank, reason

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.reason}"
