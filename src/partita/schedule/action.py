"""Actions, and a `Schedule`: the actions of every pipeline rank, in order. Both print and parse back.

Cells read as in torch.distributed.pipelining: ``2F0`` is the forward of stage 2 for micro-batch 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from partita.errors import ScheduleError


class Kind(StrEnum):
    """The kind of an action. The value is its text in a cell."""

    F = "F"
    B = "B"
    W = "W"
    BW = "BW"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"


COMPUTE = frozenset({Kind.F, Kind.B, Kind.W, Kind.BW})
"""Forward, input gradient, weight gradient, both gradients at once."""

PARTNER = {
    Kind.SEND_F: (Kind.RECV_F, 1),
    Kind.RECV_F: (Kind.SEND_F, -1),
    Kind.SEND_B: (Kind.RECV_B, -1),
    Kind.RECV_B: (Kind.SEND_B, 1),
}
"""For each end of a transfer, the kind of the other end, and its distance in stages."""

_CELL = re.compile(r"([0-9]{1,9})(SEND_F|RECV_F|SEND_B|RECV_B|BW|F|B|W)([0-9]{1,9})")


class Action(NamedTuple):
    """One action of one rank: `str()` is ``2F0``, ``1BW3``, ``1SEND_F0``; `parse` reads it.

    ``1SEND_F0`` sends the output of stage 1 for micro-batch 0 and ``2RECV_F0`` receives it as the input of stage 2.
    ``2SEND_B0`` sends the gradient of that input and ``1RECV_B0`` receives it.
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Parse an action.

        Raises:
            ScheduleError: The text is not an action.
        """
        match = _CELL.fullmatch(text)
        if match is None:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise ScheduleError(
                f"{shown!r} is not an action: write the stage, one of {', '.join(kind.value for kind in Kind)}, "
                "and the micro-batch, as in 2F0"
            )
        return cls(int(match[1]), Kind(match[2]), int(match[3]))

    @property
    def is_compute(self) -> bool:
        """Whether it is a computation, not a send or receive."""
        return self.kind in COMPUTE

    @property
    def partner(self) -> Action:
        """The receive of a send, or the send of a receive."""
        kind, step = PARTNER[self.kind]
        return Action(self.stage + step, kind, self.microbatch)


def parse_row(text: str) -> tuple[Action, ...]:
    """The actions of one rank: cells separated by commas; blank cells are skipped.

    Raises:
        ScheduleError: A cell is not an action; the message has its number, counted from 1.
    """
    actions = []
    for number, cell in enumerate(text.split(","), 1):
        if cell := cell.strip():
            try:
                actions.append(Action.parse(cell))
            except ScheduleError as error:
                raise ScheduleError(f"cell {number}: {error}") from None
    return tuple(actions)


def format_row(actions: Iterable[Action]) -> str:
    """The inverse of `parse_row`."""
    return ",".join(map(str, actions))


@dataclass(frozen=True)
class Schedule:
    """The actions of every pipeline rank, in order. `str()` is CSV, one row per rank.

    This class does not validate the schedule: `check` does.

    Attributes:
        ranks: The actions of each rank.
    """

    ranks: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.ranks)

    @cached_property
    def num_stages(self) -> int:
        """Stages of all ranks: the largest stage number plus one."""
        return max((action.stage for row in self.ranks for action in row), default=-1) + 1

    @cached_property
    def num_microbatches(self) -> int:
        """Micro-batches: the largest micro-batch number plus one."""
        return max((action.microbatch for row in self.ranks for action in row), default=-1) + 1

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """For each stage, the rank that runs it.

        Raises:
            ScheduleError: A stage is on no rank or on several.
        """
        homes: dict[int, int] = {}
        for rank, row in enumerate(self.ranks):
            for stage in {action.stage for action in row}:
                if homes.setdefault(stage, rank) != rank:
                    raise ScheduleError(
                        f"stage {stage} is on ranks {homes[stage]} and {rank}. All of its actions belong on one rank."
                    )
        for stage in range(self.num_stages):
            if stage not in homes:
                raise ScheduleError(
                    f"stage {stage} has no action, but stage {self.num_stages - 1} has. Stages count from 0 without gaps."
                )
        return tuple(homes[stage] for stage in range(self.num_stages))

    @cached_property
    def trains(self) -> bool:
        """Whether it has backwards."""
        backward = {Kind.B, Kind.W, Kind.BW}
        return any(action.kind in backward for row in self.ranks for action in row)

    @cached_property
    def is_lowered(self) -> bool:
        """Whether it has sends and receives."""
        return any(action.kind not in COMPUTE for row in self.ranks for action in row)

    def to_csv(self) -> str:
        """One row per rank, one cell per action."""
        return "".join(f"{format_row(row)}\n" for row in self.ranks)

    @classmethod
    def from_csv(cls, text: str) -> Schedule:
        """Parse a schedule in the form of `to_csv`; blanks around cells and blank cells are ignored.

        Raises:
            ScheduleError: A cell is not an action; the message has its row and cell, counted from 1.
        """
        ranks = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                ranks.append(parse_row(line))
            except ScheduleError as error:
                raise ScheduleError(f"row {number} (rank {number - 1}), {error}.") from None
        return cls(tuple(ranks))

    def __str__(self) -> str:
        return self.to_csv()
