"""A headless Chromium, driven over its debugging pipe, which needs no further package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FIND = """(role, name) => {
  const named = (one) => (one.getAttribute("aria-label") ?? one.labels?.[0]?.firstChild.textContent ?? one.textContent).trim();
  return [...document.querySelectorAll("input, textarea, button, [role]")].find((one) => named(one) === name) ?? null;
}"""
"""Finds a control by the name that a screen reader says."""


class Page:
    """A page of the browser."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._count, self._data = read, write, 0, b""
        self._session: str | None = None
        self.requested: list[str] = []
        self.errors: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **params: Any) -> Any:
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        data = json.dumps({"id": self._count, "method": method, "params": params, **session}).encode()
        os.write(self._write, data + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._data:
            assert select.select([self._read], [], [], 60)[0], "the browser does not answer"
            self._data += os.read(self._read, 1 << 20)
        text, _, self._data = self._data.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"]["text"])
        elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.errors.append(message["params"]["entry"]["text"])
        return message

    def open(self, url: str, width: int = 1100, height: int = 720, *, is_dark: bool = False) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, code: str) -> Any:
        """The value of an expression, in JSON."""
        found = self._call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, code: str, limit_s: float = 30.0) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + limit_s
        while not self.run(code):
            assert time.monotonic() < deadline, f"never true: {code}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def control(self, name: str) -> str:
        """The expression of the control with a name."""
        code = f"({FIND})(null, {json.dumps(name)})"
        assert self.run(f"{code} !== null"), f"nothing is named {name!r}"
        return code

    def fill(self, name: str, text: str) -> None:
        self.run(f"{self.control(name)}.focus(); {self.control(name)}.select()")
        self._call("Input.insertText", text=text)

    def click(self, name: str) -> None:
        """Click where the control is on the screen."""
        box = self.run(f"(({self.control(name)}).getBoundingClientRect()).toJSON()")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, **place)

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A new browser with an empty page."""
    assert PROGRAM is not None
    (to_read, write), (read, to_write) = os.pipe(), os.pipe()

    def at_3_and_4() -> None:
        first, second = os.dup(to_read), os.dup(to_write)
        os.dup2(first, 3)
        os.dup2(second, 4)

    with tempfile.TemporaryDirectory(prefix="partita-browser-", ignore_cleanup_errors=True) as folder:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        process = subprocess.Popen(
            [PROGRAM, *options, "--remote-debugging-pipe", f"--user-data-dir={folder}"], close_fds=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=at_3_and_4, start_new_session=True,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        try:
            yield Page(read, write)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
            os.close(read)
            os.close(write)
