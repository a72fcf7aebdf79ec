"""The model that adapters are trained on: where it lies, and what tells it from any other without reading all of it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from partita.checkpoint.find import find_model
from partita.checkpoint.header import TensorInfo, open_regular, read_bytes
from partita.checkpoint.index import open_checkpoint
from partita.core.model.spec import read_config
from partita.errors import CheckpointError, ModelError

MAX_TENSORS = 256
"""Of how many tensors the data is looked at, dealt out evenly over their names."""

_HEAD_BYTES = 4096
"""How much of each: training leaves no tensor's beginning as it was."""


@dataclass(frozen=True)
class Base:
    """A model on disk.

    Attributes:
        path: Its folder, or its id on the hub.
        sha256: Of its config, of the names, dtypes and shapes of its tensors, and of where the data of some begins. It does not
            depend on how many files they lie in.
    """

    path: str
    sha256: str

    @classmethod
    def of(cls, model: str | os.PathLike[str]) -> Base:
        """What a folder or a hub id is now; of a training run's folder, its newest checkpoint.

        Raises:
            PartitaError: There is no such model, or it has no weights.
        """
        return cls(place_of(model), _digest(find_model(model)))

    def find(self, model: str | os.PathLike[str] | None = None) -> Path:
        """The folder of this model, which may lie elsewhere by now, at `model`.

        Raises:
            CheckpointError: It is not there, or it is another.
        """
        place = self.path if model is None else model
        try:
            folder = find_model(place)
            found = _digest(folder)
        except (ModelError, CheckpointError) as error:
            raise CheckpointError(
                f"the adapters of this run belong to {self.path}, but it cannot be read: {str(error).rstrip('.')}. Put it "
                "back, or give its new place with --model."
            ) from error
        if found != self.sha256:
            raise CheckpointError(
                f"the adapters of this run belong to {self.path} as it was when they were begun, but {place} is another model: "
                "its config, its tensors or their data differ. Put it back, or give its new place with --model."
            )
        return folder


def place_of(model: str | os.PathLike[str]) -> str:
    """How a model is found again from any folder: an id on the hub as it is, of a training run its newest checkpoint.

    Raises:
        PartitaError: There is no such model.
    """
    return os.path.realpath(find_model(model)) if Path(model).exists() else str(model)


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
