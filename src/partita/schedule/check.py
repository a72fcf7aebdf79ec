"""`check` proves from a schedule alone that it computes every micro-batch once, in an order that cannot deadlock."""

from __future__ import annotations

from typing import NamedTuple

from partita.errors import ScheduleError
from partita.schedule.action import COMPUTE, PARTNER, Action, Kind, Schedule
from partita.schedule.simulate import walk
from partita.schedule.text_grid import excerpt

F, B, W, BW = Kind.F, Kind.B, Kind.W, Kind.BW
SEND_F, RECV_F, SEND_B, RECV_B = Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B

Key = tuple[int, Kind, int]  # equal to an action, but five times as fast to create
Steps = dict[Key, int]  # the index of each action in its rank's list


def check(schedule: Schedule) -> None:
    """Raise an error unless a schedule is valid.

    In a valid schedule every stage is on one rank; every stage runs one forward of every micro-batch and, if the schedule
    trains, one backward (BW, or B and then W); no action precedes one that it needs; and no ranks wait for each other in a
    cycle. If it has sends and receives, then also: each send has its receive, on the right ranks, in order with the
    computations; two ranks run their transfers in the same order, both directions together; and the schedule completes
    even if both ends of every transfer wait for each other.

    Raises:
        ScheduleError: It is invalid. The message has the reason and an excerpt of the rank x step grid, with > < at the error.

    Examples:
        >>> from partita.schedule import build
        >>> check(build("zb-h1", pp=4, microbatches=8))
        >>> check(Schedule.from_csv("0F0,0BW0"))
        >>> check(Schedule.from_csv("0BW0,0F0"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        partita.errors.ScheduleError: rank 0, step 0: 0BW0 needs 0F0, which comes later (step 1).
        ...
    """
    steps = _find(schedule)
    _check_complete(schedule, steps)
    if not schedule.is_lowered:
        _check_order(schedule, steps)
        _check_runs(schedule, steps)
        return
    _check_sends(schedule, steps)
    transfers = _pair_up(schedule, steps)
    _check_order(schedule, steps)
    _check_pairs(schedule, transfers)
    _check_rendezvous(schedule, transfers)


def _fault(schedule: Schedule, reason: str, *marks: tuple[int, int]) -> ScheduleError:
    return ScheduleError(f"{reason}\n{excerpt(schedule, marks)}")


def _at(rank: int, step: int) -> str:
    return f"rank {rank}, step {step}"


def _find(schedule: Schedule) -> Steps:
    """The position of each action. Raises an error for duplicates, stages on two ranks, and ranks without an action."""
    steps: Steps = {}
    homes: dict[int, tuple[int, int]] = {}
    for rank, row in enumerate(schedule.ranks):
        for step, action in enumerate(row):
            if action.stage < 0 or action.microbatch < 0:
                reason = f"{_at(rank, step)}: {action}: stages and micro-batches count from 0."
                raise _fault(schedule, reason, (rank, step))
            home = homes.setdefault(action.stage, (rank, step))
            if home[0] != rank:
                reason = f"stage {action.stage} is on two ranks: {_at(*home)}, and {_at(rank, step)}."
                raise _fault(schedule, f"{reason} All of its actions belong on one.", (rank, step), home)
            first = steps.setdefault(action, step)
            if first != step:
                reason = f"{action} occurs twice: {_at(rank, first)}, and {_at(rank, step)}."
                raise _fault(schedule, reason, (rank, step), (rank, first))
        if not row:
            raise _fault(schedule, f"rank {rank} has no action. Leave it out, or give it a stage.", (rank, 0))
    if not steps:
        raise ScheduleError("the schedule has no ranks.")
    return steps


