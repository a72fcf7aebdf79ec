"""What `--data` reads: every format gives its rows, and what cannot be read is an error that names the file and the remedy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from partita.errors import DependencyError, ModelError
from partita.generation import byte_tokenizer
from partita.training.data import records as reading
from partita.training.data.encode import encode_all
from partita.training.data.files import files_of
from partita.training.data.records import Chat, Completion, Text, records
from partita.training.data.texts import read_ids

ROWS = [{"text": "NA", "n": 1}, {"text": "2024-01-02", "n": 2}, {"text": "a, b", "n": 3}]


def _read(source: Path | str, **options: Any) -> list[Any]:
    return [record for file in files_of(str(source)) for record in records(file, **options)]


def _jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _write(folder: Path, ending: str) -> Path:
    import datasets

    path = folder / f"rows{ending}"
    if ending == ".jsonl":
        return _jsonl(path, *ROWS)
    if ending == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
        return path
    table = datasets.Dataset.from_list(ROWS)
    if ending == ".saved":
        table.save_to_disk(str(path))
    elif ending == ".parquet":
        table.to_parquet(str(path))
    else:
        table.to_csv(str(path), sep="\t" if ending == ".tsv" else ",")
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".csv", ".tsv", ".saved"])
def test_every_format_has_the_same_rows(tmp_path: Path, ending: str) -> None:
    assert _read(_write(tmp_path, ending)) == [Text(row["text"]) for row in ROWS]


def test_a_name_with_the_characters_of_a_glob(tmp_path: Path) -> None:
    (folder := tmp_path / "a[1]").mkdir()
    assert len(_read(_write(folder, ".csv"))) == len(ROWS)


def test_the_columns_decide(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert _read(_jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})) == [Completion("a", "b")]
    assert _read(_jsonl(tmp_path / "b.jsonl", {"messages": chat})) == [Chat(chat)]
    assert _read(_jsonl(tmp_path / "c.jsonl", {"prompt": chat[:1], "completion": chat[1:]})) == [Chat(chat, None, 1)]
    assert _read(_jsonl(tmp_path / "d.jsonl", {"body": "x", "text": "y"}), text_column="body") == [Text("x")]
    assert _read(_jsonl(tmp_path / "e.jsonl", {"text": ""}, {"text": "y"})) == [Text("y")]


def test_rows_of_a_table_lose_the_keys_that_only_others_have(tmp_path: Path) -> None:
    import datasets

    first = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}]
    datasets.Dataset.from_list([{"messages": first}]).to_parquet(str(tmp_path / "a.parquet"))
    assert _read(tmp_path / "a.parquet") == [Chat(first)]


def test_a_folder_and_a_glob_have_all_files_but_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.md", ".git/config", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    _jsonl(tmp_path / "z.jsonl", {"text": "z"})
    assert [one.text for one in _read(tmp_path)] == ["a/c.md", "b.txt", "z"]
    assert [one.text for one in _read(f"{tmp_path}/**/*.md")] == ["a/c.md"]


def test_a_long_text_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 7)
    for text in ("a\nbb\nccc\n", "äöü" * 9, "x" * 14, "1234567\n", "\n" * 20):
        (tmp_path / "a.txt").write_text(text)
        blocks = _read(tmp_path / "a.txt")
        assert "".join(block.text for block in blocks) == text
        assert [block.begins for block in blocks] == [True] + [False] * (len(blocks) - 1)
        assert [block.ends for block in blocks] == [False] * (len(blocks) - 1) + [True]
        tokenizer = byte_tokenizer()
        ids = [i for one in encode_all(iter(blocks), tokenizer, "") for i in one.ids]
        assert ids == [*text.encode(), 256]


def test_no_text_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    assert len(read_ids(str(tmp_path), byte_tokenizer())) == 33
    assert len(read_ids(str(tmp_path), byte_tokenizer(), limit_bytes=20)) == 22


BAD: list[tuple[str, bytes, str]] = [
    ("a.bin", b"x", r"a\.bin ends in \.bin, but a file must be text .*Rename or convert it"),
    ("LICENSE", b"x", r"LICENSE has no suffix"),
    ("a.txt", b"", r"a\.txt is empty.*Leave it out"),
    ("a.txt", b"a\xe9", r"a\.txt must be text in UTF-8, but its byte 1 is 0xe9"),
    ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl, line 2 must be JSON.*Fix the file"),
    ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: a row must be an object with named columns, but is \[1\]"),
    ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1 must be text in UTF-8"),
    ("a.jsonl", b"\n\n", r"a\.jsonl is empty"),
    ("a.json", b"[]", r"a\.json is empty"),
    ("a.jsonl", b'{"body": "a"}\n', r"no usable column: a row must have `text`.*but has body. Name .* --text-column"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"line 2: `text` must be a text, but is 3. Fix or remove the row"),
    ("a.jsonl", b'{"prompt": "a", "completion": ""}\n', "line 1: `completion` is empty"),
    ("a.jsonl", b'{"prompt": "a", "completion": null}\n', "line 1: `completion` must be a text, but is None"),
    ("a.jsonl", b'{"messages": "a"}\n', "`messages` must be a list of messages with `role` and `content`"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "has no message of the role assistant"),
    ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "preference pairs.*Use TRL's DPOTrainer"),
    ("a.parquet", b"PAR1 no", r"a\.parquet cannot be read as parquet: .*Fix the file"),
    ("a.csv", b"n\n1\n", r"a\.csv has no usable column"),
    ("a.csv", b"n,text\n1\n", r"a\.csv, row 1: `text` must be a text, but is None"),
    ("a.csv", b"text\na,b\n", "a\\.csv cannot be read as csv: row 1 has more cells than the first line has names"),
    ("a.csv", b"text\n\xff\n", r"a\.csv, line 2 must be text in UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), BAD)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ModelError, match=says):
            _read(source)


@pytest.mark.parametrize("source", ["no.txt", "no/*.txt", "empty"])
def test_a_source_without_files(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=f"--data {source.replace('*', '.')}: there is no"):
        files_of(source)


def test_without_datasets_a_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, ".parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DependencyError, match=r"`datasets` library is not installed, .* pip install 'partita\[torch\]'"
    ):
        _read(path)
    assert _read(_jsonl(tmp_path / "a.jsonl", {"text": "a"})) == [Text("a")]
