"""Durable writes: files and folders are flushed to disk, and a folder appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from partita.checkpoint.header import reason
from partita.errors import CheckpointError


@contextlib.contextmanager
def failing_as(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn an `OSError` inside into a CheckpointError that names `path`, or the file of the `OSError`."""
    try:
        yield
    except OSError as error:
        named = os.fsdecode(error.filename) if error.filename is not None else path
        raise CheckpointError(f"{named}: {what}: {reason(error)}") from error


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk. Raises OSError."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def write_whole(file: Path, data: bytes) -> None:
    """Replace a small file atomically. Raises CheckpointError."""
    new = file.with_name(f".{file.name}.new")
    with failing_as(file, "cannot be written"):
        new.write_bytes(data)
        sync(new)
        os.replace(new, file)
        sync(file.parent)


def write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files at their paths in a folder. Raises CheckpointError."""
    with failing_as(folder, "cannot be written"):
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def partial_of(place: Path) -> Path:
    """The folder in which a checkpoint for `place` is written: beside `place`, or inside it if it exists already.

    An existing `place` may be a mount point, into which a folder from outside cannot be renamed.
    """
    return place / ".partial" if place.exists() else place.parent / f".{place.name}.partial"


def start_partial(place: Path) -> Path:
    """Create an empty folder for the checkpoint that will appear at `place`; files of an earlier attempt are removed.

    Raises:
        CheckpointError: The folder cannot be created.
    """
    partial = partial_of(place)
    with failing_as(partial, "cannot be created"):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    return partial


def appear(partial: Path, place: Path) -> None:
    """Flush the folder `partial` and move it to `place`, in one rename if `place` does not exist.

    Into an existing folder its files move one by one, weights after all others and their index last, so that no reader
    takes the folder for a complete model before.

    Raises:
        CheckpointError: A file cannot be moved.
    """
    with failing_as(place, "cannot be moved into place"):
        sync_tree(partial)
        if partial.parent == place:
            for file in sorted(partial.iterdir(), key=_weights_last):
                os.replace(file, place / file.name)
            partial.rmdir()
            sync(place)
        else:
            os.rename(partial, place)
        sync(place.parent)


def _weights_last(file: Path) -> tuple[bool, bool, str]:
    return file.name.endswith(".index.json"), file.name.endswith(".safetensors"), file.name
