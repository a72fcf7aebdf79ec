"""A model's facts from its checkpoint: names and shapes from the headers, heads from the config beside it."""

from __future__ import annotations

import os
from pathlib import Path

from partita.checkpoint.index import open_checkpoint
from partita.core.model_spec import ModelSpec, TensorSpec, read_config, spec_from_tensors

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def spec_from_checkpoint(path: str | os.PathLike[str]) -> ModelSpec:
    """The facts of a model on disk, of which only headers are read; tensors have their names on disk.

    Without a `config.json` beside the weights the head counts are 0: unknown.

    Raises:
        CheckpointError: The files are missing or malformed.
        ModelError: The config is not one.
    """
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.folder) if (Path(checkpoint.folder) / "config.json").exists() else None
    tensors = {
        name: TensorSpec(name, info.shape, is_buffer=info.dtype not in _DTYPES and not info.dtype.startswith("F8"))
        for name, info in checkpoint.tensors.items()
    }
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype], default="F32")
    return spec_from_tensors(tensors, config, dtype=_DTYPES.get(most, "float32"))
