"""Encoded data on disk: prepared once, by one of several processes, recognized by its content, complete or absent."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from partita.errors import ModelError
from partita.generation import byte_tokenizer
from partita.training.data import store as storing
from partita.training.data.encode import Encoded
from partita.training.data.store import Store, prepare
from partita.training.state import digest_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def _stores(tmp_path: Path) -> list[str]:
    return sorted(one.name for one in (tmp_path / "cache" / "data").iterdir() if one.is_dir())


def test_texts_and_documents_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("ab")
    (tmp_path / "d" / "b.jsonl").write_text('{"prompt": "c", "completion": "d"}\n{"prompt": "", "completion": "ef"}\n')
    (tmp_path / "d" / "c.txt").write_text("g")
    store = prepare("d", byte_tokenizer())
    assert isinstance(store.texts, np.memmap)
    assert store.texts.tolist() == [*b"ab", 256, *b"g", 256]
    assert store.text_ends.tolist() == [3, 5]
    assert store.documents.tolist() == [*b"cd", 256, *b"ef", 256]
    assert store.trained.tolist() == [0, 1, 1, 1, 1, 1]
    assert store.ends.tolist() == [3, 6]
    assert store.largest == 256
    assert store.texts_digest == digest_of(np.array([*b"ab", 256, *b"g", 256]))


def test_a_store_in_memory_is_the_same() -> None:
    made = Store.of(iter([Encoded([1, 2]), Encoded([3, 4], [False, True])]))
    assert (made.texts.tolist(), made.documents.tolist(), made.trained.tolist()) == ([1, 2], [3, 4], [0, 1])


def test_it_is_recognized_by_content_tokenizer_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.jsonl").write_text('{"text": "a", "body": "b"}\n')
    Path("copy.jsonl").write_text('{"text": "a", "body": "b"}\n')
    prepare("a.jsonl", byte_tokenizer())
    assert len(_stores(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(storing, "_prepare", lambda *_: pytest.fail("it was prepared again"))
        prepare("a.jsonl", byte_tokenizer())
        prepare("copy.jsonl", byte_tokenizer())
    assert prepare("a.jsonl", byte_tokenizer(), text_column="body").texts.tolist() == [*b"b", 256]
    other = byte_tokenizer()
    other.eos_ids = frozenset()
    assert prepare("a.jsonl", other).texts.tolist() == [*b"a"]
    Path("a.jsonl").write_text('{"text": "c"}\n')
    assert prepare("a.jsonl", byte_tokenizer()).texts.tolist() == [*b"c", 256]
    assert len(_stores(tmp_path)) == 4


def test_a_large_source_is_recognized_by_path_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "HASHED_BYTES", 0)
    Path("a.txt").write_text("a")
    prepare("a.txt", byte_tokenizer())
    prepare("a.txt", byte_tokenizer())
    assert len(_stores(tmp_path)) == 1
    Path("a.txt").write_text("b")
    os.utime("a.txt", (1, 1))
    assert prepare("a.txt", byte_tokenizer()).texts.tolist() == [*b"b", 256]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    Path("a.txt").write_bytes(b"a" * 100 + b"\xff")
    for _ in range(2):
        with pytest.raises(ModelError, match="must be text in UTF-8"):
            prepare("a.txt", byte_tokenizer())
    assert _stores(tmp_path) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "file"))
    Path("a.txt").write_text("a")
    with pytest.raises(ModelError, match=r"cannot be kept in .*Free some space there, or set PARTITA_CACHE"):
        prepare("a.txt", byte_tokenizer())


PROGRAM = """
import hashlib, sys
from partita.generation import byte_tokenizer
from partita.training.data import store
made = []
inner = store._prepare
store._prepare = lambda *given: (made.append(1), inner(*given))
seen = []
found = store.prepare("a.txt", byte_tokenizer(), progress=lambda done, total: seen.append((done, total)))
print(len(made), hashlib.sha256(found.texts.tobytes()).hexdigest(), all(total == 4000000 for _, total in seen))
"""


@pytest.mark.timeout(100)
def test_one_of_several_processes_prepares_it(tmp_path: Path) -> None:
    Path("a.txt").write_text("abcdefg\n" * 500_000)
    runs = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [run.communicate(timeout=90)[0].split() for run in runs]
    whole = np.array([*b"abcdefg\n" * 500_000, 256], "<u4")
    assert sorted(count for count, *_ in said) == ["0", "0", "1"]
    assert {digest for _, digest, _ in said} == {hashlib.sha256(whole.tobytes()).hexdigest()}
    assert {told for *_, told in said} == {"True"}
    assert len(_stores(tmp_path)) == 1
