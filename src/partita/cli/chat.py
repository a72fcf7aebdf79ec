"""`partita chat`: a conversation in a terminal with a model split over ranks."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.cli.serve import ServingOptions, start
from partita.cli.terminal.console import err, write
from partita.errors import ModelError, PartitaError
from partita.ranks import environment

SAMPLING, TEXT = "Sampling", "Text"
"""Panels of options in `--help`."""

KEY = "PARTITA_CHAT_KEY"
"""The variable with the key of the server that `chat` starts."""

PROMPT, MORE = "> ", ". "
HELP = (
    "Enter sends a message. A line that ends with \\ continues on the next, as does everything between two lines of \"\"\".\n"
    "Ctrl-C ends an answer, Ctrl-D or /exit the chat. /clear forgets the conversation, /save FILE writes it, /help shows this."
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ServingOptions):
    """The options of `partita chat`."""

    system: Annotated[
        str | None,
        typer.Option(
            "--system", metavar="TEXT", help="Begin with this system message.", show_default=False, rich_help_panel=TEXT
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="As in `partita generate`.", show_default=False, rich_help_panel=SAMPLING),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="As in `partita generate`.", show_default=False, rich_help_panel=SAMPLING),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="As in `partita generate`.", show_default=False, rich_help_panel=SAMPLING),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="As in `partita generate`.", show_default=False, rich_help_panel=SAMPLING),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(min=0.0, help="As in `partita generate`.", show_default=False, rich_help_panel=SAMPLING),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Sampling seed.", rich_help_panel=SAMPLING)] = 0


SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""The options that every request of the chat carries."""


def chat(options: ChatOptions) -> None:
    """Talk to a model split over ranks, which the command starts on this machine."""
    if environment.world() is not None:
        raise ModelError(
            f"chat reads this terminal, which ranks of {environment.launcher()} do not have. Start `partita serve` with it, "
            "or let `partita chat` start the ranks."
        )
    settings = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    with _served() as server:
        conversation = Conversation(server, settings, options.system)
        if _is_interactive():
            err().print(HELP, style="dim", soft_wrap=True)
        for message in _messages():
            if message.startswith("/"):
                if not conversation.command(message):
                    break
            else:
                conversation.answer(message)


def chat_server(options: ChatOptions) -> None:
    """Serve the model of a chat, in a process that `chat` starts. It ends when its standard input does."""
    threading.Thread(target=_end_with_input, name="input", daemon=True).start()
    start(options, host="127.0.0.1", port=0, api_key=os.environ.pop(KEY), name=Path(options.model).name)


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


# --- the server


@dataclass(frozen=True)
class _Address:
    host: str
    port: int
    key: str
    process: subprocess.Popen[bytes]


@contextmanager
def _served() -> Iterator[_Address]:
    """A server with the options of this command line, in a process of its own that Ctrl-C does not reach."""
    key = secrets.token_urlsafe(16)
    process = subprocess.Popen(
        [sys.executable, "-m", "partita", *_server_arguments()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True, env={**os.environ, KEY: key},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            line = process.stdout.readline()
            if not line:  # it has printed why
                raise typer.Exit(process.wait())
            host, _, port = json.loads(line)["url"].removeprefix("http://").rpartition(":")
            yield _Address(host, int(port), key, process)
        finally:
            process.send_signal(signal.SIGTERM)
            _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of the server; Ctrl-C ends it at once."""
    try:
        process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _server_arguments() -> list[str]:
    """This command line with the hidden command that serves, which takes the options of `chat`."""
    arguments = sys.argv[1:]
    place = arguments.index("chat")
    return [*arguments[:place], "chat-server", "--json", *arguments[place + 1 :]]


# --- the conversation


@dataclass
class Conversation:
    """The messages so far, and the server that answers."""

    server: _Address
    settings: dict[str, Any]
    system: str | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin a new conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system is not None else []

    def command(self, line: str) -> bool:
        """Execute a command. False if it ends the chat."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/clear":
            self.clear()
        elif name == "/save":
            self._save(rest.strip())
        elif name == "/help":
            err().print(HELP, style="dim", soft_wrap=True)
        else:
            err().print(
                f"{name} is no command. There are /clear, /save FILE, /help and /exit.", style="yellow", soft_wrap=True
            )
        return True

    def _save(self, name: str) -> None:
        if not name:
            err().print("/save needs the name of a file, as in /save chat.json.", style="yellow")
            return
        try:
            text = json.dumps({"messages": self.messages}, indent=2, ensure_ascii=False) + "\n"
            Path(name).expanduser().write_text(text, encoding="utf-8")
        except OSError as error:
            err().print(f"{name} cannot be written: {error.strerror}.", style="yellow", soft_wrap=True)
            return
        err().print(f"saved {len(self.messages)} messages in {name}", style="dim", soft_wrap=True)

    def answer(self, message: str) -> None:
        """Send a message and print the answer while it grows. Ctrl-C ends the answer, which stays in the conversation.

        Raises:
            ModelError: The server has ended.
        """
        self.messages.append({"role": "user", "content": message})
        answer = ""
        try:
            for text in self._stream():
                answer += text
                write(text)
        except KeyboardInterrupt:
            pass
        except PartitaError as error:
            self.messages.pop()
            if self.server.process.poll() is not None:
                raise
            err().print(str(error), style="yellow", soft_wrap=True)
            return
        write("\n")
        self.messages.append({"role": "assistant", "content": answer})

    def _stream(self) -> Iterator[str]:
        """The pieces of the next answer. Closing the connection ends it."""
        body = {"messages": self.messages, "stream": True, **self.settings}
        headers = {"authorization": f"Bearer {self.server.key}", "content-type": "application/json"}
        with closing(http.client.HTTPConnection(self.server.host, self.server.port)) as connection:
            try:
                connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
                response = connection.getresponse()
                if response.status != 200:
                    raise ModelError(json.loads(response.read())["error"]["message"])
                for line in response:
                    if line.startswith(b"data: {"):
                        yield _text_of(json.loads(line[6:]))
            except (OSError, http.client.HTTPException) as error:
                raise ModelError(f"the server of this chat has ended: {error or type(error).__name__}.") from error


def _text_of(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise ModelError(chunk["error"]["message"])
    delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
    return str(delta.get("reasoning_content") or "") + str(delta.get("content") or "")


def _messages() -> Iterator[str]:
    """The messages of the user: lines, joined where one ends with a backslash or `\"\"\"` surrounds them."""
    lines: list[str] = []
    is_open = False
    while True:
        try:
            line = _line(MORE if lines or is_open else PROMPT)
        except KeyboardInterrupt:  # drops what is written so far
            lines, is_open = [], False
            write("\n")
            continue
        if line is None:
            if lines:
                yield "\n".join(lines)
            return
        if line.strip() == '"""':
            is_open = not is_open
        elif is_open or line.endswith("\\"):
            lines.append(line if is_open else line[:-1])
            continue
        else:
            lines.append(line)
        if not is_open and (text := "\n".join(lines)).strip():
            lines = []
            yield text
        elif not is_open:
            lines = []


def _line(prompt: str) -> str | None:
    """The next line of the input without its end; None at its end."""
    if _is_interactive():
        with suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit the line, and recall earlier ones
        try:
            return input(prompt)
        except EOFError:
            write("\n")
            return None
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None
