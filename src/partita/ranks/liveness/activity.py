"""Activity: what this rank is doing, so that other ranks can report where it was lost."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

STARTING = "starting"


@dataclass
class Activity:
    """The current activity of a rank.

    Attributes:
        stage: Pipeline rank.
        task: The current task, as it follows "while".
        aside: The task in the background.
        call: The current call that waits for other ranks, if any.
        since_s: The time at which this call began, None outside such calls.
    """

    stage: int = 0
    task: str = STARTING
    aside: str = ""
    call: str = ""
    since_s: float | None = None

    def begin(self, call: str) -> None:
        """Begin a call that waits for other ranks. Every collective of a layer runs this, so it must be fast."""
        self.call, self.since_s = call, time.monotonic()

    def end(self) -> None:
        """End the call."""
        self.since_s = None

    @contextmanager
    def over(self, call: str) -> Iterator[None]:
        """Context of a call that waits for other ranks."""
        self.begin(call)
        try:
            yield
        finally:
            self.end()

    def __str__(self) -> str:
        call = f", in {self.call}" if self.since_s is not None else ""
        aside = f" and {self.aside}" if self.aside else ""
        return f"{self.task}{call}{aside}"


ME = Activity()
"""This process."""


@contextmanager
def doing(task: str) -> Iterator[None]:
    """Set the task of this rank within the context, such as "loading the model"."""
    before, ME.task = ME.task, task
    try:
        yield
    finally:
        ME.task = before


def waits_in(call: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Decorate a function that waits for other ranks in `call`, such as "an all-reduce"."""

    def watched(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            ME.begin(call)
            try:
                return function(*args, **kwargs)
            finally:
                ME.end()

        return wrapper

    return watched
