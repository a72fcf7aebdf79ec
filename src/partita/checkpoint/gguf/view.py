"""A GGUF model as a folder in Hugging Face's form without weights, whose index says where they are in the GGUF files.

The folder is in the user's cache, and made once: config, generation settings, what a tokenizer is made of, the index, and the
few small tensors whose values differ from the file's. So whatever takes a model's folder takes a GGUF file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from partita.checkpoint.durable import failing_as
from partita.checkpoint.gguf.choose import PART, models_of
from partita.checkpoint.gguf.config import config_of, generation_config
from partita.checkpoint.gguf.facts import Facts, floats
from partita.checkpoint.gguf.file import PLAIN, GgufFile, is_gguf, read_gguf
from partita.checkpoint.gguf.names import Changed, GgufInfo, Groups, Order, named
from partita.checkpoint.header import (
    TensorInfo,
    brief,
    encode_header,
    open_regular,
    parse_json,
    read_bytes,
    read_header,
    reason,
)
from partita.errors import CheckpointError, ModelError
from partita.user_cache import cache_folder

INDEX = "model.gguf.index.json"
TOKENIZER = "gguf_tokenizer.json"

_CHANGED = "changed.safetensors"
_FORM = 3
"""Increased whenever the content of a view changes, so that older ones are made again."""

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that `path` is or, for a folder without other weights, the only model in it; else None.

    Raises:
        ModelError: The folder holds several models.
    """
    if is_gguf(path):
        return path
    if not path.is_dir() or (path / INDEX).exists():
        return None
    present = sorted(os.listdir(path))
    models = models_of(present)
    if not models or any(name.endswith((".safetensors", ".safetensors.index.json")) for name in present):
        return None
    if len(models) > 1:
        raise ModelError(f"{path} holds {len(models)} models as GGUF files: {', '.join(models)}. Give the file of one.")
    return path / next(iter(models))


