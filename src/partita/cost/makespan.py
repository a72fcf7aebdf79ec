"""The time of a pipeline's step in closed form, where all of its stages take equally long it is the simulator's.

Letters: p ranks, v virtual stages of a rank, m micro-batches, f, b, w the seconds of a virtual stage, c of a transfer.

    gpipe               (m + p - 1) (f + b + w) + 2 (p - 1) c
    1f1b                (m + p - 1) (f + b + w), and 2 c (p - 1) / p more for each micro-batch of the steady state
    interleaved-1f1b    (m v + p - 1) (f + b + w)      (2104.04473, section 2.2)
    zb-h1, zb-h2, zb-v  a simulation of the first micro-batches, whose last ones give the time of all others
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from partita.core.layout.placement import home_of
from partita.schedule import Costs, Schedule, build, placement_of, simulate

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
    return simulate(_schedule(kind, p, m, v), Costs(tuple(f), tuple(b), tuple(w), comm)).makespan


@lru_cache(maxsize=16)
def _schedule(kind: str, p: int, m: int, v: int) -> Schedule:
    return build(kind, p, m, v if v > 1 else None)


def _by_rank(kind: str, p: int, values: Sequence[float]) -> list[float]:
    found = [0.0] * p
    for stage, value in enumerate(values):
        found[home_of(placement_of(kind), p, stage)[0]] += value
    return found
