"""`lower` adds the sends and receives between stages on different ranks."""

from __future__ import annotations

from operator import itemgetter

from partita.schedule.action import Action, Kind, Schedule
from partita.schedule.simulate import Costs, walk_to_end

_SENDS = {Kind.F: (Kind.SEND_F, 1), Kind.B: (Kind.SEND_B, -1), Kind.BW: (Kind.SEND_B, -1)}


def lower(schedule: Schedule, costs: Costs | None = None) -> Schedule:
    """The schedule with its sends and receives; a schedule that already has them is returned unchanged.

    All computations of all ranks are sorted by their end, and every transfer follows the computation whose result it
    sends. Each rank's list is its part of that order: the send on the sender, the receive on the receiver. Therefore

    - two ranks run all their transfers, in both directions, in the same order, so they need no tags;
    - sends and receives that wait for each other cannot deadlock, since the first unfinished action of the order can run;
    - a receive precedes the computations of its rank during the transfer, so that it is posted in time.

    Args:
        schedule: Forwards and backwards.
        costs: The costs that determine the order of the ends; equal by default. Any costs give a valid schedule.

    Raises:
        ScheduleError: The schedule cannot run, or `costs` are for other stages.

    Examples:
        >>> from partita.schedule import build
        >>> print(lower(build("gpipe", pp=2, microbatches=1)))
        0F0,0SEND_F0,0RECV_B0,0BW0
        1RECV_F0,1F0,1BW0,1SEND_B0
        <BLANKLINE>
    """
    if schedule.is_lowered:
        return schedule
    rank_of, last = schedule.rank_of, schedule.num_stages - 1
    rows: list[list[Action]] = [[] for _ in schedule.ranks]
    for rank, action in _by_end(schedule, costs if costs is not None else Costs()):
        rows[rank].append(action)
        kind, step = _SENDS.get(action.kind, (None, 0))
        to = action.stage + step
        if kind is not None and 0 <= to <= last and rank_of[to] != rank:
            send = Action(action.stage, kind, action.microbatch)
            rows[rank].append(send)
            rows[rank_of[to]].append(send.partner)
    return Schedule(tuple(map(tuple, rows)))


def _by_end(schedule: Schedule, costs: Costs) -> list[tuple[int, Action]]:
    """Every (rank, action), sorted by its end. At equal ends, an action that another needs comes first."""
    walked = walk_to_end(schedule, costs)
    left = [zip(ends, row, strict=True) for ends, row in zip(walked.ends, schedule.ranks, strict=True)]
    done = [(rank, *next(left[rank])) for rank in walked.order]
    return [(rank, action) for rank, _, action in sorted(done, key=itemgetter(1))]
