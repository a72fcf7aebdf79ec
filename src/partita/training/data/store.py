"""Encoded sources on disk, mapped into memory: prepared by one process of a machine, and used by all.

    texts.bin       uint32 ids of all texts, one after the other, in the order of the files
    text_ends.bin   int64, the end of each text in it
    documents.bin   uint32 ids of documents of which only some ids are trained on (completions, conversations)
    trained.bin     uint8 for each of these ids, whether it is trained on
    ends.bin        int64, the end of each document
    facts.json      counts and digests

A store appears complete, by a rename, under a name that its content decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from partita.errors import ModelError
from partita.generation import Tokenizer
from partita.training.data.encode import Encoded, encode_files, fingerprint
from partita.training.data.files import DataFile, files_of
from partita.user_cache import cache_folder

if TYPE_CHECKING:
    import numpy as np

    Ids = np.ndarray[Any, Any]

VERSION = 1
HASHED_BYTES = 64 << 20
"""A source up to this size is recognized by its content, a larger one by the paths, sizes and times of its files."""

POLL_S = 0.2
"""Seconds between two looks at the progress of another process."""

Progress = Callable[[int, int], None]
"""A callback that receives the bytes done and the total bytes."""

_FILES = {"texts": "uint32", "text_ends": "int64", "documents": "uint32", "trained": "uint8", "ends": "int64"}


@dataclass(frozen=True)
class Store:
    """The ids of one source.

    Attributes:
        texts: Ids of all texts, `[tokens]`, each text followed by the end token.
        text_ends: The end of each text in it, int64 `[texts]`.
        documents: Ids of all documents, `[tokens]`.
        trained: Whether each of these ids is trained on.
        ends: The end of each document in it, int64 `[documents]`.
        texts_digest: SHA-256 of `texts` as little-endian int64.
        documents_digest: SHA-256 of the documents' ids, marks and ends.
        largest: The largest id.
    """

    texts: Ids
    text_ends: Ids
    documents: Ids
    trained: Ids
    ends: Ids
    texts_digest: str
    documents_digest: str
    largest: int

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Map a prepared store."""
        import numpy as np

        facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())

        def mapped(name: str) -> Ids:
            file, dtype = folder / f"{name}.bin", np.dtype(_FILES[name]).newbyteorder("<")
            return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)

        arrays: dict[str, Any] = {name: mapped(name) for name in _FILES}
        return cls(**arrays, **{name: facts[name] for name in ("texts_digest", "documents_digest", "largest")})

    @classmethod
    def of(cls, encoded: Iterator[Encoded]) -> Store:
        """A store in memory."""
        import numpy as np

        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), encoded)
            made = cls.open(Path(folder))
            arrays: dict[str, Any] = {name: np.array(getattr(made, name)) for name in _FILES}
            return replace(made, **arrays)


def prepare(source: str, tokenizer: Tokenizer, *, text_column: str = "text", progress: Progress | None = None) -> Store:
    """The store of a source, from the user's cache, or prepared by this process while others that want it wait.

    Args:
        source: A file, folder, glob or `stdlib`.
        tokenizer: The tokenizer.
        text_column: The column of texts in tables.
        progress: Called while the source is prepared.

    Raises:
        ModelError: The source, or a file of it, cannot be read; or the cache cannot be written.
    """
    files = files_of(source)
    folder = cache_folder() / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = _key(files, tokenizer, text_column)
        place = folder / key
        if not (place / "facts.json").exists():
            with _locked(folder / f"{key}.lock", progress) as report:
                if not (place / "facts.json").exists():
                    _prepare(place, files, tokenizer, text_column, report)
        return Store.open(place)
    except OSError as error:
        raise ModelError(
            f"the encoded data cannot be kept in {folder}: {error.strerror or error}. Free some space there, or set "
            "PARTITA_CACHE "
            "to another folder."
        ) from error


@contextlib.contextmanager
def _locked(file: Path, progress: Progress | None) -> Iterator[Progress]:
    """Hold the kernel's lock on `file`, which a process that dies releases.

    Its holder writes its progress into it, and a process that waits reports that. Yields the function to report progress.
    """
    with file.open("r+b" if file.exists() else "a+b") as held:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_S)
            done = file.read_text().split() if progress is not None else []
            if progress is not None and len(done) == 2:
                progress(int(done[0]), int(done[1]))
        last_s = 0.0

        def report(done_bytes: int, total_bytes: int) -> None:
            nonlocal last_s
            if progress is not None:
                progress(done_bytes, total_bytes)
            if time.monotonic() - last_s > POLL_S:
                last_s = time.monotonic()
                file.write_text(f"{done_bytes} {total_bytes} ")

        yield report


def _prepare(place: Path, files: list[DataFile], tokenizer: Tokenizer, text_column: str, progress: Progress) -> None:
    total, done = sum(file.size_bytes for file in files), 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    made = Path(tempfile.mkdtemp(prefix=f".{place.name[:16]}-", dir=place.parent))
    try:
        _write(made, encode_files(files, tokenizer, text_column, read))
        try:
            made.rename(place)
        except OSError:
            # Another machine that shares the folder may have been faster.
            if not (place / "facts.json").exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(folder: Path, encoded: Iterator[Encoded]) -> None:
    """Write the files of a store, with digests that do not depend on how it was encoded."""
    import numpy as np

    digests = {name: hashlib.sha256() for name in ("texts", "documents")}
    lengths, largest = {"texts": 0, "documents": 0}, 0
    with contextlib.ExitStack() as stack:
        out: dict[str, BinaryIO] = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in _FILES}
        for one in encoded:
            kind = "texts" if one.trained is None else "documents"
            ids = np.array(one.ids, "<i8")
            largest = max(largest, int(ids.max(initial=0)))
            digests[kind].update(ids.tobytes())
            out[kind].write(ids.astype("<u4").tobytes())
            lengths[kind] += len(ids)
            end = np.array([lengths[kind]], "<i8").tobytes()
            if one.trained is not None:
                marks = np.array(one.trained, np.uint8).tobytes()
                digests[kind].update(marks + end)
                out["trained"].write(marks)
            if one.ends:
                out["text_ends" if one.trained is None else "ends"].write(end)
    facts = {
        "version": VERSION, "texts_digest": digests["texts"].hexdigest(),
        "documents_digest": digests["documents"].hexdigest(), "largest": largest,
    }  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(facts))


def _key(files: list[DataFile], tokenizer: Tokenizer, text_column: str) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, fingerprint(tokenizer), text_column]).encode())
    is_small = sum(file.size_bytes for file in files) <= HASHED_BYTES
    for file in files:
        if is_small and file.path.is_file():
            digest.update(
                f"{file.format} {file.path.suffix} ".encode() + hashlib.sha256(file.path.read_bytes()).digest()
            )
            continue
        for part in sorted(file.path.iterdir()) if file.path.is_dir() else [file.path]:
            facts = os.stat(part)
            digest.update(json.dumps([file.format, str(part.absolute()), facts.st_size, facts.st_mtime_ns]).encode())
    return digest.hexdigest()
