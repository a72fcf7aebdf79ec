"""Loading: the model is built without weights, split by its plan, and each rank reads its own bytes of the checkpoint."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.checkpoint.facts import dtype_note, stored_dtype
from partita.checkpoint.find import find_model
from partita.checkpoint.index import Checkpoint, open_checkpoint
from partita.checkpoint.manifest import check_model
from partita.checkpoint.read import Reader
from partita.checkpoint.unused import Unused
from partita.core.layout.layout import PipelineParallelLayerLayout
from partita.core.layout.placement import Placement
from partita.core.model.spec import config_number, text_config
from partita.core.plan import Plan, mesh_of
from partita.errors import CheckpointError, ModelError
from partita.generation.generation_config import read_generation
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.collectives.groups import ParallelGroups, make_groups
from partita.mlx.layers.inner import in_columns, multiplies_by_columns
from partita.mlx.model.config import read_mlx_config
from partita.mlx.model.mlx_lm_models import build, quantize, spec_of
from partita.mlx.model.parts import Ranges, is_packed, local_ranges, parameter_homes, take
from partita.mlx.proof.family import plan_of_model, prove_unless_proven
from partita.mlx.proof.reference import check_reference
from partita.mlx.proof.stages import prove_stages
from partita.mlx.split.apply import apply_plan, finish
from partita.mlx.weights.adapters import put_back, take_off
from partita.mlx.weights.names import Source, sanitize, sources_of, unused_of
from partita.mlx.weights.origin import Origin
from partita.mlx.weights.ties import check_head, differ, stored_twice, untie
from partita.notes import note
from partita.ranks.liveness import doing

Progress = Callable[[int, int], None]
"""Called with the bytes that this rank has loaded and their total."""

_ROWS, _PAD = 64, 16
"""Rows of a matrix to transpose in memory at once, and their distance: 5.6 GB/s, where the transposition of a full matrix
by one assignment reaches 0.6."""

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@doing("loading the model")
def load(
    model: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    layout: str | list[Any] | PipelineParallelLayerLayout | None = None,
    vpp: int | None = None,
    placement: Placement = "loop",
    dtype: mx.Dtype | str | None = None,
    device: None = None,
    trust_remote_code: bool = False,
    backend: str | None = None,
    progress: Progress | None = None,
    groups: ParallelGroups | None = None,
    verify: bool = True,
) -> nn.Module:
    """Load this rank's part of a model. It is called like the unsplit model, with the same results on every rank.

    Every rank of the run must call it; without a launcher the process is a single rank. Only the own part is ever in memory,
    and it is read an array at a time.

    Args:
        model: A folder in Hugging Face's format, quantized by MLX or not, or a hub id.
        plan: The plan, for any engine (default: created from `tp`, `pp`, `dp` and `layout`).
        tp: Tensor parallel ranks.
        pp: Pipeline parallel ranks.
        dp: Replicas.
        layout: Layers of each stage.
        vpp: Stages on each pipeline rank (default: as many as `layout` has, else 1).
        placement: Assignment of stages to ranks: `loop`, or `v` for the schedule `zb-v`.
        dtype: dtype of unquantized weights, and of the scales of quantized ones (default: the
            checkpoint's).
        device: Must be None: MLX runs on its default device (`mx.set_default_device`).
        trust_remote_code: Has no effect: a model's own code is for transformers, and models with such code raise here.
        backend: Backend of MLX's communication (default: the one that the launcher prepared).
        progress: Called after every array that is read.
        groups: The groups of the mesh (default: created from the run).
        verify: Whether the ranks first read a run's checkpoint completely and compare it with its manifest.

    Raises:
        PartitaError: The model cannot be split this way, is not whole on disk, or mlx-lm computes something else of its config
            than transformers; on every rank.

    Examples:
        >>> model = pm.load("./model", tp=2)
        >>> model(ids).shape  # the same logits on every rank
        (1, 5, 257)
    """
    mesh = mesh_of(plan, dp, pp, tp)
    groups = groups if groups is not None else make_groups(mesh, backend=backend)
    with collective_errors(groups):
        refuse_device(device)
        wanted = as_dtype(dtype)
        folder = find_model(model)
        if verify:
            check_model(folder, groups.rank, groups.mesh.size)
        checkpoint = open_checkpoint(folder)
        if groups.rank == 0 and (line := checkpoint.note()):
            note(line)
        config, generation = read_mlx_config(folder), read_generation(folder)
        _name_dtype(config, checkpoint, groups, asked=wanted is not None)
        twice = stored_twice(config, checkpoint)
    untied = twice is not None and differ(twice, checkpoint, groups)
    with collective_errors(groups):
        if untied and twice is not None:
            untie(config)
            check_head(build(config), twice)
            if groups.rank == 0:
                note(
                    f"{folder}: config.json ties {twice[0]} to {twice[1]}, but the checkpoint has different values for both: "
                    "loaded untied."
                )
        built = build(config)
        if groups.rank == 0:
            check_reference(config)
        again = functools.partial(build, config)
        sources = sources_of(built, again, checkpoint.tensors)
        quantize(built, config, lambda path, module: _stored_packing(path, module, sources))
        beyond = _beyond(config)
        homes = parameter_homes(built)
        sources = {name: source for name, source in sources.items() if name in homes or not beyond(name)}
        _check_whole(built, sources, checkpoint)
        rest = _unused(sources, checkpoint, twice, beyond)
        if groups.rank == 0 and (line := rest.note(f"mlx-lm's {config['model_type']}")):
            note(line)
        if plan is None:
            plan = plan_of_model(built, mesh, layout, config=config, vpp=vpp, placement=placement)
        else:
            plan = prove_unless_proven(built, fitted(plan, built, config))
        prove_stages(built, plan)
    with collective_errors(groups), Reader(checkpoint) as reader:
        computed = _Computed(again, sources, checkpoint)
        split = apply_plan(built, plan, groups.tp, groups.pp.rank)
        _Fill(reader, sources, computed, plan, groups.tp.rank, wanted, progress)(split)
    split.partita_origin = Origin(
        sources, checkpoint.tensors, folder, generation=generation, is_untied=untied, unused=rest
    )
    return finish(split, plan, groups)


def shard(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    layout: str | list[Any] | PipelineParallelLayerLayout | None = None,
    groups: ParallelGroups | None = None,
) -> nn.Module:
    """Split a model in memory, in place; every rank calls it with an equal model. Returns the model.

    Args:
        model: An unsplit mlx-lm model, evaluated or not, quantized or not.
        plan: The plan, for any engine (default: created from the model and `tp`, `pp`, `dp` and `layout`).
        tp: Tensor parallel ranks.
        pp: Pipeline parallel ranks.
        dp: Replicas.
        layout: Layers of each stage.
        groups: The groups of the plan's mesh (default: created from the run).

    Raises:
        PartitaError: The model cannot be split this way; on every rank.

    Examples:
        >>> model = pm.shard(unsplit, tp=2)  # every rank has the same unsplit model
        >>> model.model.layers[0].mlp.down_proj.linear.weight.shape  # of [48, 96]
        (48, 48)
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a module in memory; got {model!r:.100}. Use load() for a folder or a hub id.")
    mesh = mesh_of(plan, dp, pp, tp)
    groups = groups if groups is not None else make_groups(mesh)
    with collective_errors(groups):
        adapters = take_off(model)
        if plan is None:
            plan = plan_of_model(model, mesh, layout)
        else:
            plan = prove_unless_proven(model, fitted(plan, model))
        prove_stages(model, plan)
        origin = Origin.in_memory(model)
        split = apply_plan(model, plan, groups.tp, groups.pp.rank)
        put_back(split, adapters, groups.tp.rank)
    for home, attribute in parameter_homes(split).values():
        # One at a time, so that an unsplit array can be released before the next part is created.
        if attribute == "weight" and multiplies_by_columns(home, home[attribute].dtype):
            home[attribute] = in_columns(home[attribute])
        mx.eval(home[attribute])
    split.partita_origin = origin
    return finish(split, plan, groups)


def fitted(plan: Plan, model: nn.Module, config: Mapping[str, Any] | None = None) -> Plan:
    """`plan` for the arrays of `model`: a plan from transformers' model has names that MLX stores differently.

    Raises:
        ModelError: The plan belongs to another family.
        PlanError: Its mesh and layout do not fit.
    """
    spec = spec_of(model, config)
    if {n: t.shape for n, t in plan.spec.tensors.items()} == {n: t.shape for n, t in spec.tensors.items()}:
        return plan
    if difference := plan.spec.first_difference(spec, names=False):
        raise ModelError(f"the plan is for another model: {difference}. Make the plan of this model.")
    return plan_of_model(model, plan.mesh, plan.layout, config=config, placement=plan.placement)


def refuse_device(device: object) -> None:
    """Raise `ModelError` if a device is given."""
    if device is not None:
        raise ModelError(f"device {device} is for torch; MLX runs on its own default device. Leave it out.")


def as_dtype(dtype: mx.Dtype | str | None) -> mx.Dtype | None:
    """The MLX dtype of a name; None for the checkpoint's own.

    Raises:
        ModelError: Models cannot have this dtype.
    """
    names = {"float64": mx.float64, "float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    if dtype is None or dtype == "auto":
        return None
    found = names.get(dtype.removeprefix("mlx.core.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, mx.Dtype) or found not in names.values():
        raise ModelError(f"dtype must be one of {', '.join(names)}; got {dtype}.")
    if found == mx.float64 and mx.default_device() != mx.cpu:
        raise ModelError("MLX supports float64 on the CPU only. Use float32, or mx.set_default_device(mx.cpu) first.")
    return found


def _beyond(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a name belongs to a prediction layer, which no mlx-lm model has."""
    layers = config_number(text_config(config), "num_hidden_layers")

    def is_beyond(name: str) -> bool:
        numbered = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        return name.startswith(("mtp.", "model.mtp.")) or (numbered is not None and 0 < layers <= int(numbered[1]))

    return is_beyond


def _unused(
    sources: Mapping[str, Source],
    checkpoint: Checkpoint,
    twice: tuple[str, str] | None,
    beyond: Callable[[str], bool],
) -> Unused:
    """The tensors that the model does not use, except a head that is the embedding.

    If the inputs of some computed array are unknown, only prediction layers are certain to be unused.
    """
    names, is_sure = unused_of(sources, checkpoint.tensors)
    head = (twice[0].removesuffix("weight"),) if twice is not None else ()
    kept = [name for name in names if (is_sure or beyond(name)) and not name.startswith(head)]
    return Unused(checkpoint.folder, {name: checkpoint.tensors[name] for name in kept})


def _name_dtype(config: dict[str, Any], checkpoint: Checkpoint, groups: ParallelGroups, *, asked: bool) -> None:
    """Set the dtype of the weights on disk in a config. Adds a note if it differed, unless a dtype was requested."""
    stored = stored_dtype(checkpoint)
    line = dtype_note(checkpoint.folder, stored, config)
    if line and not asked and groups.rank == 0:
        note(line)
    if stored is not None:
        config["dtype"] = stored


def _stored_packing(path: str, module: nn.Module, sources: Mapping[str, Source]) -> dict[str, Any] | bool:
    """Quantization of a layer that the config does not name: quantized if the checkpoint has scales."""
    scales = sources.get(f"{path}.scales")
    if scales is None:
        return False
    inputs = module["weight"].shape[-1]
    group_size = inputs // scales.shape[-1]
    bits = sources[f"{path}.weight"].shape[-1] * 32 // inputs
    if scales.dtype != mx.uint8:
        return {"group_size": group_size, "bits": bits, "mode": "affine"}
    modes = {(16, 4): "nvfp4", (32, 4): "mxfp4", (32, 8): "mxfp8"}
    if (group_size, bits) not in modes:
        raise CheckpointError(
            f"{path} is quantized to {bits} bits in groups of {group_size}, which MLX does not support."
        )
    return {"group_size": group_size, "bits": bits, "mode": modes[group_size, bits]}


def _check_whole(model: nn.Module, sources: Mapping[str, Source], checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` unless the checkpoint provides every array of the model, in its shape, and no other."""
    homes = parameter_homes(model)
    missing = [name for name in homes if name not in sources]
    if missing:
        raise CheckpointError(
            f"tensor {missing[0]} of the model is not in {checkpoint.folder}{_and_more(missing)}. The checkpoint belongs "
            "to another model, or is incomplete."
        )
    unknown = [name for name in sources if name not in homes]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {unknown[0]} is not part of the model{_and_more(unknown)}. The config does not "
            "belong to this checkpoint, or it is of a kind that cannot be read."
        )
    for name, (home, attribute) in homes.items():
        if tuple(home[attribute].shape) != sources[name].shape:
            raise CheckpointError(
                f"tensor {name} has the shape {sources[name].shape} in {checkpoint.folder}, but {tuple(home[attribute].shape)} "
                "in the model. The config does not belong to this checkpoint."
            )
        wanted, found = home[attribute].dtype, sources[name].dtype
        if mx.issubdtype(wanted, mx.floating) != mx.issubdtype(found, mx.floating):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {name} is {_name(found)}, which cannot be converted without its scales to the "
                f"model's {_name(wanted)}. Dequantize the checkpoint, and load that."
            )


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _and_more(names: Sequence[str]) -> str:
    return f", nor are {len(names) - 1} others" if len(names) > 1 else ""


class _Computed:
    """The arrays that `sanitize` computes from tensors on disk (dequantizes, adds one), created on request."""

    def __init__(self, again: Callable[[], nn.Module], sources: Mapping[str, Source], checkpoint: Checkpoint) -> None:
        self.arrays: dict[str, mx.array] = {}
        names = [name for name, source in sources.items() if source.boxes is None]
        if names:
            # The headers were checked when the checkpoint was opened: MLX itself accepts malformed ones.
            lazy: dict[str, mx.array] = {}
            for header in checkpoint.files:
                lazy.update(mx.load(str(header.file)))  # type: ignore[arg-type]
            made = sanitize(again(), lazy)
            self.arrays = {name: made[name] for name in names}

    def take(self, name: str, ranges: Ranges | None) -> mx.array:
        """Return `ranges` of an array and release it."""
        return take(self.arrays.pop(name), ranges)


class _Fill:
    """Fills a split model's arrays, one at a time, from the byte ranges of a checkpoint."""

    def __init__(
        self,
        reader: Reader,
        sources: Mapping[str, Source],
        computed: _Computed,
        plan: Plan,
        tp_rank: int,
        dtype: mx.Dtype | None,
        progress: Progress | None,
    ) -> None:
        self.reader, self.sources, self.computed = reader, sources, computed
        self.plan, self.tp_rank, self.dtype, self.progress = plan, tp_rank, dtype, progress

    def __call__(self, model: nn.Module) -> None:
        homes = parameter_homes(model)
        done = 0
        total = sum(home[attribute].nbytes for home, attribute in homes.values())
        for name, (home, attribute) in homes.items():
            ranges = local_ranges(home, attribute, name, self.plan, self.tp_rank)
            source = self.sources[name]
            if source.boxes is None:
                array = self.computed.take(name, ranges)
            else:
                wanted = self.dtype or source.dtype
                columns = attribute == "weight" and multiplies_by_columns(home, wanted)
                array = self._read(source, ranges or tuple(((0, size),) for size in source.shape), columns)
            array = self._converted(array, packed=is_packed(home, attribute))
            assert array.shape == home[attribute].shape
            mx.eval(array)
            done += home[attribute].nbytes
            home[attribute] = array
            if self.progress is not None:
                self.progress(done, total)

    def _converted(self, array: mx.array, *, packed: bool) -> mx.array:
        if self.dtype is None or not mx.issubdtype(array.dtype, mx.floating):
            return array
        # Scales and biases determine the dtype of a quantized product; MLX does not support float64 there.
        return array.astype(mx.float32 if packed and self.dtype == mx.float64 else self.dtype)

    def _read(self, source: Source, ranges: Ranges, columns: bool) -> mx.array:
        """The local part of an array, read into its own memory, with contiguous rows or columns."""
        assert source.boxes is not None
        shape = tuple(sum(b - a for a, b in one) for one in ranges)
        with mx.stream(mx.cpu):
            array = mx.zeros(shape[::-1] if columns else shape, _UNSIGNED[source.dtype.size])
            mx.eval(array)
            there = np.asarray(memoryview(array))  # type: ignore[arg-type]
            there = there.T if columns else there
            for box in source.boxes:
                overlap = box.overlap(ranges)
                if overlap is not None:
                    take_ranges, put = overlap
                    self._read_box(box.name, take_ranges, box.axes, there[tuple(slice(a, b) for a, b in put)])
            array = array.view(source.dtype)
            return array.T if columns else array

    def _read_box(
        self, name: str, ranges: list[list[tuple[int, int]]], axes: tuple[int | None, ...], there: np.ndarray[Any, Any]
    ) -> None:
        """Read ranges of a tensor on disk into a view of a local array whose axes correspond to its `axes`."""
        kept = [axis for axis in axes if axis is not None]
        new = tuple(place for place, axis in enumerate(axes) if axis is None)
        target = np.squeeze(there, new) if new else there
        if kept == sorted(kept) and target.flags.c_contiguous:
            self.reader.read(name, ranges, memoryview(target).cast("B"))  # type: ignore[arg-type]
            return
        sizes = [sum(b - a for a, b in one) for one in ranges]
        if kept == [0, 1] == list(range(len(sizes))):
            self._read_rows(name, ranges, sizes[1], target)
            return
        buffer = np.empty(sizes, there.dtype)
        self.reader.read(name, ranges, memoryview(buffer).cast("B"))  # type: ignore[arg-type]
        dropped = tuple(axis for axis in range(len(sizes)) if axis not in kept)
        target[...] = np.transpose(np.squeeze(buffer, dropped), np.argsort(np.argsort(kept)))

    def _read_rows(
        self, name: str, ranges: list[list[tuple[int, int]]], width: int, target: np.ndarray[Any, Any]
    ) -> None:
        """Read ranges of a matrix on disk into a matrix with another memory layout, some rows at a time."""
        buffer = np.empty((_ROWS, width), target.dtype)
        # Rows at a distance of a power of two would evict each other from the cache.
        apart = np.empty((_ROWS, width + _PAD), target.dtype)[:, :width]
        put = 0
        for first, last in ranges[0]:
            for start in range(first, last, _ROWS):
                count = min(_ROWS, last - start)
                block = [[(start, start + count)], ranges[1]]
                self.reader.read(name, block, memoryview(buffer[:count]).cast("B"))  # type: ignore[arg-type]
                apart[:count] = buffer[:count]
                target[put : put + count] = apart[:count]
                put += count
