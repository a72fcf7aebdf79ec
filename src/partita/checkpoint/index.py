"""A checkpoint: the safetensors files of one model, and the file of each tensor."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from partita.checkpoint.gguf.file import is_gguf
from partita.checkpoint.gguf.view import INDEX as GGUF_INDEX
from partita.checkpoint.gguf.view import read_view, view_of
from partita.checkpoint.header import (
    PICKLED,
    Header,
    TensorInfo,
    brief,
    open_regular,
    parse_json,
    read_bytes,
    read_header,
    reason,
)
from partita.errors import CheckpointError

MODEL = "model"
"""The prefix of the names of a model's weight files."""

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_MAX_INDEX_BYTES = 100_000_000
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OF_MODEL = re.compile(r"model[^/]*\.safetensors")
_SHARD = re.compile(r"(.*)-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """An unsplit model on disk: the checked headers of its files, and all its tensors by name.

    Attributes:
        folder: The folder of the files.
        files: Their headers; none for GGUF files.
        tensors: Their tensors by name.
        passed_over: Files of the folder that its index names, but that are not read.
    """

    folder: Path
    files: tuple[Header, ...]
    tensors: Mapping[str, TensorInfo]
    passed_over: tuple[str, ...] = ()

    def note(self) -> str:
        """The note to print when the checkpoint is read, or an empty text."""
        if not self.passed_over:
            return ""
        return (
            f"{self.folder}: {WEIGHTS_NAME} is read, as transformers does, and the files of {INDEX_NAME} beside it are not "
            f"({brief(list(self.passed_over))}). Remove those that you do not want."
        )


def weights_name(stem: str = MODEL) -> str:
    """The name of the file if one file holds all tensors of a kind."""
    return f"{stem}.safetensors"


def index_name(stem: str = MODEL) -> str:
    """The name of the index, which maps each tensor to one of several files."""
    return f"{stem}.safetensors.index.json"


def open_checkpoint(path: str | os.PathLike[str], *, stem: str = MODEL) -> Checkpoint:
    """Read the headers of a Hugging Face folder, or of one safetensors or GGUF file; data is not read.

    In a folder: `model.safetensors` if it exists, as in transformers, else the files of `model.safetensors.index.json`, else
    every `model*.safetensors`, else every `*.safetensors`; for another `stem` only the first two. An index is stale and
    ignored if none of its files exists, but other files of a model do. The index's total_size is ignored, since
    published ones are often wrong, and the headers have the sizes.
    Raises CheckpointError if a file is missing or malformed, or if the index and the files do not agree.
    """
    place = Path(path)
    if not os.fspath(path) or not os.path.exists(place):
        raise CheckpointError(f"{place}: does not exist: give a model's folder or a .safetensors file")
    if is_gguf(place):
        place = view_of(place)
    if not os.path.isdir(place):
        _refuse_pickled(place, [place.name])
        if place.suffix == ".json":
            raise CheckpointError(f"{place}: is a config, which has no weights: give the folder that holds both")
        return _merge(place.parent, [place.name])
    if stem == MODEL and (place / GGUF_INDEX).exists():
        return Checkpoint(place, (), MappingProxyType(read_view(place)))
    single, index = place / weights_name(stem), place / index_name(stem)
    if os.path.isfile(single):
        return replace(_merge(place, [single.name]), passed_over=_passed_over(index, single.name))
    if os.path.exists(index) and not (stem == MODEL and _is_stale(index)):
        weight_map = _read_index(index)
        checkpoint = _merge(place, sorted(set(weight_map.values())))
        _check_index(index, weight_map, checkpoint.tensors)
        return checkpoint
    if stem != MODEL:
        return _merge(place, [single.name])
    return _merge(place, _find_files(place))


def _passed_over(index: Path, single: str) -> tuple[str, ...]:
    """The files that an index names beside the one that is read. A malformed index is ignored and names none."""
    named: set[str] = set()
    if os.path.exists(index):
        with contextlib.suppress(CheckpointError):
            named = set(_read_weight_map(index).values()) - {single}
    return tuple(sorted(name for name in named if os.path.exists(index.parent / name)))


def _is_stale(index: Path) -> bool:
    """Whether an index names only missing files, while the folder holds other files of a model.

    Raises CheckpointError if it is malformed.
    """
    named = set(_read_weight_map(index).values())
    present = {name for name in os.listdir(index.parent) if _OF_MODEL.fullmatch(name)}
    return not named & present and bool(present)


def _merge(folder: Path, names: Sequence[str]) -> Checkpoint:
    files = tuple(read_header(folder / name) for name in names)
    tensors: dict[str, TensorInfo] = {}
    for header in files:
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: each tensor must be in one file, but {brief(name)} is in {tensors[name].file.name} and "
                    f"in {header.file.name}: these may be two models: give the file of one, or remove the other"
                )
            tensors[name] = info
    return Checkpoint(folder, files, MappingProxyType(tensors))


def _read_index(index: Path) -> dict[str, str]:
    """The index's weight_map, tensor to file. Every file is a plain name in the index's folder, and exists."""
    weight_map = _read_weight_map(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not os.path.exists(index.parent / name)]
    if missing:
        raise CheckpointError(
            f"{index}: all {len(names)} files it names must be in the folder, but {len(missing)} are missing: "
            f"{brief(missing)}: finish the download or the copy"
        )
    return weight_map


def _read_weight_map(index: Path) -> dict[str, str]:
    """The index's weight_map, tensor to file. Every file is a plain name in the index's folder."""
    fd, size_bytes = open_regular(index)
    try:
        if size_bytes > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{index}: must have at most {_MAX_INDEX_BYTES} bytes, but has {size_bytes}")
        raw = read_bytes(fd, index, 0, size_bytes)
    finally:
        os.close(fd)
    weight_map = parse_json(raw, f"{index}: the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensors to files, but is {brief(weight_map)}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise CheckpointError(
                f"{index}: tensor {brief(name)} must be in a file of this folder, named without a path, "
                f"but weight_map says {brief(file)}"
            )
    names = sorted(set(weight_map.values()))
    _refuse_pickled(index, names)
    return weight_map


def _check_index(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index}: tensor {brief(name)} must be in {brief(file)}, but that file does not hold it: "
                "the index and the files are of two versions: download both again"
            )
        if tensors[name].file.name != file:
            raise CheckpointError(
                f"{index}: tensor {brief(name)} must be in {brief(file)}, but is in {tensors[name].file.name}: "
                "the index and the files are of two versions: download both again"
            )
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"{index}: must list every tensor of its files, but {tensors[unlisted[0]].file.name} also holds "
            f"{brief(unlisted)}: the index and the files are of two versions: download both again"
        )


def _find_files(folder: Path) -> list[str]:
    """Every safetensors file of a folder that has no index."""
    try:
        present = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {reason(error)}") from error
    names = [name for name in present if name.endswith(".safetensors")]
    # Other files are the same weights in another form (consolidated.safetensors), or do not belong to the model.
    names = [name for name in names if _OF_MODEL.fullmatch(name)] or names
    if not names:
        _refuse_pickled(folder, [name for name in present if name.endswith(_PICKLED_SUFFIXES)])
        raise CheckpointError(f"{folder}: must hold a {INDEX_NAME} or *.safetensors files, but holds neither")
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    for stem, count in sorted({(match[1], int(match[3])) for match in shards}):
        there = {int(match[2]) for match in shards if (match[1], int(match[3])) == (stem, count)}
        if (len(there), min(there), max(there)) != (count, 1, count):
            raise CheckpointError(
                f"{folder}: {stem}-*-of-{count} must be {count} files, numbered from 1, but only "
                f"{brief(sorted(there))} are there, and no {INDEX_NAME}: finish the download or the copy"
            )
    return names


def _refuse_pickled(place: Path, names: Sequence[str]) -> None:
    pickled = [name for name in names if name.endswith(_PICKLED_SUFFIXES)]
    if pickled:
        verb = "are" if len(pickled) > 1 else "is"
        raise CheckpointError(f"{place}: must be safetensors, but {brief(pickled)} {verb} not: {PICKLED}")


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")
