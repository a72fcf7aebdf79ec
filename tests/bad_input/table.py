"""A row of a table of bad input, and what every row promises: one clear error, nothing changed, no traceback."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from partita.errors import PartitaError
from tests.cli.conftest import Run, Said

ENGINES = ("torch", *(["mlx"] if find_spec("mlx") and find_spec("mlx_lm") else []))


@dataclass(frozen=True)
class Case:
    """A command line, and its error.

    Attributes:
        name: What is bad.
        line: The command line behind `partita`.
        says: What the error says; `...` stands for any text.
        drawn: Whether more lines below the error draw it: a caret under the character, a schedule's grid, a list.
        after: Whether training has begun to tell of itself before.
    """

    name: str
    line: str
    says: str
    drawn: bool = False
    after: bool = False


@dataclass(frozen=True)
class Call:
    """A call from Python, and its error.

    Attributes:
        name: What is bad.
        make: The call.
        says: What the error says; `...` stands for any text.
        drawn: Whether more lines below draw it.
    """

    name: str
    make: Callable[[], Any]
    says: str
    drawn: bool = False


def rows(cases: Iterable[Any]) -> pytest.MarkDecorator:
    """Run a test for each row."""
    listed = list(cases)
    assert len({case.name for case in listed}) == len(listed), "two rows have one name"
    return pytest.mark.parametrize("case", listed, ids=[case.name for case in listed])


def refuses(case: Case, run: Run) -> None:
    """Run the command line of a row, and see that it is refused as the row says, with nothing written or changed."""
    before = contents(Path())
    said = run(*shlex.split(case.line))
    assert said.code == 2, said.err
    assert "Traceback" not in said.out + said.err
    line = error_of(said, drawn=case.drawn, after=case.after)
    assert holds(line, case.says), line
    assert contents(Path()) == before


def raises(case: Call) -> None:
    """See that a call is refused as the row says."""
    with pytest.raises(PartitaError) as caught:
        case.make()
    text = str(caught.value)
    assert case.drawn or "\n" not in text, text
    assert holds(text, case.says), text


def error_of(said: Said, *, drawn: bool = False, after: bool = False) -> str:
    """The one line of an error: ours, or the text in the box of a usage error."""
    if "╭─ Error" in said.err:
        inside = (line.strip("│ ") for line in said.err.splitlines() if line.startswith("│"))
        return " ".join(inside)
    lines = said.err.splitlines()
    places = [place for place, line in enumerate(lines) if line.startswith("error: ")]
    assert len(places) == 1, said.err
    assert after or places == [0], said.err
    assert drawn or places[0] == len(lines) - 1, said.err
    return lines[places[0]]


def holds(text: str, pattern: str) -> bool:
    """Whether `text` has the parts of a pattern between its `...`, in their order. Blanks of any width are one."""
    parts = [re.escape(" ".join(part.split())) for part in pattern.split("...")]
    return re.search(".*?".join(parts), " ".join(text.split())) is not None


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its size and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
