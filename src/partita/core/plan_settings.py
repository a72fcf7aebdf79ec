"""What a plan says besides the split: how a step is computed, for the engines and commands that can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from partita.core.model.spec import DTYPE_BYTES
from partita.errors import PlanError

RECOMPUTE = ("none", "selective", "full")
_COUNTS = ("microbatches", "batch_size", "sequence_length")
_SWITCHES = ("sequence_parallel", "overlap_gradients")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The settings with which a plan was made; None for what it leaves open.

    Attributes:
        schedule: The pipeline schedule.
        microbatches: Micro-batches of a replica's share of a step.
        zero: The stage of ZeRO: 0 to 3.
        recompute: `none`, `selective` or `full`.
        sequence_parallel: Whether activations between products are split over the tokens.
        overlap_gradients: Whether gradients are summed over replicas while the backward runs.
        batch_size: Sequences of a step, over all replicas.
        sequence_length: Tokens of a sequence.
        dtype: The dtype of the weights.

    Raises:
        PlanError: A value is none of those.
    """

    schedule: str | None = None
    microbatches: int | None = None
    zero: int | None = None
    recompute: str | None = None
    sequence_parallel: bool | None = None
    overlap_gradients: bool | None = None
    batch_size: int | None = None
    sequence_length: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise PlanError(f"settings.{name} must be a whole number of at least 1, but is {value!r:.100}.")
        for name in _SWITCHES:
            if getattr(self, name) not in (None, True, False):
                raise PlanError(f"settings.{name} must be true or false, but is {getattr(self, name)!r:.100}.")
        if self.schedule is not None and not isinstance(self.schedule, str):
            raise PlanError(f"settings.schedule must be the name of a schedule, but is {self.schedule!r:.100}.")
        if self.zero is not None and (type(self.zero) is not int or not 0 <= self.zero <= 3):
            raise PlanError(f"settings.zero must be 0, 1, 2 or 3, but is {self.zero!r:.100}.")
        for name, known in (("recompute", RECOMPUTE), ("dtype", tuple(DTYPE_BYTES))):
            if getattr(self, name) not in (None, *known):
                raise PlanError(
                    f"settings.{name} must be one of {', '.join(known)}, but is {getattr(self, name)!r:.100}."
                )

    @property
    def given(self) -> dict[str, Any]:
        """The settings that the plan does not leave open, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_data(cls, data: Any) -> PlanSettings:
        """The inverse of `given`; settings that this version does not know are an error."""
        if not isinstance(data, Mapping):
            raise PlanError(f"settings must be an object, but is {data!r:.100}.")
        names = [field.name for field in fields(cls)]
        unknown = [name for name in data if name not in names]
        if unknown:
            raise PlanError(f"settings.{unknown[0]} is unknown. A plan's settings are {', '.join(names)}.")
        return cls(**data)
