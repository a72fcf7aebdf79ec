"""LoRA and DoRA adapters on disk, unsplit, in the format of `PeftModel.from_pretrained`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.checkpoint.index import open_checkpoint, weights_name
from partita.checkpoint.read import Reader
from partita.checkpoint.write import FilePlan, Writer, plan_files, write_folder
from partita.core.plan import Plan
from partita.core.sharding.split import Range
from partita.errors import ModelError
from partita.generation import Tokenizer
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.layers.lora import dropout_of
from partita.mlx.model.parts import plan_of
from partita.mlx.model.tree import Home
from partita.mlx.weights.adapter_places import AdapterPlaces, adapter_places, adapters, box_on_disk, paths_on_disk
from partita.mlx.weights.adapters import linears_of, put_on, removed_on_error
from partita.mlx.weights.moments import read_array
from partita.mlx.weights.named_adapters import check_name, choose, named_adapters
from partita.mlx.weights.names import DTYPES, Box
from partita.mlx.weights.origin import Origin
from partita.mlx.weights.save import DTYPE_NAMES, parts_of
from partita.training.adapter_files import (
    CONFIG_NAME,
    STEM,
    Adapters,
    check_shape,
    find_adapters,
    refuse_adapted,
    refuse_unplaced,
    targets_of,
)
from partita.training.adapter_patterns import adapted_path, config_of, read_adapter_config
from partita.training.mlx_adapters import in_peft_format


def save_adapters(
    model: nn.Module, folder: str | os.PathLike[str], *, base: str | None = None, name: str | None = None
) -> None:
    """Write the LoRA or DoRA adapters of a split model, unsplit, in peft's format. Every rank of the run must call it.

    The folder, with `adapter_config.json` and `adapter_model.safetensors`, is created atomically. It does not depend
    on how the model was split.

    Args:
        model: A model with adapters from `add_lora`, `load_adapters` or mlx-lm.
        folder: Destination; created if needed. It must not hold weights already.
        base: The base model's folder or id for peft (default: where `model` was loaded from).
        name: The adapters, if they have names (default: those that are chosen).

    Raises:
        ModelError: The model has no adapters, or none of this name, or some that cannot be stored in one config.
        CheckpointError: The folder holds weights already, or cannot be written.
    """
    plan, groups = plan_of(model)
    before = named_adapters(model).chosen
    if name is not None:
        check_name(model, name)
        choose(model, name)
    try:
        disk = adapters_on_disk(model, base)

        def write(writer: Writer) -> None:
            for array, (home, key) in disk.own(model, plan, groups).items():
                for box, take, data in disk.parts(array, home, key, home[key], plan, groups):
                    writer.write(box, take, data)

        write_folder(
            Path(folder), groups, disk.files(), lambda made: disk.write_beside(made, None), write,
            partial(collective_errors, groups),
        )  # fmt: skip
    finally:
        choose(model, before)


def load_adapters(model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None) -> list[str]:
    """Add adapters that peft, `mlx_lm.lora` or `save_adapters` wrote to a split model, trainable.

    Every rank of the run must call it. Each rank reads its own part. All other parameters are frozen.

    Args:
        model: Their base model, from `load`, `shard` or `fresh`, in any layout.
        folder: A folder with `adapter_config.json`, and `adapter_model.safetensors` or mlx-lm's `adapters.safetensors`,
            or the folder of a run that trained adapters.
        name: A name for the adapters: the model may have several with names, of which `set_adapter` chooses one, at first
            the first. Without a name they are the only ones.

    Returns:
        Paths of this rank's adapted layers.

    Raises:
        CheckpointError: There are none, or they are not LoRA or DoRA of linear layers, or not for this model; on every rank.
        ModelError: The model has adapters already, or some of this name.
    """
    _, groups = plan_of(model)
    named = named_adapters(model)
    with contextlib.ExitStack() as stack:
        with collective_errors(groups):
            place = find_adapters(Path(folder))
            if name in named.places:
                raise ModelError(f"the model has an adapter {name!r} already. Choose another name.")
            if name is None or not named.places:
                refuse_adapted(bool(adapters(model) or named.places))
            known = paths_on_disk(model)
            source = stack.enter_context(in_peft_format(place, lambda path: known.get(path, path)))
        before = named.chosen
        choose(model, None)
        try:
            with removed_on_error(model):
                placed = _put_on(model, place, source)
            if name is not None:
                named.take_off(name, adapters(model))
        finally:
            choose(model, name if len(named.places) == 1 else before)
        return placed


def _put_on(model: nn.Module, place: Path, source: Path) -> list[str]:
    """Add the adapters in `source`, which has peft's format, to a split model; errors name `place`."""
    plan, groups = plan_of(model)
    with collective_errors(groups):
        config = read_adapter_config(source)
        checkpoint = open_checkpoint(source / weights_name(STEM))
        wanted = {adapted_path(name) for name in checkpoint.tensors}
        there = paths_on_disk(model)
        linears = {path: home for path, home in linears_of(model, plan).items() if there.get(path) in wanted}
        made = put_on(model, {path: (home, config.of(there[path])) for path, home in linears.items()}, groups)
    with collective_errors(groups), Reader(checkpoint) as reader:
        places = adapter_places(model)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        for name, (home, key) in places.homes.items():
            (box,) = places.boxes[name]
            check_shape(place, box.name, box.shape[::-1], shapes.get(box.name))
            dtype = DTYPES[checkpoint.tensors[box.name].dtype]
            home[key] = read_array(reader, "", (box,), places.held[name], dtype).astype(home[key].dtype)
        mine = sorted({adapted_path(box.name) for boxes in places.boxes.values() for box in boxes})
    refuse_unplaced(place, wanted, groups.pp.all_gather_object(mine), plan.spec.family)
    return list(made)


