"""Activity: what this rank is doing, for those who will have to say where it was lost."""

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
    """What a rank does.

    Attributes:
        stage: Its place in the pipeline.
        task: What it works at, as it follows "while".
        aside: What it does in the background.
        call: What it calls that waits for other ranks; nothing while it does not.
        since_s: Since when, None while it does not.
    """

    stage: int = 0
    task: str = STARTING
    aside: str = ""
    call: str = ""
    since_s: float | None = None

    def begin(self, call: str) -> None:
        """Something begins that waits for other ranks; the layers' sums call this, so it is short."""
        self.call, self.since_s = call, time.monotonic()

    def end(self) -> None:
        """It has ended."""
        self.since_s = None

    @contextmanager
    def over(self, call: str) -> Iterator[None]:
        """What happens inside waits for other ranks."""
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
    """This rank is `task` inside, say "loading the model"."""
    before, ME.task = ME.task, task
    try:
        yield
    finally:
        ME.task = before


def waits_in(call: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """A function that waits for other ranks, in `call`: "an all-reduce"."""

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
