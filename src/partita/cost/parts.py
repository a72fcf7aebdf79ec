"""Seconds and bytes of one stage, from which a planner assigns layers to stages: the terms of `step` and `memory`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from partita.cost.activations import Shape
from partita.cost.alive import Counts, alive
from partita.cost.degrees import Degrees, degrees_of
from partita.cost.estimate import limit_of
from partita.cost.hardware import Hardware
from partita.cost.kernels import Kernels, kernels_of
from partita.cost.memory import (
    Moment,
    distribution,
    held_bytes,
    memory_of,
    moments,
    stage_activations,
    total_at_peak,
    training_shape,
    weight_dtype,
)
from partita.cost.model import ModelCost
from partita.cost.stages import StageCost, stages_of
from partita.cost.time import end_of_step, seconds_of_forward, seconds_of_stage, slowest_of
from partita.cost.work import Arrangement, MemoryUse, Work


def stage_s(
    model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware, pp: int, stage: StageCost
) -> tuple[float, float]:
    """Seconds of a stage on pipeline rank `pp`, and of its forward: of a micro-batch, or of a group's prompts and tokens."""
    degrees = degrees_of(arrangement.mesh)
    if work.purpose == "train":
        shape = training_shape(work, arrangement, degrees, weight_dtype(model, work))
        of = partial(seconds_of_stage, model, stage, shape, work, arrangement, hardware, degrees)
        trained = slowest_of(hardware, degrees, pp, of)
        return trained.total, trained.f
    each = math.ceil(math.ceil(work.sequences / degrees.dp) / arrangement.microbatches)
    dtype = weight_dtype(model, work)
    past = max(1, (work.sequence_length + work.context) // 2 // degrees.cp)
    prompt = Shape(each, math.ceil(work.sequence_length / degrees.cp), work.sequence_length, dtype, degrees.tp)
    token = Shape(each, 1, past, dtype, degrees.tp)

    def forward(shape: Shape, past: int) -> float:
        return slowest_of(
            hardware,
            degrees,
            pp,
            lambda device: seconds_of_forward(model, stage, shape, hardware, degrees, past, device),
        ).f

    total = forward(prompt, 0) + new_tokens(work) * forward(token, past)
    return total, total


def end_of_step_s(model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware) -> float:
    """Seconds in which the slowest rank sums gradients over replicas and updates weights; 0 if the sums may be hidden."""
    if arrangement.overlap_gradients:
        return 0.0
    degrees = degrees_of(arrangement.mesh)
    groups = degrees.groups(hardware)
    unlike = {stage: pp for pp, stage in enumerate(stages_of(model, arrangement))}
    return max(sum(end_of_step(model, work, arrangement, hardware, degrees, groups, pp, [])) for pp in unlike.values())


def new_tokens(work: Work) -> int:
    """Tokens that are decoded for a sequence: what the cache has room for behind the prompt."""
    return max(1, work.context - work.sequence_length)


@dataclass(frozen=True)
class StageBytes:
    """Bytes of what a stage may have, of the tensor rank with the most.

    Attributes:
        kinds: Of a layer of each kind, but for what it keeps of micro-batches.
        kept: What a layer of each kind keeps of a micro-batch.
        rank: Of a rank that has at least a layer of each kind, besides: for no end of the model, the embedding, the loss, both.
        embedding: What the embedding keeps of a micro-batch.
    """

    kinds: tuple[float, ...]
    kept: tuple[float, ...]
    rank: tuple[float, float, float, float]
    embedding: float


def stage_bytes(model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware) -> StageBytes:
    """The terms of `memory`: a stage has no more bytes than they add up to."""
    degrees = degrees_of(arrangement.mesh)
    kernels = kernels_of(hardware.kernels)
    trains = work.purpose == "train"
    shape = training_shape(work, arrangement, degrees, weight_dtype(model, work))
    ranks = model.sliced(*degrees.split).distinct
    kinds = range(len(model.first))

    def kept(stage: StageCost) -> float:
        if not trains:
            return 0.0
        return max(stage_activations(model, stage, shape, kernels, arrangement, tp) for tp in ranks)

    if trains:
        uses = _training_bytes(model, work, arrangement, degrees, kernels, shape)
    else:
        uses = [
            [memory_of(model, work, arrangement, degrees, kernels, (stage,), ((0,),), tp).total for tp in ranks]
            for stage in _samples(model)
        ]
    base, ends = uses[0], [max(uses[0]), *map(max, uses[1:4])]
    layers = [max(more - one for more, one in zip(use, base, strict=True)) for use in uses[4:]]
    key = ("kept", shape, arrangement.recompute, degrees.split, kernels.name) if trains else ("nothing is kept",)
    found: tuple[tuple[float, ...], float] | None = model.cache.get(key)
    if found is None:
        of_kinds = tuple(kept(StageCost(((kind, 1),), 0, embedding=False, loss=False)) for kind in kinds)
        found = model.cache[key] = of_kinds, kept(StageCost((), 0, embedding=True, loss=False))
    rest = sum(layers)
    return StageBytes(
        tuple(layers), found[0], (ends[0] - rest, ends[1] - rest, ends[2] - rest, ends[3] - rest), found[1]
    )


def _samples(model: ModelCost) -> list[StageCost]:
    """Stages with a layer of each kind: with no end of the model, the embedding, the loss, both; then one more of each kind."""
    kinds = range(len(model.first))
    every = tuple((kind, 1) for kind in kinds)
    ends = [
        StageCost(every, model.mtp if loss else 0, embedding=embedding, loss=loss)
        for embedding, loss in ((False, False), (True, False), (False, True), (True, True))
    ]
    more = (tuple((k, 2 if k == kind else 1) for k in kinds) for kind in kinds)
    return [*ends, *(StageCost(counts, 0, embedding=False, loss=False) for counts in more)]


def _training_bytes(
    model: ModelCost, work: Work, arrangement: Arrangement, degrees: Degrees, kernels: Kernels, shape: Shape
) -> list[list[int]]:
    """The bytes of `_samples` on each tensor rank that differs.

    Many arrangements hold the same, others have the same moments: both are kept apart.
    """
    replicas = degrees.replicas, degrees.expert_replicas
    key: tuple[object, ...] = "sampled bytes", work, arrangement.zero, replicas, degrees.split
    held: list[list[MemoryUse]] | None = model.cache.get(key)
    ranks = model.sliced(*degrees.split).distinct
    if held is None:
        held = model.cache[key] = [
            [held_bytes(model, work, arrangement, degrees, (stage,), tp) for tp in ranks] for stage in _samples(model)
        ]
    key = (
        "sampled moments", shape, arrangement.recompute, distribution(work, arrangement, degrees, kernels), degrees.pp > 1,
        degrees.split, kernels.name,
    )  # fmt: skip
    found: list[list[tuple[Moment, ...]]] | None = model.cache.get(key)
    if found is None:
        found = model.cache[key] = [
            [moments(model, work, arrangement, degrees, kernels, (stage,), ((0,),), tp) for tp in ranks]
            for stage in _samples(model)
        ]
    return [
        [total_at_peak(one, its) for one, its in zip(uses, those, strict=True)]
        for uses, those in zip(held, found, strict=True)
    ]


def alive_of(work: Work, arrangement: Arrangement) -> tuple[tuple[Counts, ...], ...]:
    """For each pipeline rank the micro-batches that it keeps alive, by virtual stage (see `partita.cost.alive`)."""
    if work.purpose != "train":
        return (((0,) * arrangement.vpp,),) * arrangement.mesh.pp
    return alive(arrangement.schedule, arrangement.mesh.pp, arrangement.microbatches, arrangement.vpp)


def limits(hardware: Hardware, ranks: int) -> tuple[int, ...]:
    """The bytes that each rank may use."""
    hardware = hardware.for_ranks(ranks)
    if len(hardware.devices) == 1:
        return (limit_of(hardware, 0),) * ranks
    return tuple(limit_of(hardware, rank) for rank in range(ranks))