@dataclass(frozen=True)
class AdaptersOnDisk:
    """The unsplit adapters of all ranks as stored on disk; see `save.OnDisk`.

    Attributes:
        config: The text of `adapter_config.json`.
        boxes: For each array, its tensor on disk; the same on every rank, like the dtypes.
        dtypes: For each tensor, its dtype.
        places: This rank's arrays.
    """

    config: str
    boxes: Mapping[str, tuple[Box, ...]]
    dtypes: Mapping[str, mx.Dtype]
    places: AdapterPlaces

    def tensors(self, only: Callable[[str], bool] = lambda name: True) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape on disk of the given arrays."""
        return sorted(
            (box.name, DTYPE_NAMES[self.dtypes[name]], box.shape[::-1])
            for name, boxes in self.boxes.items()
            for box in boxes
            if only(name)
        )

    def files(self, max_shard_bytes: int = 0) -> tuple[FilePlan, ...]:
        """The one file that peft reads, whatever its size."""
        return plan_files(self.tensors(), 1 << 62, stem=STEM)

    def own(self, model: nn.Module, plan: Plan, groups: ParallelGroups) -> Mapping[str, Home]:
        """The homes of this rank's parts of the adapters."""
        return self.places.homes

    def parts(
        self, name: str, home: Any, key: Any, array: mx.array, plan: Plan, groups: ParallelGroups
    ) -> Iterator[tuple[str, list[list[Range]], memoryview]]:
        """The part of an array, split like `home[key]`, that this rank owns: name on disk, ranges on disk, and bytes."""
        return parts_of(self.boxes[name], array, self.places.held[name], self.places.owned[name])

    def write_beside(self, folder: Path, tokenizer: Tokenizer | None) -> None:
        """Write the config, and the tokenizer if there is one."""
        (folder / CONFIG_NAME).write_text(self.config, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)


def adapters_on_disk(model: nn.Module, base: str | None = None) -> AdaptersOnDisk:
    """The unsplit adapters of a split model as stored on disk. Every rank of the run must call it.

    Raises:
        ModelError: There are none, or some that cannot be stored in one config.
    """
    _, groups = plan_of(model)
    origin: Origin = model.partita_origin
    with collective_errors(groups):
        places, known = adapter_places(model), paths_on_disk(model)
        kinds = {path: _kind(home) for path, home in _adapted(places, known).items()}
        mine = [
            (
                name,
                str(home[key].dtype).removeprefix("mlx.core."),
                list(places.shapes[name]),
                places.boxes[name][0].name,
            )
            for name, (home, key) in places.homes.items()
        ]
    told = groups.pp.all_gather_object((mine, [(path, *astuple(kind)) for path, kind in kinds.items()]))
    with collective_errors(groups):
        layers = config_of({path: Adapters(*kind) for _, theirs in told for path, *kind in theirs})
        everywhere = sorted((one for theirs, _ in told for one in theirs), key=lambda one: one[0])
        boxes = {name: (box_on_disk(there, tuple(shape)),) for name, _, shape, there in everywhere}
        adapted = {adapted_path(box.name) for (box,) in boxes.values()}
        swapped = {
            origin.boxes()[f"{path}.weight"][0].axes == (1, 0) for path, there in known.items() if there in adapted
        }
        config = layers.to_json(
            base=base or (str(origin.folder) if origin.folder is not None else None),
            targets=targets_of(adapted, set(known.values()) - adapted),
            transposed=swapped == {True},
        )
    return AdaptersOnDisk(config, boxes, {name: getattr(mx, dtype) for name, dtype, _, _ in everywhere}, places)


def _adapted(places: AdapterPlaces, known: Mapping[str, str]) -> dict[str, Any]:
    """This rank's adapters by their layers' paths on disk."""
    paths = {name: name.rpartition(".")[0] for name, (_, key) in places.homes.items() if key == "lora_a"}
    return {known[path]: places.homes[name][0] for name, path in paths.items()}


def _kind(adapter: Any) -> Adapters:
    rank = int(adapter["lora_a"].shape[1])
    return Adapters(rank, round(float(adapter.scale) * rank, 9), dropout_of(adapter), "m" in adapter)
