"""Saving: each rank writes its own bytes of the unsplit checkpoint, under the names that it was read from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.checkpoint.unused import NOT_SAVED, Unused
from partita.checkpoint.write import FilePlan, Writer, plan_files, write_folder
from partita.core.plan import Plan
from partita.core.sharding.split import Range
from partita.errors import ModelError
from partita.generation import Tokenizer
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.model.parts import Ranges, local_ranges, parameter_homes, plan_of
from partita.mlx.stages.copies import elsewhere
from partita.mlx.weights.names import DTYPES, Box
from partita.mlx.weights.origin import Origin
from partita.notes import note
from partita.ranks.liveness import doing

DTYPE_NAMES: Mapping[mx.Dtype, str] = {dtype: name for name, dtype in reversed(list(DTYPES.items()))}
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@doing("saving the model")
def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the unsplit model of all ranks. Every rank of the run must call it.

    A loaded model is written with the names, order and config of its checkpoint, in Hugging Face's
    format, so the same tools can read it. A model that was split in memory gets mlx-lm's names. The result does not
    depend on how the model was split. The folder is created atomically: all files are written to a temporary folder, which is
    then renamed.

    Args:
        model: A result of `load` or `shard`.
        folder: Destination; created if needed. It must not hold weights already.
        tokenizer: Tokenizer to save with it.
        max_shard_bytes: Maximum size of one file.
        progress: Called with the bytes that this rank has written and their total.

    Raises:
        CheckpointError: The folder holds a model already, or cannot be written.
        ModelError: The model has arrays that the unsplit model lacks, such as adapters.

    Examples:
        >>> model = pm.load("./model", tp=2)
        >>> pm.save(model, "./trained")  # AutoModelForCausalLM.from_pretrained reads it
    """
    plan, groups = plan_of(model)
    disk = on_disk(model)
    path = Path(folder)
    with collective_errors(groups):
        files = disk.files(max_shard_bytes)

    def write(writer: Writer) -> None:
        own = disk.own(model, plan, groups)
        total = sum(home[key].nbytes for home, key in own.values())
        for name, (home, key) in own.items():
            for box, take, data in disk.parts(name, home, key, home[key], plan, groups):
                writer.write(box, take, data)
            if progress is not None:
                progress(writer.bytes_written, total)
        disk.unused.copy(writer.write, groups.pp.rank * plan.mesh.tp + groups.tp.rank, plan.mesh.pp * plan.mesh.tp)

    write_folder(
        path, groups, files, lambda made: disk.write_beside(made, tokenizer), write,
        partial(collective_errors, groups),
    )  # fmt: skip


@dataclass(frozen=True)
class OnDisk:
    """The unsplit model as stored on disk, the same on every rank.

    Attributes:
        origin: Origin of the model.
        boxes: For each array of the model, the boxes of tensors on disk that hold it.
        dtypes: For each tensor, its dtype.
        unused: Tensors to copy from the checkpoint that the model was loaded from.
        announces: Whether the config may list layers that the model does not have.
    """

    origin: Origin
    boxes: Mapping[str, tuple[Box, ...]]
    dtypes: Mapping[str, mx.Dtype]
    unused: Unused
    announces: bool

    def tensors(self, only: Callable[[str], bool] = lambda name: True) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors of the given arrays, in their original order, new ones last."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, places in self.boxes.items():
            for box in places if only(name) else ():
                known = self.origin.tensors.get(box.name)
                same = known is not None and DTYPES[known.dtype] == self.dtypes[name]
                dtype = known.dtype if known is not None and same else DTYPE_NAMES[self.dtypes[name]]
                found[box.name] = dtype, self.origin.shape(box)
        order = {name: place for place, name in enumerate(self.origin.tensors)}
        return [(name, *found[name]) for name in sorted(found, key=lambda name: order.get(name, len(order)))]

    def files(self, max_shard_bytes: int) -> tuple[FilePlan, ...]:
        """The files of its weights."""
        facts = [*self.tensors(), *self.unused.facts()]
        order = {name: place for place, name in enumerate(self.origin.tensors)}
        return plan_files(sorted(facts, key=lambda one: order.get(one[0], len(order))), max_shard_bytes)

    def own(self, model: nn.Module, plan: Plan, groups: ParallelGroups) -> dict[str, tuple[Any, Any]]:
        """The homes of the arrays whose owned parts this rank writes. Of copies on stages, only the owner's is written."""
        others = elsewhere(model, plan, groups)
        return {name: home for name, home in parameter_homes(model).items() if name not in others}

    def parts(
        self, name: str, home: Any, key: Any, array: mx.array, plan: Plan, groups: ParallelGroups
    ) -> Iterator[tuple[str, list[list[Range]], memoryview]]:
        """The part of an array, split like `home[key]`, that this rank owns: ranges and bytes for each tensor on disk."""
        held, owned = (local_ranges(home, key, name, plan, groups.tp.rank, owned=only) for only in (False, True))
        return parts_of(self.boxes[name], array, held, owned)

    def write_beside(self, folder: Path, tokenizer: Tokenizer | None) -> None:
        """Write the files beside the weights: configs and the tokenizer."""
        floating = [self.dtypes[n] for n in self.origin.sources if mx.issubdtype(self.dtypes[n], mx.floating)]
        dtype = floating[0] if floating else mx.float32
        config = self.origin.plain_config(dtype, announces=self.announces)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        beside = self.origin.folder / "generation_config.json" if self.origin.folder is not None else None
        if beside is not None and beside.is_file():
            shutil.copyfile(beside, folder / beside.name)
        if tokenizer is not None:
            tokenizer.save(folder)


