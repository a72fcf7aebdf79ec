"""Consoles, units, and short forms of long lists for printing."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import IO, TYPE_CHECKING, Any, NoReturn

from partita.core.mesh import AXES, Mesh

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 140
"""Columns of output that goes to a file or pipe."""


class OutputClosed(BaseException):
    """The reader of stdout or stderr has closed it, as `head` does. This ends the command."""


@cache
def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class _Console(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            try:
                super().print(*objects, **options)
            except BrokenPipeError:
                raise OutputClosed from None

        def on_broken_pipe(self) -> NoReturn:  # newer versions of rich exit in this method
            raise OutputClosed

    stream: IO[str] = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return _Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def out() -> Console:
    """The console for results."""
    return _console(stderr=False)


def err() -> Console:
    """The console for progress and errors."""
    return _console(stderr=True)


def write(text: str) -> None:
    """Write text to stdout unchanged, and flush.

    Raises:
        OutputClosed: The reader has closed stdout.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise OutputClosed from None


def replace_unprintable() -> None:
    """Make stdout write `?` for characters that its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def discard_output() -> None:
    """Discard buffered output for a closed stdout or stderr, which Python would fail to write at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_json(data: Any) -> None:
    """Print `data` as one JSON document, lists of numbers on one line; in ASCII if stdout is not UTF-8."""
    text = json.dumps(data, indent=2, ensure_ascii=not _is_utf8(sys.stdout))
    text = re.sub(r"\[\n\s+([-+\d.eE,\s]+?)\n\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    write(text + "\n")


def _is_utf8(stream: IO[str]) -> bool:
    return codecs.lookup(getattr(stream, "encoding", None) or "ascii").name == "utf-8"


def examples(*commands: str) -> str:
    """The examples below a command's help; one too long for a line continues behind a backslash, so that it can be copied."""
    shown = (line.replace("[", r"\[") for command in commands for line in _lines(command))
    return "\n".join(["[bold]Examples[/bold]", *shown])


def _lines(command: str, width: int = 80) -> list[str]:
    """A shell command in lines of at most `width`, broken before options."""
    lines: list[str] = []
    for word in re.split(r" (?=-)", f"$ {command}"):
        if lines and len(lines[-1]) + len(word) + 3 <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}" if lines else word)
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def count(number: int) -> str:
    """A large number in readable form: 671.03 B."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def size(number_bytes: float) -> str:
    """A number of bytes in readable form: 14.96 GiB."""
    for exponent, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number_bytes >= 1024**exponent:
            return f"{number_bytes / 1024**exponent:.2f} {unit}"
    return f"{number_bytes:.0f} B"


def plural(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def runs(ids: Iterable[int]) -> str:
    """Integers with consecutive ones joined: `0-2, 5`."""
    groups = groupby(enumerate(ids), key=lambda item: item[1] - item[0])
    spans = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def mesh_name(mesh: Mesh) -> str:
    """The axes of a mesh that have more than one rank: `dp 2 x tp 2`."""
    sizes = [f"{axis} {mesh.axis_size(axis)}" for axis in AXES if mesh.axis_size(axis) > 1]
    return " x ".join(sizes) or "one rank"


def layer_ids(ids: Sequence[int], noun: str = "layer") -> str:
    """`layers 0-7`, `layer 3`, or an empty text."""
    if not ids:
        return ""
    return f"{noun}{'' if len(ids) == 1 else 's'} {runs(ids)}"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as a line of bars, each the mean of equally many values; a value that is not finite is a `!`."""
    bars = "▁▂▃▄▅▆▇█"
    columns = min(width, len(values))
    edges = [i * len(values) // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    finite = [mean for mean in means if abs(mean) != float("inf") and mean == mean]
    if not finite:
        return "!" * columns
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(bars[round((mean - low) / span * 7)] if mean in finite else "!" for mean in means)
