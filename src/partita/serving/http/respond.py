"""Send answers: as one JSON body or as server-sent events, until they end or the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from partita.serving.http.answers import Answers
from partita.serving.http.errors import as_api_error

Events = AsyncIterator[dict[str, Any]]
"""The data of each server-sent event; one with a `type` is named by it."""

CLOSED = 499
"""The status that is logged for a client that has disconnected, as in nginx."""

_log = logging.getLogger("partita.serving")


async def respond(
    request: Request,
    answers: Answers,
    whole: Callable[[], Awaitable[dict[str, Any]]],
    events: Events | None,
    *,
    done: bool = True,
) -> Response:
    """Answer a request.

    Args:
        request: The HTTP request, whose body has been read.
        answers: The requests of the step loop, which are submitted here.
        whole: Makes the body of an answer that is not streamed.
        events: The events of an answer that is streamed, else None.
        done: Whether a stream ends with `[DONE]`.

    Raises:
        ApiError: The requests can never be answered, or failed.
    """
    await anyio.to_thread.run_sync(answers.submit, asyncio.get_running_loop())
    if events is not None:
        return _EventStream(answers, events, done=done)
    with answers:
        body = await _unless_disconnected(request.receive, whole())
    return Response(status_code=CLOSED) if body is None else JSONResponse(body)


async def _unless_disconnected(receive: Receive, work: Awaitable[dict[str, Any]]) -> dict[str, Any] | None:
    """The result of `work`, or None if the client disconnects before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _end(working, leaving)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _EventStream(Response):
    """Server-sent events. The status is sent with the first event, so that an error before it has a status of its own."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, events: Events, *, done: bool) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._answers, self._events, self._done = answers, events, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answers:
            sending, leaving = (
                asyncio.ensure_future(self._send(scope, receive, send)),
                asyncio.ensure_future(_disconnected(receive)),
            )
            try:
                await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
            finally:
                await _end(sending, leaving)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False

        async def event(text: str) -> None:
            nonlocal is_started
            if not is_started:
                is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        try:
            async for data in self._events:
                await event(as_event(data, data.get("type")))
        except OSError:  # the client has gone
            return
        except Exception as error:
            failed = as_api_error(error)
            if failed is not error:
                _log.error("an answer failed", exc_info=error)
            if not is_started:
                await failed.response()(scope, receive, send)
                return
            await event(as_event(failed.body, "error"))
        if self._done:
            await event("data: [DONE]\n\n")
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_event(data: dict[str, Any], name: str | None = None) -> str:
    """A server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"
