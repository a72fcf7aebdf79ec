"""The optimizer's moments and master weights, read from the unsplit checkpoint of a run of either engine."""

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
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.model.parts import Ranges, local_ranges, plan_of
from partita.mlx.model.trainable import Trainable
from partita.mlx.training.optimizer import Optimizer
from partita.mlx.weights.adapter_places import adapter_places
from partita.mlx.weights.names import DTYPES, Box
from partita.mlx.weights.origin import Origin
from partita.training.resume import refuse_left_out
from partita.training.saving import HAS_MASTER, MASTER, OTHER_DTYPE, trained_in
from partita.training.state import read_state

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def state_of(optimizer: Optimizer, dtype: mx.Dtype) -> dict[str, dict[str, mx.array]]:
    """Names on disk of the arrays that an optimizer keeps for arrays of `dtype`."""
    return optimizer.moments | ({MASTER: optimizer.masters} if optimizer.state_dtype(dtype) != dtype else {})


def initial_state(kind: str, array: mx.array, optimizer: Optimizer) -> mx.array:
    """An optimizer's initial state of an array, by name on disk."""
    wide = array.astype(optimizer.state_dtype(array.dtype))
    return wide if kind == MASTER else mx.zeros_like(wide)


def restore_optimizer(model: nn.Module, trainable: Trainable, optimizer: Optimizer, folder: Path) -> None:
    """Give an optimizer the state that it had when a checkpoint was written. Every rank must call it.

    If the checkpoint has no master weight for an array, the array in float32 is used.

    Args:
        model: The model that it trains, in any layout, loaded from the same checkpoint.
        trainable: Its trainable arrays.
        optimizer: An optimizer that has not stepped yet.
        folder: The checkpoint.

    Raises:
        CheckpointError: The checkpoint has no such state, lacks some parameters, has parameters that the model lacks, or
            has another dtype for a parameter.
    """
    plan, groups = plan_of(model)
    origin: Origin = model.partita_origin
    with collective_errors(groups):
        adapters = adapter_places(model)
        boxes, checkpoint = origin.boxes() | dict(adapters.boxes), open_checkpoint(folder, stem=OPTIMIZER)
        run = read_state(folder)
    mine = sorted({box.name for name in trainable.names for box in boxes[name]})
    now = [name for names in groups.pp.all_gather_object(mine) for name in names]
    with collective_errors(groups), Reader(checkpoint) as reader:
        refuse_left_out(folder, trained_in(checkpoint), now)
        optimizer.steps = {name: run.count(name, [box.name for box in boxes[name]]) for name in trainable.names}
        for name, (home, key) in trainable.homes.items():
            array = home[key]
            for kind, state in state_of(optimizer, array.dtype).items():
                dtype = _dtype_of(folder, kind, name, boxes[name], array.dtype, optimizer, checkpoint.tensors)
                if dtype is None:
                    state[name] = initial_state(kind, array, optimizer)
                    continue
                ranges = adapters.held.get(name) or local_ranges(home, key, name, plan, groups.tp.rank)
                ranges = ranges or tuple(((0, size),) for size in array.shape)
                found = read_array(reader, f"{kind}.", boxes[name], ranges, dtype)
                state[name] = found.astype(optimizer.state_dtype(array.dtype))


def _dtype_of(
    folder: Path,
    kind: str,
    name: str,
    boxes: tuple[Box, ...],
    dtype: mx.Dtype,
    optimizer: Optimizer,
    infos: Mapping[str, TensorInfo],
) -> mx.Dtype | None:
    """The dtype of the state `kind` of an array of `dtype` in a checkpoint; None for a master weight that it lacks.

    Raises:
        CheckpointError: It has no such state, or one for another dtype.
    """
    wide = optimizer.state_dtype(dtype)
    for box in boxes:
        if kind != MASTER and f"{kind}.{box.name}" not in infos:
            raise CheckpointError(
                f"{folder}: has no {kind}.{box.name}, so {name} was not trained in that run. Train the same parameters."
            )
        has_master, moment = f"{MASTER}.{box.name}" in infos, infos[f"{next(iter(optimizer.moments))}.{box.name}"]
        if has_master and wide == dtype:
            raise CheckpointError(HAS_MASTER.format(folder, f"{MASTER}.{box.name}", name, dtype))
        if DTYPES[moment.dtype] != (wide if has_master else dtype):
            raise CheckpointError(OTHER_DTYPE.format(folder, moment.name, moment.dtype, name, dtype))
    info = infos.get(f"{kind}.{boxes[0].name}")
    return None if info is None else DTYPES[info.dtype]


def read_array(reader: Reader, prefix: str, boxes: tuple[Box, ...], ranges: Ranges, dtype: mx.Dtype) -> mx.array:
    """Read the local part of an array, with the axis order of the model's array.

    Args:
        reader: Reader of the checkpoint.
        prefix: Prefix of the names of `boxes` on disk.
        boxes: Where the array is stored.
        ranges: The ranges that this rank holds.
        dtype: dtype of the tensors on disk.
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
