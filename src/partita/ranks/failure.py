"""The record of a failure, passed unchanged from the rank that failed to the user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Failure:
    """Why a command or rank failed.

    Attributes:
        code: The exit code of the process.
        message: One message for the user.
        echo: Whether it only reports that another rank is gone.
        is_complete: Whether the message says all, so that a traceback would add nothing.
    """

    code: int
    message: str
    echo: bool = False
    is_complete: bool = False

    DIFFERS: ClassVar[int] = 1
    FAILED: ClassVar[int] = 1
    MISUSED: ClassVar[int] = 2
    INTERRUPTED: ClassVar[int] = 130
    CLOSED: ClassVar[int] = 141
    """The exit code of a program that SIGPIPE ends."""
