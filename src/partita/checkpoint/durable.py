"""What is written stays written: files and folders flushed to disk, and a folder that appears whole or not at all."""

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
    """Let an `OSError` inside be a CheckpointError that names `path`, or the file that the system names."""
    try:
        yield
    except OSError as error:
        named = os.fsdecode(error.filename) if error.filename is not None else path
        raise CheckpointError(f"{named}: {what}: {reason(error)}") from error


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Return when all that is in a folder is on disk. Raises OSError."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def write_whole(file: Path, data: bytes) -> None:
    """Write a small file so that it is the old one or the new one, never a part. Raises CheckpointError."""
    new = file.with_name(f".{file.name}.new")
    with failing_as(file, "cannot be written"):
        new.write_bytes(data)
        sync(new)
        os.replace(new, file)
        sync(file.parent)


def write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files, by their paths in a folder. Raises CheckpointError."""
    with failing_as(folder, "cannot be written"):
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def partial_of(place: Path) -> Path:
    """Where a checkpoint is written that is to appear at `place`: beside it, or inside it if it is there already.

    Inside, as what is there may be a file system of its own, into which nothing can be renamed.
    """
    return place / ".partial" if place.exists() else place.parent / f".{place.name}.partial"


def start_partial(place: Path) -> Path:
    """An empty folder for what is to appear at `place`; what an earlier attempt left there is removed.

    Raises:
        CheckpointError: It cannot be made.
    """
    partial = partial_of(place)
    with failing_as(partial, "cannot be made"):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    return partial


def appear(partial: Path, place: Path) -> None:
    """Flush the folder `partial` and give it its place, in one rename where nothing is there.

    Into a folder that is there its files move one by one, weights behind all others and their index last: until then no
    reader takes the folder for a whole model.

    Raises:
        CheckpointError: The system refuses.
    """
    with failing_as(place, "cannot be put in place"):
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