def _check_complete(schedule: Schedule, steps: Steps) -> None:
    """Check that every stage runs every action of every micro-batch once."""
    rank_of, trains = schedule.rank_of, schedule.trains
    for stage in range(schedule.num_stages):
        rank = rank_of[stage]
        end = len(schedule.ranks[rank])
        for i in range(schedule.num_microbatches):
            if (stage, F, i) not in steps:
                raise _fault(schedule, f"{Action(stage, F, i)} is missing.", (rank, end))
            if not trains:
                continue
            bw, b, w = steps.get((stage, BW, i)), steps.get((stage, B, i)), steps.get((stage, W, i))
            if bw is None and b is None and w is None:
                reason = f"stage {stage} has no backward of micro-batch {i}: neither BW, nor B and W."
                raise _fault(schedule, reason, (rank, end))
            if bw is not None and (b is not None or w is not None):
                reason = f"stage {stage} has two backwards of micro-batch {i}: BW, and B or W."
                raise _fault(schedule, reason, *((rank, step) for step in (bw, b, w) if step is not None))
            if bw is None and (b is None or w is None):
                there, missing = (W, B) if b is None else (B, W)
                reason = f"{Action(stage, missing, i)} is missing: {Action(stage, there, i)} is half a backward."
                raise _fault(schedule, reason, (rank, steps[stage, there, i]))


def _check_order(schedule: Schedule, steps: Steps) -> None:
    """Check that every action comes after those that it needs on its own rank."""
    for rank, row in enumerate(schedule.ranks):
        for step, action in enumerate(row):
            for need in _needs(schedule, steps, action, rank):
                if steps[need] > step:
                    reason = f"{_at(rank, step)}: {action} needs {Action(*need)}, which comes later"
                    raise _fault(schedule, f"{reason} (step {steps[need]}).", (rank, step), (rank, steps[need]))


def _needs(schedule: Schedule, steps: Steps, action: Action, rank: int) -> tuple[Key, ...]:
    """The actions that an action needs on its own rank: for a remote value its receive, if the schedule has them."""
    stage, kind, i = action
    if kind is F:
        if stage == 0:
            return ()
        if schedule.rank_of[stage - 1] == rank:
            return ((stage - 1, F, i),)
        return ((stage, RECV_F, i),) if schedule.is_lowered else ()
    if kind is B or kind is BW:
        if stage == schedule.num_stages - 1:
            return ((stage, F, i),)
        if schedule.rank_of[stage + 1] == rank:
            return (stage, F, i), _backward(steps, stage + 1, i)
        return ((stage, F, i), (stage, RECV_B, i)) if schedule.is_lowered else ((stage, F, i),)
    if kind is W:
        return ((stage, B, i),)
    if kind is SEND_F:
        return ((stage, F, i),)
    return (_backward(steps, stage, i),) if kind is SEND_B else ()


def _backward(steps: Steps, stage: int, microbatch: int) -> Key:
    """The action that computes the gradient of the stage's input."""
    fused = (stage, BW, microbatch)
    return fused if fused in steps else (stage, B, microbatch)


def _check_runs(schedule: Schedule, steps: Steps) -> None:
    """Check that no ranks wait for each other in a cycle."""
    walked = walk(schedule, lambda action: 0.0, 0.0)
    done = [len(ends) for ends in walked.ends]
    waits = {}
    for rank in walked.stuck:
        stage, kind, i = schedule.ranks[rank][done[rank]]
        needed = (stage - 1, F, i) if kind is F else _backward(steps, stage + 1, i)
        waits[rank] = (schedule.rank_of[needed[0]], steps[needed])
    if waits:
        raise _ring(schedule, done, waits)


def _check_sends(schedule: Schedule, steps: Steps) -> None:
    """Check that every value that another rank needs is sent."""
    rank_of, last = schedule.rank_of, schedule.num_stages - 1
    for rank, row in enumerate(schedule.ranks):
        for step, action in enumerate(row):
            stage, kind, i = action
            if kind not in COMPUTE or kind is W:
                continue
            to, send = (stage + 1, SEND_F) if kind is F else (stage - 1, SEND_B)
            if 0 <= to <= last and rank_of[to] != rank and (stage, send, i) not in steps:
                reason = f"{Action(stage, send, i)} is missing: {action} is on rank {rank}, stage {to} on rank"
                raise _fault(schedule, f"{reason} {rank_of[to]}.", (rank, step))


class _Transfer(NamedTuple):
    """One end of a transfer: its step, and the rank and step of the other end."""

    step: int
    peer: int
    peer_step: int


