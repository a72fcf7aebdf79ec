"""Loading: the model is built without weights, split by its plan, and each rank reads its own bytes of the checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from partita.checkpoint.facts import dtype_note, stored_dtype
from partita.checkpoint.find import find_model
from partita.checkpoint.index import Checkpoint, open_checkpoint
from partita.checkpoint.manifest import check_model
from partita.checkpoint.read import Reader
from partita.checkpoint.unused import Unused
from partita.core.model.mtp import with_mtp
from partita.core.plan import Plan
from partita.core.request import SplitArguments, SplitRequest
from partita.core.sharding.rules import Rules
from partita.errors import ModelError
from partita.generation.generation_config import FILE_NAME, read_generation
from partita.notes import note
from partita.quantized.find import kept_quantized, parts_of, quantization_note, quantized_weights, stored_shapes
from partita.quantized.packed import read_small
from partita.quantized.weight import QuantizedWeight
from partita.ranks.liveness import doing
from partita.torch.collectives.collective_errors import collective_errors, gather_from_all, value_of_first
from partita.torch.collectives.groups import ParallelGroups, init_process_group, make_groups
from partita.torch.loops.watch import watch
from partita.torch.model.towers import forbid_media
from partita.torch.model.transformers_models import build_on_meta, code_note, read_hf_config, spec_of
from partita.torch.proof.family import plan_of_model, prove_unless_proven, unmeasured_media
from partita.torch.proof.sample import note_replicated, plan_on_sample, spec_of_module
from partita.torch.proof.stages import media_without_stages, prove_stages
from partita.torch.split.apply import apply_plan, loop_over_quantized_experts
from partita.torch.split.finish import finish
from partita.torch.stages.mtp import attach_mtp
from partita.torch.training.kept_shards import keep_shards
from partita.torch.transformers_internals import quiet, text_config_of
from partita.torch.weights.fill import CheckpointFill, Progress, as_device, as_dtype
from partita.torch.weights.materialize import make_unsaved_buffers, materialize
from partita.torch.weights.names import Source, in_model_order, sources_for_reading
from partita.torch.weights.pretrained import with_save_pretrained
from partita.torch.weights.ties import add_twins, differing, tied_names, untie
from partita.training.settings import check_zero


@doing("loading the model")
def load(
    model: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    groups: ParallelGroups | None = None,
    verify: bool = True,
    zero: int = 0,
    **split: Unpack[SplitArguments],
) -> nn.Module:
    """Load this rank's part of a model. It is called like the unsplit model, with the same results on every rank.

    Every rank of the run must call it; without a launcher the process is a single rank. Only this rank's part is ever in
    memory.

    Args:
        model: A folder in Hugging Face's format, or a hub id.
        plan: The plan (default: created from `tp`, `pp`, `dp` and `layout`).
        tp: Tensor parallel ranks.
        pp: Pipeline parallel ranks.
        dp: Replicas.
        cp: Context parallel ranks, over which the sequences of training, and prompts with their cache, are split.
        ep: Ranks over which the experts of each layer are distributed.
        etp: Ranks over which each expert is split.
        layout: Layers of each stage.
        vpp: Stages on each pipeline rank (default: as many as `layout` has, else 1).
        placement: Assignment of stages to ranks: `loop`, or `v` for the schedule `zb-v`.
        dtype: dtype of the weights (default: the checkpoint's).
        device: Device of the weights (default: this rank's CUDA device, else the CPU).
        trust_remote_code: Whether to run code that comes with the model (its config's `auto_map`). Read it before you do.
        progress: Called after every chunk that is read.
        groups: The groups of the mesh (default: created from the initialized process group).
        verify: Whether the ranks first read a run's checkpoint completely and compare it with its manifest.
        zero: With 3 each replica keeps only its shard of every parameter, also between loading, `train(zero=3)` and `save`;
            the model can be used for nothing else. 0, 1 and 2 load complete parameters.

    Raises:
        PartitaError: The model cannot be split this way, or is incomplete on disk; on every rank.

    Examples:
        >>> model = pt.load("./model", tp=2)
        >>> model(input_ids=ids).logits.shape  # the same logits on every rank
        torch.Size([1, 5, 257])
    """
    init_process_group()
    check_zero(zero)
    how = SplitRequest.of(plan, split)
    groups = groups if groups is not None else make_groups(how.mesh)
    with collective_errors(groups):
        folder = find_model(model, code=trust_remote_code)
        if verify:
            check_model(folder, groups.rank, groups.mesh.size)
        checkpoint = open_checkpoint(folder)
        if groups.rank == 0 and (line := checkpoint.note()):
            note(line)
        config = read_config(folder, groups, trust_remote_code=trust_remote_code)
        data = config.to_dict()
        quantized = quantized_weights(checkpoint, data)
        _forget_quantization(config)
        if groups.rank == 0 and (line := quantization_note(data)):
            note(f"{folder}: {line}")
        wanted = as_dtype(dtype) or _stored_dtype(checkpoint, quantized, config, groups)
        built = build_on_meta(config, wanted, trust_remote_code=trust_remote_code)
        quantized = in_model_order(built, quantized)
        _read_generation_config(built, folder)
        shapes = stored_shapes(checkpoint, quantized)
    if tied_names(built):
        _compare_tied(built, checkpoint, quantized, groups)
    with collective_errors(groups):
        plan = choose_plan(built, plan, how)
        attach_mtp(built, plan)
        sources, unused = sources_for_reading(built, shapes)
        add_twins(built, sources)
        _check_readable(plan, checkpoint, quantized, unused)
        unsplit = _for_conversion(built, sources)
        rest = Unused(folder, {name: checkpoint.tensors[name] for name in unused})
        if groups.rank == 0 and (line := rest.note(type(built).__name__)):
            note(line)
    with collective_errors(groups), Reader(checkpoint) as reader:
        place = as_device(device)
        make_unsaved_buffers(built, place)
        part = apply_plan(built, plan, groups)
        total = sum(t.numel() * t.itemsize for t in part.state_dict(keep_vars=True).values())
        fill = CheckpointFill(reader, checkpoint.tensors, sources, unsplit, progress, total, quantized)
        filled = materialize(part, plan, groups, fill, place, fill.quantized_part if quantized else None, zero=zero)
        loop_over_quantized_experts(part)
    part.partita_unused = rest  # type: ignore[assignment]
    part.partita_quantized = kept_quantized(checkpoint, quantized, data)  # type: ignore[assignment]
    return watch(with_save_pretrained(keep_shards(filled.check(finish(part, plan, groups)), filled.shards)))


def shard(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    groups: ParallelGroups | None = None,
    rules: Rules | Mapping[str, str] | None = None,
    sample_input: Any = None,
    num_heads: int = 0,
    num_kv_heads: int = 0,
    **split: Unpack[SplitArguments],
) -> nn.Module:
    """Split a model in memory, in place; every rank calls it with an equal model. Returns the model.

    Args:
        model: An unsplit model of transformers, or any module whose paths match the plan's rules.
        plan: The plan (default: created from the model and the arguments below).
        tp: Tensor parallel ranks.
        pp: Pipeline parallel ranks.
        dp: Replicas.
        cp: Context parallel ranks, over which the sequences of training, and prompts with their cache, are split.
        ep: Ranks over which the experts of each layer are distributed.
        etp: Ranks over which each expert is split.
        layout: Layers of each stage.
        vpp: Stages on each pipeline rank.
        placement: Assignment of stages to ranks.
        groups: The groups of the plan's mesh (default: created from the initialized process group).
        rules: How to split which modules (default: the family's rules), as `Rules` or as the table of `Rules.parse`.
        sample_input: Inputs of a module that has no transformers config: a tensor, a tuple of arguments, or a dict of
            arguments by name. Before the split, every rank compares the split module with the unsplit one on rank 0's sample:
            outputs of all modules and all gradients, in float64.
        num_heads: Attention heads of a module without a config, for rules over `heads`.
        num_kv_heads: Its key and value heads (default: `num_heads`).

    Raises:
        PartitaError: The model cannot be split this way, or differs between the ranks; on every rank.

    Examples:
        >>> model = pt.shard(unsplit, tp=2)  # every rank has the same unsplit model
        >>> model.model.layers[0].mlp.down_proj.linear.weight.shape  # of [48, 96]
        torch.Size([48, 48])
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a module in memory; got {model!r:.100}. Use load() for a folder or a hub id.")
    init_process_group()
    how = SplitRequest.of(plan, split)
    groups = groups if groups is not None else make_groups(how.mesh)
    refuse_unequal(model, groups)
    sample_input = value_of_first(groups, sample_input)
    with collective_errors(groups):
        if rules is not None:
            if plan is not None:
                raise ModelError("rules and plan were both given, but a plan has its rules. Leave one out.")
            how = replace(how, rules=rules if isinstance(rules, Rules) else Rules.parse(rules))
        if sample_input is None:
            plan = choose_plan(model, plan, how)
        elif plan is None:
            plan = plan_on_sample(model, spec_of_module(model, num_heads, num_kv_heads), how, sample_input)
            note_replicated(plan, groups)
        else:
            plan = plan_on_sample(model, plan.spec, replace(how, rules=plan.rules), sample_input)
        if plan.num_mtp:
            raise ModelError("a model in memory has no layers of multi-token prediction (m). Use fresh() or load().")
    with collective_errors(groups):
        part = apply_plan(model, plan, groups)
    return watch(with_save_pretrained(finish(part, plan, groups)))


def choose_plan(model: nn.Module, plan: Plan | None, how: SplitRequest) -> Plan:
    """Return `plan`, or a plan of the unsplit `model` created as `how` says, after verifying it for the model.

    Raises:
        PartitaError: The plan fails, or none passes.
    """
    if plan is None:
        plan = plan_of_model(model, how.mesh, how.layout, how.rules, vpp=how.vpp, placement=how.placement)
    elif plan.spec.tied != {*(ties := tied_names(model)), *ties.values()}:
        # The plan was created from a config that ties other tensors than the model.
        if difference := plan.spec.first_difference(with_mtp(spec_of(model), plan.num_mtp)):
            raise ModelError(f"the plan is for another model: {difference}. Make the plan of this model.")
        plan = plan_of_model(model, plan.mesh, plan.layout, plan.rules, placement=plan.placement)
    else:
        prove_unless_proven(model, plan)
    prove_stages(model, plan)
    forbid_media(model, {**unmeasured_media(model, plan), **media_without_stages(model, plan)})
    return plan


def refuse_unequal(model: nn.Module, groups: ParallelGroups) -> None:
    """Raise for a model in memory whose values differ between the ranks. Every rank must call it.

    Raises:
        ModelError: A tensor differs; on every rank.
    """
    tensors = model.state_dict(keep_vars=True).items()
    own = {
        n: str(t.detach().sum(dtype=torch.float64).item()) for n, t in tensors if not t.is_meta and not t.is_complex()
    }
    for rank, other in enumerate(gather_from_all(groups, own)):
        name = next((n for n in (*own, *other) if own.get(n) != other.get(n)), None)
        if name is not None:
            raise ModelError(
                f"{name} of this rank's model differs from rank {rank}'s. Build an equal model on every rank, for example "
                "after torch.manual_seed(0), or load the same weights."
            )


def _forget_quantization(config: Any) -> None:
    """Make a config that of the model as if it were not quantized."""
    for part in (config, text_config_of(config)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _stored_dtype(
    checkpoint: Checkpoint, quantized: Mapping[str, QuantizedWeight], config: Any, groups: ParallelGroups
) -> torch.dtype | None:
    """The dtype of a checkpoint's weights; None if only the config defines it. Adds a note if the two disagree."""
    stored = stored_dtype(checkpoint, parts_of(quantized))
    line = dtype_note(checkpoint.folder, stored, {"dtype": getattr(config, "dtype", None)})
    if line and groups.rank == 0:
        note(line)
    return as_dtype(stored)


def _compare_tied(
    built: nn.Module, checkpoint: Checkpoint, quantized: Mapping[str, QuantizedWeight], groups: ParallelGroups
) -> None:
    """Untie tensors of `built` that its config ties although their values in the checkpoint differ. Every rank must call it."""
    with collective_errors(groups):
        sources, _ = sources_for_reading(built, stored_shapes(checkpoint, quantized))
    with Reader(checkpoint) as reader:
        read = CheckpointFill(reader, checkpoint.tensors, sources, built, quantized=quantized).read
        apart = differing(built, sources, read, groups)
    ties = tied_names(built)
    untie(built, apart)
    for name in sorted(apart) if groups.rank == 0 else ():
        note(
            f"{checkpoint.folder}: config.json ties {name} to {ties[name]}, but the checkpoint has different values for both: "
            "loaded untied."
        )


def read_config(source: Any, groups: ParallelGroups, *, trust_remote_code: bool) -> Any:
    """The config of a model; the first rank reports if code that comes with it runs. Raises like `read_hf_config`."""
    config = read_hf_config(source, trust_remote_code=trust_remote_code)
    if trust_remote_code and groups.rank == 0 and (line := code_note(source, config)):
        note(line)
    return config


def _read_generation_config(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's generation settings into a model, as `from_pretrained` does. Raises `ModelError` if malformed."""
    read_generation(folder)
    if getattr(model, "generation_config", None) is None:
        return
    from transformers import GenerationConfig

    has_file = (folder / FILE_NAME).is_file()
    name, options = (FILE_NAME, {}) if has_file else ("config.json", {"_from_model_config": True})
    try:
        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(folder, config_file_name=name, **options)
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{folder / name} cannot be read: {why[:300]}") from error


def _check_readable(
    plan: Plan, checkpoint: Checkpoint, quantized: Mapping[str, QuantizedWeight], unused: list[str]
) -> None:
    """Raise for a checkpoint whose values the model would misinterpret."""
    for name in unused:
        module, _, attribute = name.rpartition(".")
        if any(t.name == f"{module}.weight" for t in plan.spec.module_tensors(module)):
            if (
                attribute == "bias"
                and f"{module}.weight" in quantized
                and not read_small(checkpoint.tensors[name]).any()
            ):
                continue  # some packages write zeros where a layer has no bias
            raise ModelError(
                f"{checkpoint.folder}: tensor {name} belongs to {module}, but the model has no {attribute} there. The config "
                "does not belong to this checkpoint, or it is of a kind that cannot be read."
            )


def _for_conversion(built: nn.Module, sources: Mapping[str, Source]) -> nn.Module:
    """The unsplit model that transformers' converters need, if any: a copy of `built` before it is split."""
    return copy.deepcopy(built) if any(source.converter is not None for source in sources.values()) else built
