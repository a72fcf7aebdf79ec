"""The latest responses, in memory: they can be read again and continued."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from partita.serving.http.errors import ApiError
from partita.serving.http.openai.bodies import Message

KEPT_BYTES = 64 << 20
"""The largest size of all kept responses with their conversations, as text."""


@dataclass(frozen=True)
class Stored:
    """A response.

    Attributes:
        data: The response as it was sent.
        messages: The conversation up to its end, without instructions.
    """

    data: dict[str, Any]
    messages: list[Message]

    @property
    def size_bytes(self) -> int:
        """The size of the texts."""
        return len(str(self.data)) + sum(len(str(message)) for message in self.messages)


class ResponseStore:
    """The latest responses by id; the oldest are forgotten when all together are too large."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        """Keep responses of `kept_bytes` bytes in all."""
        self._kept_bytes, self._bytes = kept_bytes, 0
        self._stored: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, stored: Stored) -> None:
        """Keep a response."""
        size = stored.size_bytes
        with self._lock:
            self._stored[stored.data["id"]] = stored, size
            self._bytes += size
            while self._bytes > self._kept_bytes:
                self._bytes -= self._stored.popitem(last=False)[1][1]

    def find(self, name: str) -> Stored | None:
        """The response with an id, or None."""
        with self._lock:
            return self._stored[name][0] if name in self._stored else None

    def remove(self, name: str) -> None:
        """Forget a response.

        Raises:
            ApiError: None has this id.
        """
        with self._lock:
            if name not in self._stored:
                raise unknown(404, name)
            self._bytes -= self._stored.pop(name)[1]


def unknown(status: int, name: str, param: str | None = None) -> ApiError:
    """The error for an id that no kept response has."""
    text = (
        f"no response {name!r:.100} is kept. This server keeps its latest ones in memory, except those with "
        "`store` false. Send the whole conversation as input."
    )
    return ApiError(status, text, param=param, code="previous_response_not_found" if param else "not_found")