def _pair_up(schedule: Schedule, steps: Steps) -> list[list[_Transfer]]:
    """The transfers of each rank, in order. Raises an error for those without another end, or without a value to send."""
    rank_of, last = schedule.rank_of, schedule.num_stages - 1
    transfers: list[list[_Transfer]] = [[] for _ in schedule.ranks]
    for rank, row in enumerate(schedule.ranks):
        for step, action in enumerate(row):
            stage, kind, i = action
            if kind in COMPUTE:
                continue
            other_kind, away = PARTNER[kind]
            other = stage + away
            if not 0 <= other <= last:
                reason = f"{action} has no other end: there is no stage {other}."
            elif rank_of[other] == rank:
                reason = f"{action} sends nothing: stages {stage} and {other} are both on rank {rank}."
            elif (other_step := steps.get((other, other_kind, i))) is None:
                reason = f"{action} has no other end: {action.partner} is missing."
            elif kind in (SEND_B, RECV_B) and not schedule.trains:
                reason = f"{action} carries a gradient, but nothing computes one."
            else:
                transfers[rank].append(_Transfer(step, rank_of[other], other_step))
                continue
            raise _fault(schedule, f"{_at(rank, step)}: {reason}", (rank, step))
    return transfers


def _check_pairs(schedule: Schedule, transfers: list[list[_Transfer]]) -> None:
    """Check that two ranks run their transfers in the same order."""
    for rank, row in enumerate(transfers):
        before: dict[int, _Transfer] = {}
        for transfer in row:
            earlier = before.get(transfer.peer, transfer)
            if earlier.peer_step > transfer.peer_step:
                first, second = (schedule.ranks[rank][end.step] for end in (earlier, transfer))
                reason = (
                    f"rank {rank} runs {first} (step {earlier.step}) before {second} (step {transfer.step}), but rank "
                    f"{transfer.peer} runs {second.partner} (step {transfer.peer_step}) before {first.partner} "
                    f"(step {earlier.peer_step}). Both ranks must run their transfers in the same order."
                )
                marks = (transfer.peer, transfer.peer_step), (transfer.peer, earlier.peer_step)
                raise _fault(schedule, reason, (rank, transfer.step), *marks)
            before[transfer.peer] = transfer


def _check_rendezvous(schedule: Schedule, transfers: list[list[_Transfer]]) -> None:
    """Check that the schedule completes if a send and its receive wait for each other. Pairs are already checked."""
    met = [0] * len(transfers)
    todo = list(range(len(transfers)))
    while todo:
        rank = todo.pop()
        row = transfers[rank]
        while met[rank] < len(row):
            _, peer, step = row[met[rank]]
            if transfers[peer][met[peer]].step != step:
                break
            met[rank] += 1
            met[peer] += 1
            todo.append(peer)
    waits = {rank: row[met[rank]] for rank, row in enumerate(transfers) if met[rank] < len(row)}
    if waits:
        done = [waits[rank].step if rank in waits else len(row) for rank, row in enumerate(schedule.ranks)]
        raise _ring(schedule, done, {rank: (transfer.peer, transfer.peer_step) for rank, transfer in waits.items()})


def _ring(schedule: Schedule, done: list[int], waits: dict[int, tuple[int, int]]) -> ScheduleError:
    """The error that names a cycle of waiting ranks.

    Args:
        schedule: The schedule.
        done: The number of steps that each rank completed.
        waits: For each waiting rank, the rank and step that it waits for.
    """
    ring = [next(iter(waits))]
    while (peer := waits[ring[-1]][0]) not in ring:
        ring.append(peer)
    ring = ring[ring.index(peer) :]
    links = []
    for rank in ring[:8]:
        peer, step = waits[rank]
        own, other = schedule.ranks[rank][done[rank]], schedule.ranks[peer][step]
        links.append(f"rank {rank} with {own} (step {done[rank]}) for rank {peer}'s {other} (step {step})")
    links += ["..."] if len(ring) > 8 else []
    reason = f"ranks wait for each other: {'; '.join(links)}."
    return _fault(schedule, reason, *((rank, done[rank]) for rank in ring))
