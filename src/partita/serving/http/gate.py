"""What every request passes: the key, the size of its body, and the count of its answer."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from partita.serving.http.errors import ApiError
from partita.serving.http.service import Service

OPEN = ("/", "/health")
"""The paths that need no key: the page has a field for it, and a health check has none."""

DISCARDED_BYTES = 256 << 20
"""The bytes of a body that is too large that are read and discarded, so that its sender reads the answer."""


class Gate:
    """Refuses requests without the key and bodies that are too large, before any route sees them."""

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str]) -> None:
        """Stand before `app`, which has routes at `paths`."""
        self.app, self.service, self.paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = self._label(scope["path"])

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check_key(scope)
            receive = await self._with_body(scope, receive)
        except ApiError as error:
            response = error.response()
            if error.status == 413:
                response.headers["connection"] = "close"
            await response(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

    def _label(self, path: str) -> str:
        """The route of a path, by which its answers are counted."""
        if path in self.paths:
            return path
        return next((one for one in self.paths if "{" in one and path.startswith(one.partition("{")[0])), "other")

    def _check_key(self, scope: Scope) -> None:
        key = self.service.api_key
        if not key or scope["path"] in OPEN:
            return
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
            text = "the API key is wrong or missing. Send it as `Authorization: Bearer KEY`."
            raise ApiError(401, text, code="invalid_api_key")

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that returns the body in one message, and then what `receive` returns."""
        limit, data, length = self.service.max_body_bytes, bytearray(), 0
        is_last = scope["method"] in ("GET", "HEAD")
        while not is_last:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            part = message.get("body", b"")
            length += len(part)
            if length <= limit:
                data += part
            is_last = not message.get("more_body", False) or length > DISCARDED_BYTES
        if length > limit:
            raise ApiError(
                413, f"the body has more than {limit} bytes, the most that this server reads.", code="too_large"
            )
        first: list[Message] = [{"type": "http.request", "body": bytes(data), "more_body": False}]

        async def received() -> Message:
            return first.pop() if first else await receive()

        return received
