"""The model that adapters are trained on: its place, and a digest that identifies it without reading all of it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from partita.checkpoint.find import find_model
from partita.checkpoint.gguf.view import gguf_of
from partita.checkpoint.header import TensorInfo, open_regular, read_bytes
from partita.checkpoint.index import open_checkpoint
from partita.core.model.spec import read_config
from partita.errors import CheckpointError, ModelError

MAX_TENSORS = 256
"""The number of tensors whose data is read, spaced evenly over their names."""

_HEAD_BYTES = 4096
"""The bytes read of each: training changes the beginning of every tensor."""


@dataclass(frozen=True)
class Base:
    """A model on disk.

    Attributes:
        path: Its folder, or its id on the hub.
        sha256: Digest of its config, of the names, dtypes and shapes of its tensors, and of the first data of some. It does not
            depend on the number of files.
    """

    path: str
    sha256: str

    @classmethod
    def of(cls, model: str | os.PathLike[str]) -> Base:
        """The model that a folder or a hub id now holds; for a training run's folder, its newest checkpoint.

        Raises:
            PartitaError: The model does not exist, or has no weights.
        """
        return cls(place_of(model), _digest(find_model(model)))

    def find(self, model: str | os.PathLike[str] | None = None) -> Path:
        """The folder of this model, which may have moved to `model`.

        Raises:
            CheckpointError: It does not exist, or holds another model.
        """
        place = self.path if model is None else model
        try:
            folder = find_model(place)
            found = _digest(folder)
        except (ModelError, CheckpointError) as error:
            raise CheckpointError(
                f"the adapters of this run belong to {self.path}, but it cannot be read: {str(error).rstrip('.')}. Move it "
                "back, or give its new place with --model."
            ) from error
        if found != self.sha256:
            raise CheckpointError(
                f"the adapters of this run belong to {self.path} as it was when the run started, but {place} is another model: "
                "its config, its tensors or their data differ. Move it back, or give its new place with --model."
            )
        return folder


def place_of(model: str | os.PathLike[str]) -> str:
    """A reference to a model that is valid in any folder: a hub id unchanged, for a training run its newest checkpoint.

    Raises:
        PartitaError: The model does not exist.
    """
    if not Path(model).exists():
        return str(model)
    # What a GGUF file stands for is in a cache, which may be removed.
    return os.path.realpath(gguf_of(Path(model)) or find_model(model))


def _digest(folder: Path) -> str:
    total = hashlib.sha256(json.dumps(read_config(folder), sort_keys=True).encode())
    tensors = sorted(open_checkpoint(folder).tensors.values(), key=lambda info: info.name)
    total.update(json.dumps([(info.name, info.dtype, info.shape) for info in tensors]).encode())
    for info in tensors[:: -(-len(tensors) // MAX_TENSORS) or 1]:
        total.update(_head(info))
    return total.hexdigest()


def _head(info: TensorInfo) -> bytes:
    fd, _ = open_regular(info.file)
    try:
        return read_bytes(fd, info.file, info.start_bytes, min(info.nbytes, _HEAD_BYTES))
    finally:
        os.close(fd)
