"""Folders of pickled weights (`pytorch_model.bin`), read without running their code, to convert them."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from partita.checkpoint.header import brief
from partita.errors import CheckpointError

SUFFIXES = (".bin", ".pt", ".pth")

_STEM = "pytorch_model"


def pickled_files(source: Path) -> list[Path]:
    """The files of pickled weights of a model, or that file itself; empty if there are none.

    Raises:
        CheckpointError: Files that the index names are missing.
    """
    if source.is_file():
        return [source] if source.suffix in SUFFIXES else []
    index = source / f"{_STEM}.bin.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: must map tensors to files (weight_map). Download it again.") from error
        missing = [name for name in names if not (source / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{index}: all {len(names)} files it names must be in the folder, but {len(missing)} are missing: "
                f"{brief(missing)}: finish the download or the copy."
            )
        return [source / name for name in names]
    return sorted(source.glob(f"{_STEM}*.bin"))


def read_pickled(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a pickled file by name, on the CPU; where the format allows it their data is read when it is used.

    Only tensors and plain values are unpickled (torch's `weights_only`).

    Raises:
        CheckpointError: The file holds code or something else than tensors by name, or cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what cannot be read is an error here
            try:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # an older format, which cannot be mapped
                found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: holds other objects than tensors, which could run code when they are read, so it is not read: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read: {' '.join(str(error).split())[:200]}. Download it again."
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(
            f"{file}: must hold tensors by name, as transformers saves a model, but holds {type(found).__name__} with other "
            "values: a checkpoint of a training run? Give the file of the model's weights."
        )
    return found
