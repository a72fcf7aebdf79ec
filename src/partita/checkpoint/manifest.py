"""Manifest: the files of a checkpoint with their sizes and digests, by which a reader checks that it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from partita.checkpoint.header import brief, open_regular, parse_json, reason
from partita.errors import CheckpointError

MANIFEST_NAME = "manifest.json"

OPTIMIZER = "optimizer"
"""The prefix of the names of the optimizer's state files."""

_CHUNK_BYTES = 4 << 20
_MAX_THREADS = 4


@dataclass(frozen=True)
class Digest:
    """A file's size in bytes and its SHA-256, in hexadecimal."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint: the digest of each, by its path in the folder."""

    files: Mapping[str, Digest]

    def to_json(self) -> str:
        """The text of `manifest.json`; files in the order of their names."""
        files = {name: {"size": one.size_bytes, "sha256": one.sha256} for name, one in sorted(self.files.items())}
        return json.dumps({"partita_manifest": 1, "files": files}, indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: There is none, or it was not written by Partita.
    """
    file = folder / MANIFEST_NAME
    if not file.exists():
        raise CheckpointError(f"{folder}: has no {MANIFEST_NAME}, so it is not a complete checkpoint of a training run")
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {reason(error)}") from error
    data = parse_json(raw, f"{file}: the manifest")
    files = data.get("files")
    if data.get("partita_manifest") != 1 or not isinstance(files, dict):
        raise CheckpointError(f"{file}: must be a manifest with `partita_manifest: 1` and `files`, but is not")
    return Manifest(MappingProxyType({name: _entry(file, name, entry) for name, entry in files.items()}))


def _entry(file: Path, name: str, entry: object) -> Digest:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise CheckpointError(f"{file}: must name files in its own folder, but names {brief(name)}")
    if isinstance(entry, dict):
        size, sha256 = entry.get("size"), entry.get("sha256")
        if type(size) is int and isinstance(sha256, str):
            return Digest(size, sha256)
    raise CheckpointError(f"{file}: {brief(name)} must have a size and a sha256, but has {brief(entry)}")


def digest(file: Path) -> Digest:
    """Compute the digest of a file. Raises CheckpointError if it does not exist or cannot be read."""
    fd, _ = open_regular(file)
    try:
        total, size_bytes, chunk = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK_BYTES))
        while count := os.readv(fd, [chunk]):
            total.update(chunk[:count])
            size_bytes += count
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {reason(error)}") from error
    finally:
        os.close(fd)
    return Digest(size_bytes, total.hexdigest())


def digest_of(data: bytes) -> Digest:
    """The digest of a file that holds `data`."""
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def digests(folder: Path, names: Iterable[str]) -> dict[str, Digest]:
    """The digests of files of a folder, several at a time. Raises CheckpointError as `digest` does."""
    names = list(names)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: digest(folder / name), names), strict=True))


def deal(sizes_bytes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Distribute files over `parts` ranks with similar totals: the largest first, each to the rank with the smallest total.

    Source: Graham 1969, "Bounds on multiprocessing timing anomalies": at most 4/3 of the optimum.
    """
    dealt: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(sizes_bytes, key=lambda name: (-sizes_bytes[name], name)):
        least = loads.index(min(loads))
        dealt[least].append(name)
        loads[least] += sizes_bytes[name]
    return dealt


def check_model(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Raise CheckpointError if the model in a checkpoint of a run was changed; other folders have no manifest.

    The optimizer's state is not checked. The other arguments are those of `check_contents`.
    """
    if folder.is_dir() and _is_ours(folder):
        files = read_manifest(folder).files
        model = {name: one for name, one in files.items() if not name.startswith(OPTIMIZER)}
        check_contents(folder, Manifest(model), part, parts)


def _is_ours(folder: Path) -> bool:
    """Whether a folder has a manifest of Partita: other tools use the same file name."""
    try:
        with (folder / MANIFEST_NAME).open("rb") as file:
            return b'"partita_manifest"' in file.read(200)
    except OSError:
        return False


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError unless every file of a checkpoint exists with its size; contents are not read."""
    for name, expected in manifest.files.items():
        file = folder / name
        try:
            size_bytes = file.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{file}: is in the manifest, but cannot be found: {reason(error)}") from error
        if size_bytes != expected.size_bytes:
            raise CheckpointError(
                f"{file}: must have {expected.size_bytes} bytes, but has {size_bytes}: it is incomplete"
            )


def check_contents(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Raise CheckpointError unless files of a checkpoint have their original contents.

    Args:
        folder: The checkpoint's folder.
        manifest: Its manifest.
        part: The share of the files to read: the rank, if ranks divide the work.
        parts: Number of shares.
    """
    check_sizes(folder, manifest)
    mine = deal({name: one.size_bytes for name, one in manifest.files.items()}, parts)[part]
    for name, found in digests(folder, mine).items():
        if found != manifest.files[name]:
            raise CheckpointError(
                f"{folder / name}: must have the SHA-256 {manifest.files[name].sha256[:12]}..., but has {found.sha256[:12]}"
                "...: it was changed since it was written"
            )
