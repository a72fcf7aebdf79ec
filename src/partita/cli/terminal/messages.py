"""Messages of Partita's dependencies: those that concern the user are printed in one line each, the rest are dropped.

Libraries warn developers of deprecated names, and recommend kernels and packages. In a command such a line would appear
in the middle of the generated text or the progress bar. `--debug` leaves all messages unchanged.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from partita.cli.terminal.console import err
from partita.ranks import environment

MAX_CHARACTERS = 240
"""Longer messages are truncated to this many characters."""

_FOR_DEVELOPERS = (
    DeprecationWarning,
    PendingDeprecationWarning,
    FutureWarning,
    ImportWarning,
    ResourceWarning,
    EncodingWarning,
)
_ABOUT_CODE = re.compile(r"deprecat|will be removed|no longer needed|to suppress this", re.IGNORECASE)

_ABOUT_FILES = re.compile(
    r"transformers\.(configuration_utils|modeling_rope_utils|tokenization_\w+|dynamic_module_utils|models\.auto\.\w+"
    r"|generation\.configuration_utils|models\.\w+\.(configuration|tokenization)_\w+)"
)
"""Loggers of transformers whose warnings are about the user's model: its config and its tokenizer. Other modules warn about
what Partita chooses (attention kernels, caches), or about speed."""

_OWN_HANDLERS = {"transformers": "transformers.utils.logging", "huggingface_hub": "huggingface_hub.utils.logging"}
"""Libraries whose root logger writes to stderr itself, and the module that configures it."""


class _Lines(logging.Handler):
    """Print each message once, on the first rank; hold messages back while text is streamed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.shown: set[str] = set()
        self.waiting: list[str] = []
        self.is_held = False
        self.adopted: list[tuple[logging.Logger, list[logging.Handler], bool]] = []

    def emit(self, record: logging.LogRecord) -> None:
        library = record.name.partition(".")[0]
        if library == "partita":
            self.show(record.getMessage())
        elif library != "transformers" or record.levelno >= logging.ERROR or _ABOUT_FILES.match(record.name):
            self.show_of(library, record.getMessage())

    def show_of(self, library: str, text: str) -> None:
        """Print a library's message in one line, unless it concerns the library's developers only."""
        line = " ".join(text.split())
        if environment.is_first() and not _ABOUT_CODE.search(line):
            self.show(f"{library}: {line if len(line) <= MAX_CHARACTERS else f'{line[:MAX_CHARACTERS]}...'}")

    def show(self, line: str) -> None:
        """Print a line, unless it was printed before."""
        if line not in self.shown:
            self.shown.add(line)
            self.waiting.append(line)
        if not self.is_held:
            self.show_waiting()

    def show_waiting(self) -> None:
        """Print the lines that were held back, and stop holding lines back."""
        from rich.text import Text

        self.is_held = False
        while self.waiting:
            err().print(Text(f"note: {self.waiting.pop(0)}", style="yellow"), soft_wrap=True)


_lines: _Lines | None = None


@contextlib.contextmanager
def routed(*, debug: bool = False) -> Iterator[None]:
    """Route the messages of libraries through this module, unless `debug` or Python's `-W` is given."""
    global _lines
    if debug or sys.warnoptions or _lines is not None:
        yield
        return
    lines = _lines = _Lines()
    root, shown = logging.getLogger(), warnings.showwarning
    root.addHandler(lines)
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        lines.show_waiting()
        _lines = None
        warnings.showwarning = shown
        root.removeHandler(lines)
        for logger, handlers, propagate in lines.adopted:
            logger.handlers[:], logger.propagate = handlers, propagate


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if _lines is not None and not issubclass(category, _FOR_DEVELOPERS):
        _lines.show_of(_library_of(filename), str(message))


def _library_of(file: str) -> str:
    """The name of the package that a source file belongs to."""
    _, found, inside = file.replace(os.sep, "/").rpartition("/site-packages/")
    return inside.partition("/")[0] if found else "partita" if "/partita/" in file else "python"


def adopt(*libraries: str) -> None:
    """Import the loggers of `libraries` that write to stderr themselves, and redirect them. Does nothing outside `routed`."""
    if _lines is None:
        return
    for name in libraries:
        if f"{name.upper()}_VERBOSITY" in os.environ or (
            name == "huggingface_hub" and "HF_HUB_VERBOSITY" in os.environ
        ):
            continue
        with contextlib.suppress(ImportError):
            importlib.import_module(_OWN_HANDLERS[name])
        logger = logging.getLogger(name)
        if logger.handlers or not logger.propagate:
            _lines.adopted.append((logger, list(logger.handlers), logger.propagate))
            logger.handlers[:], logger.propagate = [], True


def adopt_all() -> None:
    """Redirect the loggers of every library that a command on ranks uses; this imports the libraries."""
    adopt(*_OWN_HANDLERS)


def hold() -> None:
    """Hold messages back while text is streamed to the terminal."""
    if _lines is not None:
        _lines.is_held = True


def release() -> None:
    """Print the messages that were held back."""
    if _lines is not None:
        _lines.show_waiting()
