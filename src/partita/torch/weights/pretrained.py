"""transformers' `save_pretrained` on a split model, and loading a checkpoint into a model that is split already."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from partita.checkpoint.find import find_model
from partita.checkpoint.index import open_checkpoint
from partita.checkpoint.read import Reader
from partita.errors import CheckpointError, ModelError
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.parts import is_split, local_tensors, plan_of
from partita.torch.weights.fill import CheckpointFill
from partita.torch.weights.names import sources_for_reading
from partita.torch.weights.save import save, unsplit_on_meta

_IGNORED = {"is_main_process", "save_function", "safe_serialization", "token", "save_original_format"}
"""Arguments of `save_pretrained` that decide nothing here: all ranks write safetensors."""


def with_save_pretrained(model: nn.Module) -> nn.Module:
    """Make `model.save_pretrained(folder)` write the unsplit model of all ranks, where the model has that method."""
    if is_split(model) and hasattr(type(model), "save_pretrained"):
        model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[assignment]
    return model


def _save_pretrained(model: nn.Module, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """Write the unsplit model. Every rank must call it.

    Raises:
        ModelError: An option is given that cannot be followed.
    """
    size = _bytes(options.pop("max_shard_size", "5GB"))
    for name, value in options.items():
        if name not in _IGNORED and value not in (None, False):
            raise ModelError(
                f"save_pretrained of a split model has no option {name!r}. Leave it out, or call partita.torch.save."
            )
    with replacing(Path(save_directory), plan_of(model)[1]):
        save(model, save_directory, max_shard_bytes=size)


@contextlib.contextmanager
def replacing(folder: Path, groups: ParallelGroups) -> Iterator[None]:
    """Set the weights in a folder aside while the block writes others there, as transformers overwrites them.

    They are removed if the block succeeds, and put back if it fails. Every rank must call it.
    """
    aside = folder / ".replaced"
    with collective_errors(groups):
        old = _weights(folder) if groups.rank == 0 else []
        if old:
            aside.mkdir(exist_ok=True)
        for file in old:
            file.replace(aside / file.name)
    try:
        yield
    except BaseException:
        for file in old:
            (aside / file.name).replace(file)
        raise
    finally:
        if old:
            shutil.rmtree(aside, ignore_errors=True)


def _weights(folder: Path) -> list[Path]:
    return [file for suffix in ("", ".index.json") for file in folder.glob(f"*.safetensors{suffix}")]


def _bytes(size: int | str) -> int:
    """A number of bytes such as 500 or "5GB", as transformers reads it."""
    if isinstance(size, int):
        return size
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+)([KMGT]I?B)", size.strip().upper())
    if match is None or match[2] not in units:
        raise ModelError(f'max_shard_size must be a number of bytes or a text such as "5GB"; got {size!r}.')
    return int(match[1]) * units[match[2]]


@torch.no_grad()
def load_into(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Replace the weights of a split model by those of a checkpoint of the same model. Every rank must call it.

    Each rank reads its own byte ranges.

    Args:
        model: A result of `load`, `shard` or `fresh`.
        folder: A folder in Hugging Face's format, that any layout saved.

    Raises:
        CheckpointError: The checkpoint lacks a tensor of the model, or is of another model; on every rank.
    """
    plan, groups = plan_of(model)
    with collective_errors(groups):
        checkpoint = open_checkpoint(find_model(folder))
        unsplit = unsplit_on_meta(model, plan)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        sources, _ = sources_for_reading(unsplit, shapes)
        with Reader(checkpoint) as reader:
            fill = CheckpointFill(reader, checkpoint.tensors, sources, unsplit)
            for name, tensor in local_tensors(model, plan).items():
                tied_to = plan.spec.tensors[name].tied_to
                stored = name if name in sources else tied_to or name
                if stored not in sources:
                    raise CheckpointError(
                        f"{Path(folder)}: has no tensor {name} of the model. Use a checkpoint of this model."
                    )
                fill(stored, plan.tensor(name), groups.part(plan.tensor(name)), tensor)