def view_of(path: Path) -> Path:
    """The folder in the cache for the model of a GGUF file, or of all parts of which it is one; made if it is not there.

    Several processes may call it at once.

    Raises:
        CheckpointError: A part is missing or damaged, the architecture is not known, or the cache cannot be written.
    """
    parts = _parts(path)
    with failing_as(path, "cannot be read"):
        marks = [[os.path.realpath(part), part.stat().st_size, part.stat().st_mtime_ns] for part in parts]
    digest = hashlib.sha256(json.dumps([_FORM, marks]).encode()).hexdigest()[:20]
    folder = cache_folder() / "gguf" / f"{parts[0].stem[:80]}-{digest}"
    if (folder / INDEX).exists():
        return folder
    content = _content(parts, marks)
    with failing_as(folder, "cannot be written (the cache; PARTITA_CACHE names another)"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{digest}-"))
        try:
            made.chmod(0o755)
            for name, data in content.items():
                (made / name).write_bytes(data)
            try:
                made.rename(folder)
            except OSError:
                if not (folder / INDEX).exists():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def read_view(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a view by name.

    Raises:
        CheckpointError: The index is malformed, or a GGUF file is missing or another than when the view was made.
    """
    index = folder / INDEX
    fd, size_bytes = open_regular(index)
    try:
        data: Any = parse_json(read_bytes(fd, index, 0, size_bytes), f"{index}: the index")
    finally:
        os.close(fd)
    files = [Path(path) for path, _, _ in data["files"]]
    for file, (_, file_bytes, mtime_ns) in zip(files, data["files"], strict=True):
        try:
            status = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {reason(error)}. Put the GGUF file back.") from error
        if (status.st_size, status.st_mtime_ns) != (file_bytes, mtime_ns):
            raise CheckpointError(f"{file}: has changed since its index was made. Give the GGUF file again.")
    tensors: dict[str, TensorInfo] = {}
    for name, (place, dtype, shape, start, end, order, transposed, other) in data["tensors"].items():
        second = None if other is None else TensorInfo(files[other[0]], name, dtype, tuple(shape), *other[1:])
        tensors[name] = GgufInfo(
            files[place], name, dtype, tuple(shape), start, end, _order_of(order), transposed, second
        )
    if (folder / _CHANGED).exists():
        tensors |= read_header(folder / _CHANGED).tensors
    return tensors


def _order_of(fields: list[Any] | None) -> Order | Groups | None:
    """The order of rows whose fields are in an index."""
    if fields is None:
        return None
    first, second = fields
    return Groups(first, tuple(second)) if isinstance(first, int) else Order(tuple(first), tuple(second))


def _parts(path: Path) -> list[Path]:
    """All files of the model that one file is a part of, in order."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}{path.suffix}") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing or not parts:
        raise CheckpointError(
            f"{path.parent}: all {count} parts of {match[1]} must be in the folder, but {len(missing)} are missing: "
            f"{brief(missing)}. Finish the download or the copy."
        )
    return parts


def _content(parts: list[Path], marks: list[list[Any]]) -> dict[str, bytes]:
    """The files of a view by name."""
    read = [read_gguf(part) for part in parts]
    facts = _facts(read)
    config = config_of(facts)
    tensors: dict[str, list[Any]] = {}
    changed: dict[str, Changed] = {}
    places = {part.file: place for place, part in enumerate(read)}
    for name, found in named(facts, config):
        if name in tensors or name in changed:
            raise CheckpointError(
                f"{facts.file}: {brief(name)} is there twice, under two names. Download the file again."
            )
        if isinstance(found, Changed):
            changed[name] = found
            continue
        order, other = found.order, found.other
        tensors[name] = [
            places[found.file], found.dtype, found.shape, found.start_bytes, found.end_bytes,
            None if order is None else astuple(order), found.transposed,
            None if other is None else [places[other.file], other.start_bytes, other.end_bytes],
        ]  # fmt: skip
    quantization: dict[str, Any] = {"quant_method": "gguf"}
    kinds = Counter[str]()
    for info in facts.tensors.values():
        kinds[info.dtype] += math.prod(info.shape)
    packed = [kind for kind, _ in kinds.most_common() if kind not in PLAIN]
    plain = [kind for kind, _ in kinds.most_common() if kind in PLAIN]
    if packed:
        quantization["type"] = packed[0]
    config |= {"dtype": _DTYPES[plain[0]] if plain else "float32", "quantization_config": quantization}
    tokenizer = {key: value for key, value in facts.metadata.items() if key.startswith("tokenizer.")}
    content: dict[str, Any] = {
        "config.json": config, "generation_config.json": generation_config(facts), INDEX: {"files": marks, "tensors": tensors}
    }  # fmt: skip
    if "tokenizer.ggml.tokens" in tokenizer:
        content[TOKENIZER] = {"architecture": facts.architecture, **tokenizer}
    made = {name: (json.dumps(data, ensure_ascii=True) + "\n").encode() for name, data in content.items()}
    if changed:
        made[_CHANGED] = _changed_file(facts, changed)
    return made


def _facts(read: list[GgufFile]) -> Facts:
    """The metadata of the first part, and the tensors of all."""
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(read):
        for name, info in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{part.file}: {brief(name)} is in {tensors[name].file.name} too: parts of two models?"
                )
            tensors[name] = info
        for key, expected in (("split.count", len(read)), ("split.no", number)):
            if len(read) > 1 and part.metadata.get(key, expected) != expected:
                raise CheckpointError(
                    f"{part.file}: {key} must be {expected}, but is {brief(part.metadata[key])}: it is a part of another model."
                )
    first = read[0]
    total = first.metadata.get("split.count", 1)
    if len(read) == 1 and type(total) is int and total > 1:
        raise CheckpointError(
            f"{first.file}: is a part of {total}, but its name does not say which (NAME-00001-of-{total:05d}.gguf). Give all "
            "parts their original names."
        )
    return Facts(first.file, first.metadata, tensors, _data)


def _data(info: TensorInfo) -> bytes:
    fd, _ = open_regular(info.file)
    try:
        return read_bytes(fd, info.file, info.start_bytes, info.nbytes)
    finally:
        os.close(fd)


def _changed_file(facts: Facts, changed: Mapping[str, Changed]) -> bytes:
    """A safetensors file of the changed tensors, in float32."""
    names = sorted(changed)
    header, _ = encode_header([(name, "F32", changed[name].shape) for name in names], {"format": "pt"})
    data = []
    for name in names:
        one = changed[name]
        for info in one.infos:
            if info.dtype not in PLAIN:
                raise CheckpointError(
                    f"{facts.file}: {brief(info.name)} must be {', '.join(PLAIN)}, but is {info.dtype}. Take a file of the "
                    "model in which it is."
                )
        # Rounding a float64 difference to float32 gives the float32 difference.
        values = one.change(*(floats(_data(info), info.dtype) for info in one.infos))
        data.append(struct.pack(f"<{len(values)}f", *values))
    return header + b"".join(data)
