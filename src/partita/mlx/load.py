"""Loading: the model is built without weights, split by its plan, and each rank reads its own bytes of the checkpoint."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import mlx.core as mx
import mlx.nn as nn

from partita.checkpoint.facts import dtype_note, stored_dtype
from partita.checkpoint.find import find_model
from partita.checkpoint.index import Checkpoint, open_checkpoint
from partita.checkpoint.manifest import check_model
from partita.checkpoint.unused import Unused
from partita.core.layout.layout import PipelineParallelLayerLayout
from partita.core.model.spec import config_number, text_config
from partita.core.plan import Plan
from partita.core.request import SplitArguments, SplitRequest
from partita.errors import CheckpointError, ModelError
from partita.generation.generation_config import read_generation
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.collectives.groups import ParallelGroups, make_groups
from partita.mlx.layers.inner import in_columns, multiplies_by_columns
from partita.mlx.model.config import others_weights, read_mlx_config
from partita.mlx.model.mlx_lm_models import build, quantize, spec_of
from partita.mlx.model.parts import parameter_homes
from partita.mlx.proof.family import plan_of_model, prove_unless_proven
from partita.mlx.proof.reference import check_reference
from partita.mlx.proof.stages import prove_stages
from partita.mlx.split.apply import apply_plan, finish
from partita.mlx.weights.adapters import put_back, take_off
from partita.mlx.weights.fill import CheckpointFill, Computed, Progress, as_dtype
from partita.mlx.weights.names import Source, sources_of, unused_of
from partita.mlx.weights.origin import Origin
from partita.mlx.weights.ties import check_head, differ, stored_twice, untie
from partita.notes import note
from partita.quantized.find import parts_of, quantization_note
from partita.quantized.plain import PlainReader, as_plain
from partita.quantized.weight import QuantizedWeight
from partita.ranks.liveness import doing


@doing("loading the model")
def load(
    model: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    dtype: mx.Dtype | str | None = None,
    device: None = None,
    trust_remote_code: bool = False,
    backend: str | None = None,
    progress: Progress | None = None,
    groups: ParallelGroups | None = None,
    verify: bool = True,
    **split: Unpack[SplitArguments],
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
    how = SplitRequest.of(plan, split)
    groups = groups if groups is not None else make_groups(how.mesh, backend=backend)
    with collective_errors(groups):
        refuse_device(device)
        wanted = as_dtype(dtype)
        folder = find_model(model)
        if verify:
            check_model(folder, groups.rank, groups.mesh.size)
        checkpoint = open_checkpoint(folder)
        _note(groups, checkpoint.note())
        config, generation = read_mlx_config(folder), read_generation(folder)
        stored, quantized = checkpoint, others_weights(checkpoint, config)
        _name_dtype(config, checkpoint, quantized, groups, asked=wanted is not None)
        if quantized:
            checkpoint = _as_plain(checkpoint, quantized, config, groups)
    is_untied, twice = _untied(config, checkpoint, stored, quantized, groups)
    with collective_errors(groups):
        built = build(config)
        if groups.rank == 0:
            check_reference(config)
        again = functools.partial(build, config)
        sources, unused = _sources(built, config, again, checkpoint, twice)
        _note(groups, unused.note(f"mlx-lm's {config['model_type']}"))
        plan = choose_plan(built, plan, how, config)
    with collective_errors(groups), PlainReader(checkpoint, stored, quantized) as reader:
        computed = Computed(again, sources, checkpoint)
        part = apply_plan(built, plan, groups.tp, groups.pp.rank)
        CheckpointFill(reader, sources, computed, plan, groups.tp.rank, wanted, progress)(part)
    part.partita_origin = Origin(
        sources, checkpoint.tensors, folder, generation=generation, is_untied=is_untied, unused=unused
    )
    return finish(part, plan, groups)


def _note(groups: ParallelGroups, text: str) -> None:
    """Show a note, if there is one, on the first rank."""
    if groups.rank == 0 and text:
        note(text)


def _as_plain(
    checkpoint: Checkpoint, quantized: Mapping[str, QuantizedWeight], config: dict[str, Any], groups: ParallelGroups
) -> Checkpoint:
    """The checkpoint with plain weights in the dtype of `config`, which then names no quantization."""
    dtype = {"float16": "F16", "bfloat16": "BF16", "float64": "F64"}.get(str(config.get("dtype")), "F32")
    form = next(iter(quantized.values())).form
    line = quantization_note(config)
    _note(groups, line and f"{checkpoint.folder}: {line}")
    _note(
        groups,
        f"{checkpoint.folder}: MLX has no products with {form}, so the weights are loaded with the same values in "
        f"{config.get('dtype') or 'float32'}. Convert the model with mlx_lm.convert -q to need less memory.",
    )
    for part in (config, text_config(config)):
        part.pop("quantization_config", None)  # type: ignore[attr-defined]
    return as_plain(checkpoint, quantized, dtype)


def _untied(
    config: dict[str, Any],
    checkpoint: Checkpoint,
    stored: Checkpoint,
    quantized: Mapping[str, QuantizedWeight],
    groups: ParallelGroups,
) -> tuple[bool, tuple[str, str] | None]:
    """Untie the head in `config` if the checkpoint has different values for it and the embedding. Every rank must call it.

    Returns:
        Whether it was untied, and the names of the head and the embedding if the checkpoint stores both.
    """
    with collective_errors(groups):
        twice = stored_twice(config, checkpoint)
    if twice is None or not differ(twice, PlainReader(checkpoint, stored, quantized), groups):
        return False, twice
    with collective_errors(groups):
        untie(config)
        check_head(build(config), twice)
    _note(
        groups,
        f"{checkpoint.folder}: config.json ties {twice[0]} to {twice[1]}, but the checkpoint has different values for both: "
        "loaded untied.",
    )
    return True, twice


def _sources(
    built: nn.Module,
    config: Mapping[str, Any],
    again: Callable[[], nn.Module],
    checkpoint: Checkpoint,
    twice: tuple[str, str] | None,
) -> tuple[dict[str, Source], Unused]:
    """Where each array of `built` comes from, after its layers are quantized as on disk, and the unused tensors.

    Raises:
        CheckpointError: The checkpoint belongs to another model, or is incomplete.
    """
    every = sources_of(built, again, checkpoint.tensors)
    quantize(built, config, lambda path, module: _stored_packing(path, module, every))
    beyond, homes = _beyond(config), parameter_homes(built)
    sources = {name: source for name, source in every.items() if name in homes or not beyond(name)}
    _check_whole(built, sources, checkpoint)
    return sources, _unused(sources, checkpoint, twice, beyond)


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
    how = SplitRequest.of(plan, {"tp": tp, "pp": pp, "dp": dp, "layout": layout})
    groups = groups if groups is not None else make_groups(how.mesh)
    with collective_errors(groups):
        adapters = take_off(model)
        plan = choose_plan(model, plan, how)
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


def choose_plan(
    model: nn.Module, plan: Plan | None, how: SplitRequest, config: Mapping[str, Any] | None = None
) -> Plan:
    """`plan` for the arrays of the unsplit `model`, or a plan created as `how` says, after verifying it for the model.

    A plan from transformers' model has names that MLX stores differently.

    Raises:
        ModelError: The plan belongs to another family.
        PartitaError: The plan fails, or none passes.
    """
    if plan is None:
        plan = plan_of_model(model, how.mesh, how.layout, config=config, vpp=how.vpp, placement=how.placement)
    else:
        spec = spec_of(model, config)
        if {n: t.shape for n, t in plan.spec.tensors.items()} != {n: t.shape for n, t in spec.tensors.items()}:
            if difference := plan.spec.first_difference(spec, names=False):
                raise ModelError(f"the plan is for another model: {difference}. Make the plan of this model.")
            plan = plan_of_model(model, plan.mesh, plan.layout, config=config, placement=plan.placement)
        prove_unless_proven(model, plan)
    prove_stages(model, plan)
    return plan


def refuse_device(device: object) -> None:
    """Raise `ModelError` if a device is given."""
    if device is not None:
        raise ModelError(f"device {device} is for torch; MLX runs on its own default device. Leave it out.")


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


def _name_dtype(
    config: dict[str, Any],
    checkpoint: Checkpoint,
    quantized: Mapping[str, QuantizedWeight],
    groups: ParallelGroups,
    *,
    asked: bool,
) -> None:
    """Set the dtype of the weights on disk in a config. Adds a note if it differed, unless a dtype was requested."""
    stored = stored_dtype(checkpoint, parts_of(quantized))
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
