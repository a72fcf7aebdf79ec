"""AdamW's running means of gradients and of their squares, read from the unsplit checkpoint of a run of either engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.checkpoint.header import TensorInfo
from partita.checkpoint.index import open_checkpoint
from partita.checkpoint.manifest import OPTIMIZER
from partita.checkpoint.read import Reader
from partita.errors import CheckpointError
from partita.mlx.adapt import adapter_places
from partita.mlx.apply import local_ranges, plan_of
from partita.mlx.homes import Ranges
from partita.mlx.names import DTYPES, Box
from partita.mlx.optimizer import AdamW
from partita.mlx.origin import Origin
from partita.mlx.together import together
from partita.mlx.trainable import Trainable
from partita.training.resume import refuse_left_out
from partita.training.saving import MOMENTS, moments_in
from partita.training.state import read_state

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def moments_of(optimizer: AdamW) -> dict[str, dict[str, mx.array]]:
    """An optimizer's state by what it is called on disk."""
    return dict(zip(MOMENTS, (optimizer.means, optimizer.squares), strict=True))


def restore_optimizer(model: nn.Module, trainable: Trainable, optimizer: AdamW, folder: Path) -> None:
    """Give an optimizer the state that it had when a checkpoint was written; every rank calls it.

    Args:
        model: What it trains, in any layout, loaded from the same checkpoint.
        trainable: What of it.
        optimizer: One that has not stepped yet.
        folder: The checkpoint.

    Raises:
        CheckpointError: The checkpoint has no such state, or not of all parameters, or of some that the model leaves out.
    """
    plan, groups = plan_of(model)
    origin: Origin = model.partita_origin
    with together(groups):
        adapters = adapter_places(model)
        boxes, checkpoint = origin.boxes() | dict(adapters.boxes), open_checkpoint(folder, stem=OPTIMIZER)
        run = read_state(folder)
    mine = sorted({box.name for name in trainable.names for box in boxes[name]})
    now = [name for names in groups.pp.all_gather_object(mine) for name in names]
    with together(groups), Reader(checkpoint) as reader:
        refuse_left_out(folder, moments_in(checkpoint, MOMENTS[0]), now)
        optimizer.steps = {name: run.count(name, [box.name for box in boxes[name]]) for name in trainable.names}
        for kind, moments in moments_of(optimizer).items():
            for name, (home, key) in trainable.homes.items():
                array = home[key]
                _check(folder, kind, name, boxes[name], array.dtype, checkpoint.tensors)
                ranges = adapters.held.get(name) or local_ranges(home, key, name, plan, groups.tp.rank)
                ranges = ranges or tuple(((0, size),) for size in array.shape)
                moments[name] = read_array(reader, f"{kind}.", boxes[name], ranges, array.dtype)


def _check(
    folder: Path, kind: str, name: str, boxes: tuple[Box, ...], dtype: mx.Dtype, infos: Mapping[str, TensorInfo]
) -> None:
    for box in boxes:
        info = infos.get(f"{kind}.{box.name}")
        if info is None:
            raise CheckpointError(
                f"{folder}: has no {kind}.{box.name}, so {name} was not trained in that run. Train what it trained."
            )
        if DTYPES[info.dtype] != dtype:
            raise CheckpointError(
                f"{folder}: {kind}.{box.name} is {info.dtype}, but {name} was loaded as {dtype}. Load it in its own dtype."
            )


def read_array(reader: Reader, prefix: str, boxes: tuple[Box, ...], ranges: Ranges, dtype: mx.Dtype) -> mx.array:
    """The local part of an array, whose axes run as those of the model's do.

    Args:
        reader: Of the checkpoint.
        prefix: What stands before the names of `boxes` there.
        boxes: Where it lies.
        ranges: What of it this rank has.
        dtype: Of the tensors there.
    """
    there = np.empty([sum(b - a for a, b in one) for one in ranges], _BITS[dtype.size])
    for box in boxes:
        overlap = box.overlap(ranges)
        if overlap is None:
            continue
        take, put = overlap
        on_disk = np.empty([sum(b - a for a, b in one) for one in take], there.dtype)
        reader.read(f"{prefix}{box.name}", take, memoryview(on_disk).cast("B"))  # type: ignore[arg-type]
        kept = [axis for axis in box.axes if axis is not None]
        dropped = tuple(axis for axis in range(on_disk.ndim) if axis not in kept)
        moved = np.transpose(np.squeeze(on_disk, dropped), np.argsort(np.argsort(kept)))
        new = tuple(place for place, axis in enumerate(box.axes) if axis is None)
        there[tuple(slice(a, b) for a, b in put)] = np.expand_dims(moved, new)
    with mx.stream(mx.cpu):
        array = mx.array(there).view(dtype)
        mx.eval(array)
    return array
