"""Chat servers as processes of their own, and clients that stream answers from them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from bench.ranks import ROOT

if TYPE_CHECKING:
    import openai

START_LIMIT_S = 180.0
"""How long a server may take until its `/health` answers."""

ANSWER_LIMIT_S = 300.0
"""How long an answer may take."""


class ServerError(Exception):
    """A server that did not start or did not answer, with the end of what it printed."""


@dataclass(frozen=True)
class Program:
    """How a server is started.

    Attributes:
        name: Its name in tables.
        command: Its command; `{port}` stands for its port.
        model: The `model` of requests.
        needs: Packages without which it is left out.
        pauses: Whether its processes are stopped while others work. Ours are not, because they would miss a rank.
    """

    name: str
    command: Sequence[str]
    model: str
    needs: Sequence[str] = ()
    pauses: bool = True

    @property
    def missing(self) -> str:
        """The first package that is not installed; empty if none is missing."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), "")


@dataclass(frozen=True)
class Ask:
    """A request for a chat completion of at most `tokens` tokens."""

    message: str
    tokens: int


@dataclass
class Answer:
    """What a client received.

    Attributes:
        first_s: Seconds from the request to its first text.
        tokens: New tokens, as the server counts them, or the chunks with text if it does not.
        text: The text.
    """

    first_s: float = 0.0
    tokens: int = 0
    text: str = ""


@dataclass
class Turn:
    """What the clients of a turn received.

    Attributes:
        seconds: From the first request to the last token.
        answers: All answers.
    """

    seconds: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """All new tokens."""
        return sum(answer.tokens for answer in self.answers)


class Server:
    """A server that runs. A context manager that ends it and all its processes."""

    def __init__(self, program: Program, folder: Path) -> None:
        """Start `program`, whose output goes to a file in `folder`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.program = program
        self._log = folder / f"{''.join(c if c.isalnum() else '-' for c in program.name)}.log"
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        command = [part.replace("{port}", str(self.port)) for part in program.command]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=ROOT, start_new_session=True
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resume()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def wait(self) -> None:
        """Return when it answers."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"it ended with exit code {self._process.returncode}: {self.last_line}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            time.sleep(0.2)
        raise ServerError(f"it did not answer within {START_LIMIT_S:.0f} s: {self.last_line}")

    @property
    def last_line(self) -> str:
        """The end of its output."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it printed nothing"

    def pause(self) -> None:
        """Stop its processes, which would take the cores of others if they poll."""
        if self.program.pauses:
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let its processes run again."""
        if self.program.pauses:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def turn(self, clients: Sequence[Sequence[Ask]]) -> Turn:
        """Let as many clients as `clients` has ask at once, each one question after the other."""
        try:
            return asyncio.run(self._turn(clients))
        except Exception as error:
            raise ServerError(f"{type(error).__name__}: {error}; {self.last_line}") from error

    async def _turn(self, clients: Sequence[Sequence[Ask]]) -> Turn:
        import openai

        client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=ANSWER_LIMIT_S
        )

        async def one(asks: Sequence[Ask]) -> list[Answer]:
            return [await self._answer(client, ask) for ask in asks]

        async with client:
            start = time.perf_counter()
            answers = await asyncio.gather(*(one(asks) for asks in clients))
            return Turn(time.perf_counter() - start, [answer for several in answers for answer in several])

    async def _answer(self, client: openai.AsyncOpenAI, ask: Ask) -> Answer:
        answer, chunks, start = Answer(), 0, time.perf_counter()
        stream = await client.chat.completions.create(
            model=self.program.model,
            messages=[{"role": "user", "content": ask.message}],
            max_tokens=ask.tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                answer.tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.delta.content:
                    answer.first_s = answer.first_s or time.perf_counter() - start
                    answer.text += choice.delta.content
                    chunks += 1
        answer.tokens = answer.tokens or chunks
        if not answer.first_s:
            raise ServerError("an answer has no text")
        return answer


def python(*arguments: str) -> list[str]:
    """A command of this environment's Python."""
    return [sys.executable, *arguments]


LLAMA_CPP = """
import os, sys, threading
import xllamacpp
path, port = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = path, ["127.0.0.1"], int(port)
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
params.n_parallel, params.n_ctx = 16, 16 * 512
server = xllamacpp.Server(params)
threading.Event().wait()
"""
"""llama.cpp's own HTTP server, which the wheel contains."""
