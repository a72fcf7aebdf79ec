"""`partita serve` as users start it: a process, its address, its ranks and its signals."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from tests.support.signals import take_signals

PARTITA = (sys.executable, "-m", "partita")
HI = [{"role": "user", "content": "Hi"}]


def processes_of(folder: Path) -> list[int]:
    """The processes with a path in their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if str(folder).encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while processes_of(folder):
        assert time.monotonic() < deadline, processes_of(folder)
        time.sleep(0.05)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    pid: int

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def _get(self, path: str) -> tuple[int, str]:
        with contextlib.closing(http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def get(self, path: str) -> str:
        """The body at a path."""
        return self._get(path)[1]

    def status(self) -> int:
        """The status of `/health`."""
        return self._get("/health")[0]

    def wait_for(self, status: int, limit_s: float = 300.0) -> None:
        """Wait until `/health` has this status."""
        deadline = time.monotonic() + limit_s
        while self.status() != status:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stream(self, **body: Any) -> Iterator[str]:
        """The texts of a streamed completion."""
        return (
            chunk.choices[0].text
            for chunk in self.client().completions.create(
                model="tiny", prompt="Hi", stream=True, extra_body={"ignore_eos": True}, **body
            )
        )

    def signal_rank(self, folder: Path, rank: int, number: int) -> None:
        """Send a signal to a rank of the model in `folder`."""
        names = {f"\0{name}={rank}\0".encode() for name in ("RANK", "OMPI_COMM_WORLD_RANK", "MLX_RANK")}
        found = [pid for pid in processes_of(folder) if any(one in _environment(pid) for one in names)]
        assert len(found) == 1
        os.kill(found[0], number)

    def end(self, number: int) -> tuple[int, str]:
        """The exit code after a signal, and what was printed on stderr."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@contextlib.contextmanager
def started(folder: Path, *options: str, program: Sequence[str] = PARTITA) -> Iterator[Server]:
    process = subprocess.Popen(
        [*program, "serve", str(folder), "--port", "0", "--json", *options], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=take_signals,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        address = json.loads(line)
        yield Server(process, address["url"], address["pid"])
    finally:
        process.kill()
        process.communicate()
    wait_until_gone(folder)


def _environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()
