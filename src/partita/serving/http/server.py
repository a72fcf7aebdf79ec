"""The server as a thread beside the step loop."""

from __future__ import annotations

import errno
import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp

from partita.errors import ModelError

_POLL_S = 0.02


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which refuses connections until the server starts; port 0 chooses a free one.

    Raises:
        ModelError: The address does not exist, or its port is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        is_host = isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL
        remedy = (
            "Give an address of this machine, as in --host 127.0.0.1"
            if is_host
            else "Choose another --port, or 0 for any"
        )
        raise ModelError(f"--host {host} --port {port} cannot be used: {why}. {remedy}.") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket as a URL."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


class Server:
    """Serves an application from a thread of its own, until `close`."""

    def __init__(self, app: ASGIApp, bound: socket.socket) -> None:
        """Prepare to serve `app` on a bound socket."""
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=5,
            server_header=False, loop="asyncio", http="h11",
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._bound = bound
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def _run(self) -> None:
        self._server.run(sockets=[self._bound])

    def start(self) -> None:
        """Start, and return when connections are accepted."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(_POLL_S)

    def close(self, limit_s: float | None = None) -> None:
        """Finish the answers that are being sent, and end; return after `limit_s` seconds at the latest."""
        self._server.should_exit = True
        self._thread.join(limit_s)
