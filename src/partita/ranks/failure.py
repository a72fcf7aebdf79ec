"""The record of a failure, the same on every hop from the rank that failed to the person who reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Failure:
    """What went wrong.

    Attributes:
        code: What the process exits with.
        message: One message for the user.
        echo: Whether it only tells that another rank is gone.
    """

    code: int
    message: str
    echo: bool = False

    DIFFERS: ClassVar[int] = 1
    FAILED: ClassVar[int] = 1
    MISUSED: ClassVar[int] = 2
    INTERRUPTED: ClassVar[int] = 130
    CLOSED: ClassVar[int] = 141
    """As a program ends that SIGPIPE ends."""
