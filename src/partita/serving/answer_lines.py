"""The file of answers to a file of prompts, a JSON object a line, which an interrupted run continues.

While prompts are answered, lines are appended in the order in which they finish. When all are answered, the file is replaced
by one in the order of the prompts, so that it does not tell how often the run was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from partita.checkpoint.durable import failing_as, sync
from partita.errors import ModelError

_BEGIN = b'{"index": '
"""The beginning of every line, by which an incomplete one is known."""


class AnswerLines:
    """The answers so far, and the file that more are appended to. A context, which closes the file.

    Attributes:
        done: The indices of the prompts that have an answer. One with an error is computed again.
    """

    def __init__(self, file: Path, count: int, key_of: Callable[[int], str]) -> None:
        """Continue `file`, or create it.

        The last line is removed if it is incomplete, as a killed process leaves it.

        Args:
            file: The file.
            count: The number of prompts.
            key_of: What identifies the prompt at an index with its settings; an answer must have been written for the same.

        Raises:
            CheckpointError: The file cannot be written.
            ModelError: It has something else than answers to these prompts, or another process writes it.
        """
        self.file, self._count, self._key_of = file, count, key_of
        self.done: set[int] = set()
        with failing_as(file, "cannot be written"):
            self._data = file.open("a+b")
        try:
            self._lock()
            with failing_as(file, "cannot be written"):
                self._read()
        except BaseException:
            self._data.close()
            raise

    def _lock(self) -> None:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ModelError(
                    f"--out {self.file} is being written by another process. Give another file."
                ) from error

    def _read(self) -> None:
        """Find the answers in the file, and remove an incomplete last line and those with an error."""
        errors = False
        for place, line in self._lines():
            if not line.endswith(b"\n") and (line.startswith(_BEGIN) or _BEGIN.startswith(line)):
                self._data.truncate(place)
                break
            index, is_error = self._index_of(line, place)
            errors = errors or is_error
            if not is_error:
                self.done.add(index)
        if errors:
            self._replace(lambda entries: ((i, line) for i, line in entries if i in self.done))
        self._data.seek(0, os.SEEK_END)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """The place of each line, and the line."""
        self._data.seek(0)
        place = 0
        for line in self._data:
            yield place, line
            place += len(line)

    def _index_of(self, line: bytes, place: int) -> tuple[int, bool]:
        """The index of the prompt that a line answers, and whether it has an error."""
        try:
            data = json.loads(line)
            index, key, error = data["index"], data["key"], data["error"]
        except (ValueError, TypeError, KeyError, RecursionError) as failure:
            raise ModelError(
                f"--out {self.file} has a line at byte {place} that is no answer: {line[:60]!r}. Give another file."
            ) from failure
        if error:
            return index, True
        if type(index) is not int or not 0 <= index < self._count or key != self._key_of(index):
            raise ModelError(
                f"--out {self.file} has an answer with index {index!r:.20} to another prompt, by another model or with other "
                "settings. Give the prompts, the model and the settings of the run that wrote it, or another file."
            )
        if index in self.done:
            raise ModelError(f"--out {self.file} has two answers with index {index}. Remove one, or give another file.")
        return index, False

    def add(self, index: int, answer: dict[str, Any]) -> None:
        """Append the answer to the prompt at `index`. Raises CheckpointError."""
        line = json.dumps({"index": index, **answer, "key": self._key_of(index)}, ensure_ascii=False)
        with failing_as(self.file, "cannot be written"):
            self._data.write(line.encode() + b"\n")
            self._data.flush()

    def finish(self) -> None:
        """Put the answers in the order of the prompts. Raises CheckpointError."""
        with failing_as(self.file, "cannot be written"):
            self._replace(lambda entries: iter(sorted(entries, key=lambda entry: entry[0])))

    def _replace(self, order: Callable[[list[tuple[int, int]]], Iterator[tuple[int, Any]]]) -> None:
        """Replace the file by its lines in another order, or by some of them."""
        entries = [(json.loads(line)["index"], place) for place, line in self._lines()]
        new = self.file.with_name(f".{self.file.name}.new")
        with new.open("w+b") as data:
            for _, place in order(entries):
                self._data.seek(place)
                data.write(self._data.readline())
        sync(new)
        os.replace(new, self.file)
        self._data.close()
        self._data = self.file.open("a+b")
        self._lock()

    def __enter__(self) -> AnswerLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._data.close()
