"""The seed's call: an existing model, split into one stage per rank."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from partita.core.layout.layout import LayerType
from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.core.sharding.rules import Rules
from partita.core.sharding.split import deal
from partita.errors import ModelError, PlanError
from partita.torch.collectives.collective_errors import collective_errors_in
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import init_process_group, single_groups
from partita.torch.loops.watch import watch
from partita.torch.model.towers import forbid_media
from partita.torch.model.transformers_models import spec_of
from partita.torch.proof.stages import media_without_stages, prove_stages
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from partita.torch.weights.pretrained import with_save_pretrained


def pipeline_auto_parallel(
    model: nn.Module,
    group: dist.ProcessGroup | Communicator | None = None,
    start_layer: int | None = None,
    end_layer: int | None = None,
) -> nn.Module:
    """Keep of an unsplit model, in place, this rank's slice of layers; calling it gives every rank the final output.

    Every rank of the group must call it with an equal model. Afterwards every rank calls `model(...)` as before, at the
    same time: forward, backward and transformers' own `generate` work. The first rank has the embedding, the last the head.

    Args:
        model: A model with a list of layers: of transformers, or any module with an `nn.ModuleList` whose layers are called
            in turn with the hidden state first. Such a module is not verified, since no test inputs are
            known; a transformers model is verified first, unless its family was measured.
        group: The ranks (default: all).
        start_layer: The first layer of this rank (default: an even distribution, larger parts on the first ranks).
        end_layer: The layer after its last. If one of the two is omitted, both are.

    Returns:
        The model.

    Raises:
        PlanError: The slices of the ranks do not cover the model.
        ModelError: The model has no list of layers that can be partitioned.

    Source: `pipeline_auto_parallel` of LocalAI's `backend/python/mlx-distributed/sharding.py`.
    """
    init_process_group()
    comm = group if isinstance(group, Communicator) else Communicator(group)
    mesh = Mesh(pp=comm.size)
    groups = single_groups(mesh=mesh, pp=comm)
    slices: list[Any] = comm.all_gather_object((start_layer, end_layer))
    with collective_errors_in(comm):
        spec = spec_of(model)
        if not spec.layers:
            raise ModelError(
                f"no list of layers was found in {type(model).__name__}, so it cannot be split into stages."
            )
        counts = _counts(slices, spec.num_layers)
        layout = [[LayerType.decoder] * count for count in counts]
        layout[0] = [LayerType.embedding, *layout[0]]
        layout[-1] = [*layout[-1], LayerType.loss]
        plan = Plan.make(spec, mesh, layout, Rules(()))
        if hasattr(model, "config"):
            prove_stages(model, plan)
            forbid_media(model, media_without_stages(model, plan))
        split = apply_plan(model, plan, groups)
    return watch(with_save_pretrained(finish(split, plan, groups)))


def _counts(slices: list[tuple[int | None, int | None]], num_layers: int) -> list[int]:
    """Layers of each rank; the slices must be consecutive and cover all layers."""
    even = deal(num_layers, len(slices), allow_empty=True)
    counts, place = [], 0
    for rank, (start, stop) in enumerate(slices):
        if start is None or stop is None:
            start = sum(even[:rank])
            stop = start + even[rank]
        if start != place or not start <= stop <= num_layers:
            raise PlanError(
                f"rank {rank} requests layers {start} to {stop} (end_layer not included), but the ranks before it end at "
                f"{place} and the model has {num_layers} layers. Make the slices consecutive, or omit them on all ranks."
            )
        counts.append(stop - start)
        place = stop
    if place != num_layers:
        raise PlanError(f"the slices of the ranks end at layer {place}, but the model has {num_layers} layers.")
    return counts
