"""The records of a file: a text, a prompt with its completion, or a conversation."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partita.errors import DependencyError, ModelError
from partita.training.data.files import DataFile

BLOCK_BYTES = 64 << 20
"""A longer text file is encoded in blocks of this size that end at a line's end, so that it need not fit into memory."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """A text, or a block of one: all of it is trained on."""

    text: str
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Completion:
    """A prompt and the completion to train on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation, in which the assistant's messages from number `start` on are trained on."""

    messages: Sequence[Mapping[str, Any]]
    tools: Any = None
    start: int = 0


Record = Text | Completion | Chat

TOLD = Callable[[int], None]
"""A callback that receives the bytes read since the last call."""


def records(file: DataFile, text_column: str = "text", read: TOLD = lambda count: None) -> Iterator[Record]:
    """The records of a file, in order. A text file is one text.

    Args:
        file: The file.
        text_column: The column of a text. `messages`, and `prompt` with `completion`, come first where `text` is the default.
        read: Called with the bytes that were read.

    Raises:
        ModelError: The file cannot be read, or a row has no usable column; the message names the file, the row and the remedy.
        DependencyError: The file needs the `datasets` library, which is not installed.
    """
    if file.format == "text":
        yield from _texts(file, read)
        return
    reader = {"json": _json_rows, "csv": _csv_rows}.get(file.format, _table_rows)
    yield from records_of(reader(file, read), file.name, text_column)


def records_of(rows: Iterable[tuple[str, Any]], name: str, text_column: str = "text") -> Iterator[Record]:
    """The records of rows; each comes with the place that errors name, such as `line 3`. An empty text is no record.

    Raises:
        ModelError: A row has no usable column, or there is no row.
    """
    kind: Callable[[Row, str], Record] | None = None
    for place, row in rows:
        where = f"{name}, {place}"
        if not isinstance(row, Mapping):
            raise ModelError(f"{where}: a row must be an object with named columns, but is {_short(row)}.")
        if kind is None:
            kind = _kind_of(row, name, text_column)
        record = kind(row, where)
        if not isinstance(record, Text) or record.text:
            yield record
    if kind is None:
        raise ModelError(f"{name} is empty: there is no text in it. Leave it out, or remove it.")


def _kind_of(row: Row, name: str, text_column: str) -> Callable[[Row, str], Record]:
    """What the first row makes of all rows."""
    if "chosen" in row and "rejected" in row:
        raise ModelError(
            f"{name} has preference pairs (chosen, rejected), which need a preference loss that Partita does not "
            "have. Use TRL's "
            "DPOTrainer for them, or rename `chosen` to `messages` to fine-tune on the chosen answers alone."
        )
    if text_column != "text" or not ({"prompt", "completion"} <= row.keys() or "messages" in row):
        if text_column not in row:
            raise ModelError(
                f"{name} has no usable column: a row must have `{text_column}`, `prompt` and `completion`, or "
                "`messages`, but has "
                f"{', '.join(map(str, row)) or 'no column'}. Name the column of the text with --text-column."
            )
        return lambda row, where: Text(_text(row, text_column, where))
    return _chat if "messages" in row else _completion


def _completion(row: Row, where: str) -> Record:
    if isinstance(row.get("prompt"), Sequence) and not isinstance(row["prompt"], str):
        before, after = _messages(row, "prompt", where), _messages(row, "completion", where)
        return Chat([*before, *after], _plain(row.get("tools")), len(before))
    prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
    if not completion:
        raise ModelError(f"{where}: `completion` is empty, so there is nothing to train on. Remove the row.")
    return Completion(prompt, completion)


def _chat(row: Row, where: str) -> Record:
    messages = _messages(row, "messages", where)
    if not any(message["role"] == "assistant" for message in messages):
        raise ModelError(
            f"{where}: `messages` has no message of the role assistant, so there is nothing to train on. Remove the row."
        )
    return Chat(messages, _plain(row.get("tools")))


def _messages(row: Row, column: str, where: str) -> list[Mapping[str, Any]]:
    messages = row.get(column)
    if isinstance(messages, Sequence) and not isinstance(messages, str) and messages:
        plain = [_plain(message) for message in messages]
        if all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in plain):
            return plain
    raise ModelError(
        f"{where}: `{column}` must be a list of messages with `role` and `content`, but is {_short(messages)}."
    )


