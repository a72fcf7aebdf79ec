"""A contest: contestants that live in the same ranks are checked, then timed by turns, round after round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.ranks import LIMIT_S, Ranks, barrier, own_rank


@dataclass(frozen=True)
class Contestant:
    """What a rank runs.

    Attributes:
        step: The work that is timed.
        check: Raises unless the work's result is the unsplit reference's.
        alone: Whether rank 0 works by itself while the others wait.
    """

    step: Callable[[], object]
    check: Callable[[], None]
    alone: bool = False


@dataclass(frozen=True)
class Contest:
    """One work and how it is timed.

    Attributes:
        set_up: Called on every rank with `args`: its contestants by name.
        args: For `set_up`.
        steps: How often a contestant works in one turn.
        budget_s: Rounds are added until so many seconds are over.
        rounds: But at least so many, and at most `most_rounds`.
        clock: Seconds; `time.process_time` measures a rank's CPU time.
        warm_up: How often a contestant works before its result is checked.
        limit_s: How long setting up all contestants may take.
    """

    set_up: Callable[..., dict[str, Contestant]]
    args: tuple[Any, ...] = ()
    steps: int = 1
    budget_s: float = 40.0
    rounds: int = 5
    most_rounds: int = 200
    clock: Callable[[], float] = time.perf_counter
    warm_up: int = 3
    limit_s: float = LIMIT_S


@dataclass
class Samples:
    """Seconds a step, or bytes, by contestant: one a round."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)


OnRound = Callable[[float], None]
"""Told after each round which fraction of the work is done."""


def compete(ranks: Ranks, contest: Contest, on_round: OnRound) -> Samples:
    """Seconds a step of each contestant, the slowest rank's. Who begins changes from round to round."""
    names: list[str] = ranks.call(_set_up, contest.set_up, contest.args, contest.warm_up, limit_s=contest.limit_s)[0]
    samples = Samples()
    start = time.monotonic()
    for done in range(contest.most_rounds):
        spent = time.monotonic() - start
        if done >= contest.rounds and spent > contest.budget_s:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            times = ranks.call(_time, name, contest.steps, contest.clock)
            samples.add(name, max(t for t in times if t is not None))
        on_round(min(1.0, max((done + 1) / contest.most_rounds, (time.monotonic() - start) / contest.budget_s)))
    return samples


_contestants: dict[str, Contestant] = {}
"""This rank's."""


def _set_up(function: Callable[..., dict[str, Contestant]], args: tuple[Any, ...], warm_up: int) -> list[str]:
    _contestants.clear()
    _contestants.update(function(*args))
    for name in _contestants:
        _steps(name, warm_up)
        try:
            _contestants[name].check()
        except AssertionError as error:
            raise AssertionError(f"{name} is wrong: {error}") from error
    gc.collect()
    gc.freeze()
    return list(_contestants)


def _time(name: str, steps: int, clock: Callable[[], float]) -> float | None:
    if _contestants[name].alone and own_rank() > 0:
        return None
    if not _contestants[name].alone:
        barrier()
    start = clock()
    _steps(name, steps)
    return (clock() - start) / steps


def _steps(name: str, steps: int) -> None:
    step = _contestants[name].step
    for _ in range(steps):
        step()
