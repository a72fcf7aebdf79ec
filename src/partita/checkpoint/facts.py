"""The spec of a model from its checkpoint: names and shapes from the headers, heads from the config beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from partita.checkpoint.index import Checkpoint, open_checkpoint
from partita.core.model.quantization import is_scale, method_of, with_quantization, with_stored_bytes
from partita.core.model.spec import ModelSpec, TensorSpec, read_config, spec_from_tensors
from partita.errors import CheckpointError

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def spec_from_checkpoint(path: str | os.PathLike[str]) -> ModelSpec:
    """The spec of a model on disk, from the headers alone; tensors have their names on disk.

    Without a `config.json` beside the weights the head counts are 0: unknown.

    Raises:
        CheckpointError: The files are missing or malformed.
        ModelError: The config is malformed.
    """
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.folder) if (Path(checkpoint.folder) / "config.json").exists() else None
    tensors = {
        name: TensorSpec(name, info.shape, is_buffer=info.dtype not in _DTYPES and not info.dtype.startswith("F8"))
        for name, info in checkpoint.tensors.items()
    }
    return spec_from_tensors(tensors, config, dtype=stored_dtype(checkpoint) or "float32")


def stored_dtype(checkpoint: Checkpoint, parts: Collection[str] = ()) -> str | None:
    """The floating dtype of most elements of a checkpoint, or None if it has no floating tensor.

    Few tensors may be wider than the rest (a router's bias), and eight-bit floats need scales to be numbers.

    Args:
        checkpoint: The checkpoint.
        parts: Its tensors that do not count: codes and scales of quantized weights.
    """
    counts: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype in _DTYPES and info.name not in parts:
            counts[info.dtype] = counts.get(info.dtype, 0) + math.prod(info.shape)
    return _DTYPES[max(counts, key=lambda dtype: counts[dtype])] if counts else None


def stored_dtype_at(path: Path) -> str | None:
    """The `stored_dtype` of the checkpoint in a folder; None if none can be read."""
    try:
        if not path.is_dir():
            return None
        checkpoint = open_checkpoint(path)
        return stored_dtype(checkpoint, {name for name in checkpoint.tensors if is_scale(name)})
    except CheckpointError:
        return None


def with_sizes(spec: ModelSpec, path: Path) -> ModelSpec:
    """`spec` with the bytes of quantized weights, if it has any: those of the headers in folder `path`, else of the config."""
    try:
        checkpoint = open_checkpoint(path) if path.is_dir() else None
    except CheckpointError:
        checkpoint = None
    packed = checkpoint is not None and any(info.dtype.startswith(("F8", "F4")) for info in checkpoint.tensors.values())
    if checkpoint is not None and (packed or method_of(spec.config)):
        return with_stored_bytes(spec, {name: info.nbytes for name, info in checkpoint.tensors.items()})
    return with_quantization(spec)


def quantization_note(spec: ModelSpec) -> str:
    """The note to print if a config names a quantization whose bytes are not known; empty if they are known."""
    method = method_of(spec.config)
    if not method or spec.is_packed:
        return ""
    return (
        f"config.json says that the weights are quantized ({method}), but not how many bytes they have: the sizes are those of "
        f"{spec.dtype}. Give the folder with the weights."
    )


def dtype_note(path: Path, stored: str | None, config: Mapping[str, Any]) -> str:
    """The note to print if a config names a dtype other than that of the weights; empty if it does not."""
    named = str(config.get("dtype") or config.get("torch_dtype") or stored).removeprefix("torch.")
    if stored is None or named == stored:
        return ""
    return f"{path}: the weights are {stored}, but config.json says {named}: {stored} is used."
