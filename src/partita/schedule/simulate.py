"""`simulate`: the start and end of each action, from the costs of all actions.

A rank runs its actions in order, each as soon as its inputs have arrived. A transfer takes time, but occupies neither rank, as
in networks that copy without the processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from partita.errors import ScheduleError
from partita.schedule.action import COMPUTE, Action, Kind, Schedule
from partita.schedule.timeline import Timeline

F, B, W, BW = Kind.F, Kind.B, Kind.W, Kind.BW


@dataclass(frozen=True)
class Costs:
    """The costs of actions, for simulating, lowering and drawing, in any unit of time.

    Attributes:
        f: Time of a forward: one number, or one per stage. 0 is an empty stage.
        b: Time of an input gradient.
        w: Time of a weight gradient. Both gradients at once (BW) cost b + w.
        comm: Latency of a transfer between ranks.

    Raises:
        ScheduleError: A cost is negative, or not a number.
    """

    f: float | tuple[float, ...] = 1.0
    b: float | tuple[float, ...] = 1.0
    w: float | tuple[float, ...] = 1.0
    comm: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) and field.name != "comm" else (value,):
                if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
                    raise ScheduleError(
                        f"costs.{field.name} must be a finite number of at least 0"
                        f"{'' if field.name == 'comm' else ', or a tuple of such numbers, one per stage'}, but is {value!r}."
                    )

    def duration(self, action: Action) -> float:
        """The duration of an action; 0 for sends and receives, whose `comm` passes between the ranks.

        Raises:
            ScheduleError: There is no cost for its stage.
        """
        stage, kind, _ = action
        if kind is F:
            return self._of("f", stage)
        if kind is B:
            return self._of("b", stage)
        if kind is W:
            return self._of("w", stage)
        if kind is BW:
            return self._of("b", stage) + self._of("w", stage)
        return 0.0

    def check_stages(self, num_stages: int) -> None:
        """Raise an error for costs by stage that are not for `num_stages` stages.

        Raises:
            ScheduleError: There are more or fewer.
        """
        for name in ("f", "b", "w"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != num_stages:
                raise ScheduleError(
                    f"costs.{name} has {len(value)} values, but the schedule has {num_stages} stages: "
                    "give one per stage (virtual stages count), or one for all."
                )

    def _of(self, name: str, stage: int) -> float:
        value: float | tuple[float, ...] = getattr(self, name)
        if not isinstance(value, tuple):
            return value
        if stage >= len(value):
            raise ScheduleError(f"costs.{name} has {len(value)} values, but there is a stage {stage}.")
        return value[stage]


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """The start and end of each action.

    Sends and receives take no time of their rank: a send starts and ends at its turn, a receive when it is posted. So a
    schedule computes at the same times before and after `lower`.

    Raises:
        ScheduleError: The schedule cannot complete (`check` shows why), or `costs` are for other stages.

    Examples:
        >>> from partita.schedule import build
        >>> timeline = simulate(build("1f1b", pp=4, microbatches=8), Costs(f=1, b=1, w=1))
        >>> timeline.makespan, f"{timeline.bubble_makespan:.1%}", timeline.peak_activations
        (33.0, '27.3%', (4, 3, 2, 1))
    """
    walked = walk_to_end(schedule, costs)
    return Timeline(schedule, tuple(map(tuple, walked.starts)), tuple(map(tuple, walked.ends)))


@dataclass(frozen=True)
class Walk:
    """The simulated part of a schedule, as far as it can run.

    Attributes:
        starts: The start of each action, one list per rank.
        ends: The end of each action.
        order: The ranks, in an order in which all actions could run one after the other.
        stuck: Ranks with actions left whose inputs never arrive.
    """

    starts: list[list[float]]
    ends: list[list[float]]
    order: list[int]
    stuck: list[int]


def walk(schedule: Schedule, duration: Callable[[Action], float], comm: float) -> Walk:
    """Run every rank until it must wait, and continue it when the value has arrived; each action is visited once.

    A value is what a stage takes from another: its input, or the gradient of its output. It arrives when its producer
    ends, a transfer later on another rank, and in a lowered schedule a transfer after it is sent.
    """
    lowered, rank_of, stages = schedule.is_lowered, schedule.rank_of, schedule.num_stages
    there: dict[int, float] = {}  # value -> its arrival; a value is (micro-batch * stages + stage) * 2 + is gradient
    waiting: dict[int, int] = {}  # value -> the rank that waits for it
    walked = Walk([[] for _ in schedule.ranks], [[] for _ in schedule.ranks], [], [])
    todo = list(range(schedule.num_ranks - 1, -1, -1))
    while todo:
        rank = todo.pop()
        row, starts, ends = schedule.ranks[rank], walked.starts[rank], walked.ends[rank]
        free = ends[-1] if ends else 0.0
        for index in range(len(ends), len(row)):
            action = row[index]
            stage, kind, microbatch = action
            place = (microbatch * stages + stage) * 2
            start = free
            if kind is F and stage > 0:
                takes = place
            elif (kind is BW or kind is B) and stage < stages - 1:
                takes = place + 1
            else:
                takes = -1
            if takes >= 0:
                when = there.pop(takes, None)
                if when is None:
                    waiting[takes] = rank
                    break
                start = max(free, when)
            free = start + duration(action)
            starts.append(start)
            ends.append(free)
            walked.order.append(rank)
            if kind is F or kind is Kind.SEND_F:
                to, gives = stage + 1, place + 2
            elif kind is B or kind is BW or kind is Kind.SEND_B:
                to, gives = stage - 1, place - 1
            else:
                continue
            if not 0 <= to < stages:
                continue
            hop = rank_of[to] != rank
            if hop and lowered and kind in COMPUTE:
                continue
            there[gives] = free + comm if hop else free
            if gives in waiting:
                todo.append(waiting.pop(gives))
    walked.stuck.extend(rank for rank, row in enumerate(schedule.ranks) if len(walked.ends[rank]) < len(row))
    return walked


def walk_to_end(schedule: Schedule, costs: Costs) -> Walk:
    """`walk`, for a schedule that must complete."""
    costs.check_stages(schedule.num_stages)
    walked = walk(schedule, costs.duration, costs.comm)
    if walked.stuck:
        rank = walked.stuck[0]
        action = schedule.ranks[rank][len(walked.ends[rank])]
        raise ScheduleError(
            f"the schedule cannot run: rank {rank} waits forever to run {action}. `partita.schedule.check` shows the reason."
        )
    return walked
