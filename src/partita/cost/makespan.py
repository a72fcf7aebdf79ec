"""The time of a pipeline's step in closed form, where all of its stages take equally long it is the simulator's.

Letters: p ranks, v virtual stages of a rank, m micro-batches, f, b, w the seconds of a virtual stage, c of a transfer.

    gpipe               (m + p - 1) (f + b + w) + 2 (p - 1) c
    1f1b                (m + p - 1) (f + b + w), and 2 c (p - 1) / p more for each micro-batch of the steady state
    interleaved-1f1b    (m v + p - 1) (f + b + w)      (2104.04473, section 2.2)
    zb-h1, zb-h2, zb-v  a simulation of the first micro-batches, whose last ones give the time of all others
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

from partita.core.layout.placement import home_of
from partita.schedule import Kind, orders, placement_of

MAX_SIMULATED = 400_000
"""Actions at most that `exact` simulates."""


def makespan(
    kind: str, pp: int, microbatches: int, vpp: int, f: Sequence[float], b: Sequence[float], w: Sequence[float],
    comm: float = 0.0,
) -> float:  # fmt: skip
    """Seconds of a step.

    Args:
        kind: The schedule.
        pp: Pipeline ranks.
        microbatches: Micro-batches.
        vpp: Virtual stages of a rank.
        f: Seconds of a forward of each stage, in the order of the pipeline.
        b: Of an input gradient.
        w: Of a weight gradient.
        comm: Of a transfer between ranks.
    """
    m, p = microbatches, pp
    totals = [one + two + three for one, two, three in zip(f, b, w, strict=True)]
    if p == 1:
        return m * sum(totals)
    hops = 2 * (p * vpp - 1) * comm
    ranks = _by_rank(kind, p, totals)
    if kind in ("gpipe", "forward-only"):
        forward, backward = _by_rank(kind, p, f), _by_rank(kind, p, [x + y for x, y in zip(b, w, strict=True)])
        return sum(totals) + (m - 1) * (max(forward) + max(backward)) + hops
    if kind == "1f1b" or (kind == "interleaved-1f1b" and vpp == 1):
        period = max(ranks)
        # A rank and those behind it have as many micro-batches under way as they are ranks.
        for left, rest in enumerate(accumulate(reversed(ranks)), start=1):
            period = max(period, (rest + 2 * (left - 1) * comm) / left)
        return sum(totals) + (m - 1) * period + hops
    if kind == "interleaved-1f1b":
        largest = max(ranks)
        return m * largest + (p - 1) * largest / vpp + 2 * (p - 1) * comm
    return _simulated(kind, p, m, vpp, tuple(f), tuple(b), tuple(w), comm)


def exact(
    kind: str, pp: int, microbatches: int, vpp: int, f: Sequence[float], b: Sequence[float], w: Sequence[float],
    comm: float = 0.0,
) -> float:  # fmt: skip
    """`makespan` from the simulator, unless the schedule is so long that its period is taken from a part of it."""
    if pp == 1:
        return makespan(kind, pp, microbatches, vpp, f, b, w, comm)
    if 3 * pp * vpp * microbatches > MAX_SIMULATED:
        return _simulated(kind, pp, microbatches, vpp, tuple(f), tuple(b), tuple(w), comm)
    return _run(kind, pp, microbatches, vpp, f, b, w, comm)


@lru_cache(maxsize=4096)
def _simulated(
    kind: str, p: int, m: int, v: int, f: tuple[float, ...], b: tuple[float, ...], w: tuple[float, ...], comm: float
) -> float:
    """A simulation of some micro-batches, continued at the pace of its last p."""
    warm = 4 * p
    if m <= warm + p:
        return _run(kind, p, m, v, f, b, w, comm)
    few, more = _run(kind, p, warm, v, f, b, w, comm), _run(kind, p, warm + p, v, f, b, w, comm)
    return more + (m - warm - p) * (more - few) / p


def _run(
    kind: str, p: int, m: int, v: int, f: Sequence[float], b: Sequence[float], w: Sequence[float], comm: float
) -> float:
    """The makespan of `simulate`: every action starts when its rank is free and its input has arrived."""
    actions, slots = _in_order(kind, p, m, v)
    seconds = [*f, *b, *w, *(x + y for x, y in zip(b, w, strict=True))]
    free, arrivals = [0.0] * p, [0.0] * slots
    for rank, duration, takes, gives, hops in actions:
        start = free[rank]
        if arrivals[takes] > start:
            start = arrivals[takes]
        free[rank] = end = start + seconds[duration]
        arrivals[gives] = end + comm if hops else end
    return max(free)


_Step = tuple[int, int, int, int, bool]

_NONE, _NOBODY = 0, 1
"""The slots of an input that an action does not need, and of an output that nobody takes."""


@lru_cache(maxsize=32)
def _in_order(kind: str, p: int, m: int, v: int) -> tuple[list[_Step], int]:
    """All actions in an order in which they can run, which no duration changes, and the number of slots for what is passed.

    An action is its rank, the index of its duration among those of f, b, w and b + w by stage, the slots of its input and of
    its output, and whether the output goes to another rank. A slot is for the input of a stage's forward or backward.
    """
    stages = p * v
    homes = [home_of(placement_of(kind), p, stage)[0] for stage in range(stages)]
    rows = [_steps(row, rank, homes) for rank, row in enumerate(orders(kind, p, m, v if v > 1 else None))]
    found: list[_Step] = []
    arrived, waiting = {_NONE}, dict[int, int]()
    held: list[_Step | None] = [next(row, None) for row in rows]
    todo = list(range(p - 1, -1, -1))
    while todo:
        rank = todo.pop()
        row, step = rows[rank], held[rank]
        while step is not None and step[2] in arrived:
            found.append(step)
            arrived.add(step[3])
            if step[3] in waiting:
                todo.append(waiting.pop(step[3]))
            step = next(row, None)
        held[rank] = step
        if step is not None:
            waiting[step[2]] = rank
    assert not any(held), "every schedule that `build` makes can run"
    return found, 2 + 2 * stages * m


def _steps(row: Sequence[tuple[int, Kind]], rank: int, homes: Sequence[int]) -> Iterator[_Step]:
    """The actions of a rank; micro-batches pass each stage in their order."""
    stages, counts = len(homes), Counter[tuple[int, Kind]]()
    for place in row:
        stage, action = place
        first = 2 + 2 * stages * counts[place]
        counts[place] += 1
        takes, gives, to = _NONE, _NOBODY, rank
        if action is Kind.F:
            takes = first + 2 * stage if stage else _NONE
            gives, to = (first + 2 * (stage + 1), homes[stage + 1]) if stage + 1 < stages else (_NOBODY, rank)
        elif action is not Kind.W:
            takes = first + 2 * stage + 1 if stage + 1 < stages else _NONE
            gives, to = (first + 2 * stage - 1, homes[stage - 1]) if stage else (_NOBODY, rank)
        yield rank, _DURATIONS[action] * stages + stage, takes, gives, to != rank


_DURATIONS = {Kind.F: 0, Kind.B: 1, Kind.W: 2, Kind.BW: 3}


def _by_rank(kind: str, p: int, values: Sequence[float]) -> list[float]:
    found = [0.0] * p
    for stage, value in enumerate(values):
        found[home_of(placement_of(kind), p, stage)[0]] += value
    return found