def on_disk(model: nn.Module) -> OnDisk:
    """The unsplit model of all ranks as stored on disk. Every rank of the run must call it.

    Raises:
        ModelError: The model has arrays that the unsplit model lacks, such as adapters.
    """
    _, groups = plan_of(model)
    origin: Origin = model.partita_origin
    homes = parameter_homes(model)
    with collective_errors(groups):
        _refuse_strange(homes, origin)
    dtypes: dict[str, mx.Dtype] = {}
    mine = {name: str(home[key].dtype).removeprefix("mlx.core.") for name, (home, key) in homes.items()}
    for part in groups.pp.all_gather_object(mine):
        dtypes.update({name: getattr(mx, dtype) for name, dtype in part.items()})
    with collective_errors(groups):
        boxes = origin.boxes()
    unused = origin.unused.without({box.name for places in boxes.values() for box in places})
    missing = unused.missing()
    for comm in (groups.tp, groups.pp, groups.dp):
        missing = next(filter(None, comm.all_gather_object(missing)), "") if comm.size > 1 else missing
    if missing and groups.rank == 0:
        note(NOT_SAVED.format(missing))
    return OnDisk(origin, boxes, dtypes, Unused() if missing else unused, announces=not missing)


def _refuse_strange(homes: Mapping[str, Any], origin: Origin) -> None:
    strange = [name for name in homes if name not in origin.sources]
    if strange:
        raise ModelError(
            f"the model has {strange[0]}, which the unsplit model did not have. Merge adapters into the layers "
            "first; quantize a model before it is split."
        )


def parts_of(
    boxes: tuple[Box, ...], array: mx.array, held: Ranges | None, owned: Ranges | None
) -> Iterator[tuple[str, list[list[Range]], memoryview]]:
    """The parts of a local array that this rank owns, for each tensor on disk."""
    whole = tuple(((0, size),) for size in array.shape)
    have, mine = held or whole, owned or whole
    if any(not ranges for ranges in mine):
        return
    with mx.stream(mx.cpu):
        for dim, (there, wanted) in enumerate(zip(have, mine, strict=True)):
            if there != wanted:
                spans = [_place(there, span) for span in wanted]
                before = (slice(None),) * dim
                array = mx.concatenate([array[(*before, slice(a, b))] for a, b in spans], axis=dim)
        for box in boxes:
            overlap = box.overlap(mine)
            if overlap is not None:
                take, put = overlap
                yield box.name, take, _bytes(_as_on_disk(array[tuple(slice(a, b) for a, b in put)], box))


def _place(held: tuple[Range, ...], span: Range) -> Range:
    """The position of `span` within the concatenated ranges `held`."""
    offset = 0
    for a, b in held:
        if a <= span[0] and span[1] <= b:
            return offset + span[0] - a, offset + span[1] - a
        offset += b - a
    raise AssertionError(f"{span} is not in {held}")


def _as_on_disk(part: mx.array, box: Box) -> mx.array:
    """A part of an array with its axes in the order on disk, except for axes of length 1."""
    new = [axis for axis, on_disk in enumerate(box.axes) if on_disk is None]
    kept = [on_disk for on_disk in box.axes if on_disk is not None]
    part = part.squeeze(new) if new else part
    return part.transpose(sorted(range(len(kept)), key=lambda place: kept[place])) if kept else part


def _bytes(part: mx.array) -> memoryview:
    flat = part.reshape(-1)
    bits: Any = np.array(flat.view(_UNSIGNED[flat.dtype.size]))
    return memoryview(bits).cast("B")
