"""A new, split model with initial weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import nn

from partita.checkpoint.find import find_model
from partita.core.plan import Plan
from partita.core.request import SplitArguments, SplitRequest
from partita.core.sharding.split import check_sizes
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.collectives.groups import ParallelGroups, init_process_group, make_groups
from partita.torch.load import choose_plan, read_config
from partita.torch.loops.watch import watch
from partita.torch.model.transformers_models import build_on_meta
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from partita.torch.stages.mtp import attach_mtp
from partita.torch.training.kept_shards import keep_shards
from partita.torch.weights.fill import as_device, as_dtype
from partita.torch.weights.initial import FreshFill, record_initialization
from partita.torch.weights.materialize import make_unsaved_buffers, materialize
from partita.torch.weights.pretrained import with_save_pretrained
from partita.training.settings import check_zero


def fresh(
    config: str | os.PathLike[str] | Mapping[str, Any] | Any,
    plan: Plan | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    groups: ParallelGroups | None = None,
    trust_remote_code: bool = False,
    zero: int = 0,
    **split: Unpack[SplitArguments],
) -> nn.Module:
    """Create this rank's part of a new model. The same seed gives the same unsplit weights on every mesh.

    Args:
        config: A config file, a folder with one, a hub id, plain data, or transformers' config.
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
        seed: Seed of the weights.
        dtype: dtype of the weights (default: the config's).
        device: Device of the weights (default: this rank's CUDA device, else the CPU).
        groups: The groups of the mesh (default: created from the initialized process group).
        trust_remote_code: Whether to run code that comes with the config (its `auto_map`). Read it before you do.
        zero: With 3 each replica keeps only its shard of every parameter (see `load`).

    Raises:
        PartitaError: The model cannot be split this way, or does not define the initial value of a tensor.

    Examples:
        >>> model = pt.fresh("./model/config.json", tp=2, seed=0)
        >>> pt.plan_of(model)[0].mesh
        Mesh(dp=1, pp=1, tp=2)
    """
    init_process_group()
    check_sizes(0, seed=seed)
    check_zero(zero)
    how = SplitRequest.of(plan, split)
    groups = groups if groups is not None else make_groups(how.mesh)
    with collective_errors(groups):
        source = config
        if isinstance(config, (str, os.PathLike)):
            source = find_model(config, weights=False, code=trust_remote_code)
        read = read_config(source, groups, trust_remote_code=trust_remote_code)
        built = build_on_meta(read, as_dtype(dtype), trust_remote_code=trust_remote_code)
        plan = choose_plan(built, plan, how)
        attach_mtp(built, plan)
        recipes = record_initialization(built)
    with collective_errors(groups):
        place = as_device(device)
        make_unsaved_buffers(built, place)
        part = apply_plan(built, plan, groups)
        filled = materialize(part, plan, groups, FreshFill(recipes, seed), place, zero=zero)
    return watch(with_save_pretrained(keep_shards(filled.check(finish(part, plan, groups)), filled.shards)))