def _plain(value: Any) -> Any:
    """`value` without the None that tables have where a row lacks a key: templates treat it as a given value."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ModelError(
            f"{where}: `{column}` must be a text, but is {_short(value)}. Fix or remove the row, or name another column with "
            "--text-column."
        )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _texts(file: DataFile, read: TOLD) -> Iterator[Text]:
    begins, done, rest = True, 0, b""
    with _opened(file) as stream:
        while True:
            raw = stream.read(BLOCK_BYTES)
            read(len(raw))
            ends = len(raw) < BLOCK_BYTES
            raw = rest + raw
            cut = len(raw) if ends else raw.rfind(b"\n") + 1 or len(raw) - _unfinished(raw)
            raw, rest = raw[:cut], raw[cut:]
            if raw or not begins:
                yield Text(_decoded(file, raw, done), begins, ends)
            if ends:
                return
            begins, done = False, done + len(raw)


def _unfinished(raw: bytes) -> int:
    """How many bytes at the end begin a character of UTF-8 that `raw` does not complete."""
    for back in range(1, 4):
        if raw[-back] >= 0xC0:
            return back
        if raw[-back] < 0x80:
            break
    return 0


def _decoded(file: DataFile, raw: bytes, start: int = 0, place: str = "") -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{file.name}{place} must be text in UTF-8, but its byte {start + error.start} is 0x{raw[error.start]:02x}. "
            "Convert it (iconv -t utf-8), or leave it out."
        ) from error


def _opened(file: DataFile) -> Any:
    try:
        return file.path.open("rb")
    except OSError as error:
        raise ModelError(f"{file.name} cannot be read: {error.strerror}. Leave it out, or fix it.") from error


def _json_rows(file: DataFile, read: TOLD) -> Iterator[tuple[str, Any]]:
    """The rows of JSON Lines, or of a JSON array.

    Each line is parsed by itself: pyarrow, which `datasets` reads JSON with, turns texts that look like dates into dates, adds
    keys that other rows have, and does not name the line of an error.
    """
    with _opened(file) as stream:
        first = stream.readline()
        while first.isspace():
            first = stream.readline()
        if first.lstrip().startswith(b"[") and file.path.suffix.lower() == ".json":
            raw = first + stream.read()
            read(len(raw))
            rows = _parsed(file, raw, "")
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
            return
        stream.seek(0)
        for number, line in enumerate(stream, 1):
            read(len(line))
            if not line.isspace():
                yield f"line {number}", _parsed(file, line, f", line {number}")


def _parsed(file: DataFile, raw: bytes, place: str) -> Any:
    text = _decoded(file, raw, place=place)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ModelError(
            f"{file.name}{place} must be JSON, an object in each line, but is not: {error}. Fix the file, or leave it out."
        ) from error


def _table_rows(file: DataFile, read: TOLD) -> Iterator[tuple[str, Any]]:
    """The rows of a parquet file, or of a saved data set."""
    datasets = import_datasets(f"read {file.path}")
    total = file.size_bytes
    try:
        if file.format == "saved":
            table: Any = datasets.load_from_disk(str(file.path))
            if not isinstance(table, datasets.Dataset):
                raise ValueError("it has several splits; give the folder of one")
        else:
            place = _literal(str(file.path.absolute()))
            table = datasets.load_dataset(file.format, data_files=place, split="train", streaming=True)
        for number, row in enumerate(table, 1):
            yield f"row {number}", row
        read(total)
    except ModelError:
        raise
    except Exception as error:
        cause: BaseException = error.__cause__ or error
        why = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise ModelError(
            f"{file.name} cannot be read as {file.format}: {why}. Fix the file, or leave it out."
        ) from error


def _literal(path: str) -> str:
    """A path in which no character has a meaning in a glob."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _csv_rows(file: DataFile, read: TOLD) -> Iterator[tuple[str, Any]]:
    """The rows of a csv file, in which every cell is the text that it is: pandas would read `NA` as missing, and `007` as 7."""
    comma = "\t" if file.path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(sys.maxsize)
    with _opened(file) as stream:

        def lines() -> Iterator[str]:
            for number, line in enumerate(stream, 1):
                read(len(line))
                yield _decoded(file, line, place=f", line {number}")

        rows = csv.DictReader(lines(), delimiter=comma, strict=True)
        try:
            for number, row in enumerate(rows, 1):
                if None in row:
                    raise csv.Error(f"row {number} has more cells than the first line has names")
                yield f"row {number}", row
        except csv.Error as error:
            raise ModelError(f"{file.name} cannot be read as csv: {error}. Fix the file, or leave it out.") from error


def import_datasets(purpose: str) -> Any:
    """The `datasets` library.

    Raises:
        DependencyError: It is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"the `datasets` library is not installed, but is needed to {purpose}: pip install 'partita[torch]' or "
            "'partita[mlx]' installs it, and so does pip install datasets."
        ) from error
    # Its bars and notes would mix with those of the command.
    datasets.disable_progress_bars()
    return datasets
