"""A new, split model with initial weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Unpack

import mlx.core as mx
import mlx.nn as nn

from partita.checkpoint.find import find_model
from partita.core.model.spec import read_config
from partita.core.plan import Plan
from partita.core.request import SplitArguments, SplitRequest
from partita.core.sharding.split import check_sizes
from partita.errors import ModelError
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.collectives.groups import ParallelGroups, make_groups
from partita.mlx.load import choose_plan, refuse_device
from partita.mlx.model.config import read_mlx_config
from partita.mlx.model.mlx_lm_models import build
from partita.mlx.proof.reference import check_reference
from partita.mlx.split.apply import apply_plan, finish
from partita.mlx.weights.fill import as_dtype
from partita.mlx.weights.initial import InitialFill, zero_scales
from partita.mlx.weights.naming import named
from partita.mlx.weights.origin import Origin


def fresh(
    config: str | os.PathLike[str] | Mapping[str, Any],
    plan: Plan | None = None,
    *,
    seed: int = 0,
    dtype: mx.Dtype | str | None = None,
    device: None = None,
    trust_remote_code: bool = False,
    backend: str | None = None,
    groups: ParallelGroups | None = None,
    **split: Unpack[SplitArguments],
) -> nn.Module:
    """Create this rank's part of a new model. The same seed gives the same unsplit weights on every mesh.

    Every rank of the run calls it; no rank ever holds more than one unsplit array. The values differ from the torch engine's,
    but have the same distributions. MLX's random state is seeded too.

    Args:
        config: A config file, a folder with one, a hub id, or plain data, in transformers' form.
        plan: The plan, for any engine (default: created from the arguments below).
        tp: Tensor parallel ranks.
        pp: Pipeline parallel ranks.
        dp: Replicas.
        layout: Layers of each stage.
        vpp: Stages on each pipeline rank (default: as many as `layout` has, else 1).
        placement: Assignment of stages to ranks: `loop`, or `v` for the schedule `zb-v`.
        seed: Seed of the weights.
        dtype: dtype of the weights (default: the config's).
        device: Must be None: MLX runs on its default device (`mx.set_default_device`).
        trust_remote_code: Has no effect: a model's own code is for transformers, and models with such code raise here.
        backend: Backend of MLX's communication (default: the one that the launcher prepared).
        groups: The groups of the mesh (default: created from the run).

    Raises:
        PartitaError: The model cannot be split this way, or saved under the names of transformers, or is to be quantized.

    Examples:
        >>> model = pm.fresh("./model/config.json", tp=2, seed=0)
        >>> pm.plan_of(model)[0].mesh
        Mesh(dp=1, pp=1, tp=2)
    """
    check_sizes(0, seed=seed)
    how = SplitRequest.of(plan, split)
    groups = groups if groups is not None else make_groups(how.mesh, backend=backend)
    with collective_errors(groups):
        refuse_device(device)
        source = find_model(config, weights=False) if isinstance(config, (str, os.PathLike)) else config
        plain, data = read_config(source), read_mlx_config(source)
        if "quantization" in data:
            raise ModelError(
                "new weights are not quantized, but the config is. Leave `quantization` and `quantization_config` out of it."
            )
        if groups.rank == 0:
            check_reference(data)
        new = named(lambda: _built(data, seed), plain)
        plan = choose_plan(new.model, plan, how, data)
        wanted = as_dtype(dtype) or as_dtype(plan.spec.dtype) or mx.float32
        fill = InitialFill(data, zero_scales(new.model), seed, wanted)
    with collective_errors(groups):
        part = apply_plan(new.model, plan, groups.tp, groups.pp.rank)
        fill(part, plan, groups.tp.rank)
    part.partita_origin = Origin(new.sources, new.tensors, config=plain)
    return finish(part, plan, groups)


def _built(config: Mapping[str, Any], seed: int) -> nn.Module:
    """The unsplit model; its own initialization, when evaluated, uses this seed."""
    mx.random.seed(seed)
    return build(config)
