"""Files that a command reads: standard input, pipes and process substitutions are read once, and kept for every rank."""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path

import typer

from partita.errors import ModelError
from partita.ranks import environment

STDIN = ("-", "/dev/stdin", "/proc/self/fd/0", "/dev/fd/0")
"""What names standard input."""


def kept(source: str, option: str) -> str:
    """`source`, or where it can be read only once, a copy of it that lasts as long as this process.

    Args:
        source: A path, `-` for standard input, or anything else that the command understands.
        option: Its name on the command line, for errors.

    Raises:
        ModelError: As `read`.
    """
    if source not in STDIN and not is_stream(Path(source)):
        return source
    data = read(Path(source), option)
    file = Path(_folder().name) / f"{len(os.listdir(_folder().name))}.txt"
    file.write_bytes(data)
    return str(file)


def read(source: Path, option: str) -> bytes:
    """The bytes of a file, of a pipe, or of standard input (`-`).

    Raises:
        ModelError: Standard input is asked for twice, is a terminal, or belongs to one of several ranks of another launcher.
        OSError: The file cannot be read.
    """
    if str(source) not in STDIN:
        return source.read_bytes()
    what = f"{option} {source}"
    if environment.is_one_of_several():
        raise ModelError(
            f"{what}: standard input belongs to one process, and a launcher started several. Give a file that all can read."
        )
    if _used:
        raise ModelError(f"{what}: standard input was read already, for {_used[0]}. Give a file for one of them.")
    if sys.stdin is None or sys.stdin.isatty():
        raise ModelError(f"{what}: standard input is a terminal. Pipe text into the command, or give a file.")
    _used.append(what)
    return sys.stdin.buffer.read()


_used: list[str] = []
"""The option that standard input was read for, once it was."""


def existing_file(text: str) -> Path:
    """A path of the command line that names a file, a pipe, or standard input.

    Raises:
        BadParameter: It names nothing, or a folder.
    """
    path = Path(text)
    if text not in STDIN and not path.exists():
        raise typer.BadParameter(f"file {text!r} does not exist.")
    if path.is_dir():
        raise typer.BadParameter(f"file {text!r} is a directory.")
    return path


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe, which ends when it has been read."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except (OSError, ValueError):
        return False


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="partita-input-")


def parse_bytes(text: str | int) -> int:
    """A number of bytes: `4GiB`, `500MB`, `1000000`.

    Raises:
        BadParameter: It is none.
    """
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)?\s*", str(text).upper())
    number = 0.0
    if matched:
        exponent = " KMGT".index(matched[2] or " ")
        number = float(matched[1]) * (1024 if matched[3] else 1000) ** exponent
    if number < 1:
        raise typer.BadParameter(f"must be a number of bytes, as in 4GiB or 500MB, but is {text!r}.")
    return int(number)
