"""The answers to one HTTP request: requests of the step loop, whose events arrive in the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from partita.serving.http.errors import ApiError, as_api_error
from partita.serving.http.inbox import Inbox
from partita.serving.http.metrics import Metrics
from partita.serving.requests import Event, Finished, ServeRequest, Token


@dataclass
class _Times:
    start_s: float
    last_s: float = 0.0


class Answers:
    """Iterate over `(place, event)` of several requests until all have ended. As a context it cancels those that have not.

    A reader that is slow delays nobody: events wait here, at most as many as the requests may have tokens.
    """

    def __init__(self, inbox: Inbox, metrics: Metrics, requests: Sequence[ServeRequest]) -> None:
        self._inbox, self._metrics = inbox, metrics
        self._places = {request.id: place for place, request in enumerate(requests)}
        self._requests = requests
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._running: dict[int, _Times] = {}

    def submit(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the requests to the step loop; their events arrive in the event loop `loop`.

        Raises:
            ApiError: One of them can never be answered; none is left behind.
        """

        def on_event(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        try:
            for request in self._requests:
                self._running[request.id] = _Times(time.perf_counter())
                self._inbox.submit(request, on_event)
        except Exception as error:
            del self._running[request.id]
            self.cancel()
            raise as_api_error(error) from error

    def cancel(self) -> None:
        """Cancel the requests that have not ended."""
        while self._running:
            number, _ = self._running.popitem()
            self._inbox.cancel(number)
            self._metrics.finished.labels("cancelled").inc()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self._running:
            event = await self._events.get()
            if event.id in self._running:
                self._measure(event)
                if isinstance(event, Finished):
                    del self._running[event.id]
                    self._refuse(event)
                yield self._places[event.id], event

    def _refuse(self, event: Finished) -> None:
        """Raise `ApiError` for an answer that did not end by itself."""
        if event.reason == "lost" or (event.reason == "error" and self._inbox.closed):
            raise ApiError(503, event.error, code="unavailable")
        if event.reason == "error":
            raise ApiError(500, event.error)
        if event.reason == "cancelled":
            raise ApiError(503, "the request was cancelled, because the server is shutting down.", code="unavailable")

    def _measure(self, event: Event) -> None:
        times, now_s, metrics = self._running[event.id], time.perf_counter(), self._metrics
        if isinstance(event, Token):
            if times.last_s:
                metrics.per_token.observe(now_s - times.last_s)
            else:
                metrics.first_token.observe(now_s - times.start_s)
            times.last_s = now_s
        else:
            metrics.duration.observe(now_s - times.start_s)
            metrics.finished.labels(event.reason).inc()
            metrics.prompt_tokens.inc(event.prompt_tokens)
            metrics.cached_tokens.inc(event.cached_tokens)
            metrics.completion_tokens.inc(event.completion_tokens)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cancel()
