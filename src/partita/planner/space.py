"""The arrangements that there are: meshes, groups of arrangements with the same pipeline, and their settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TypeVar

from partita.core.layout.placement import Placement, home_of
from partita.core.mesh import Mesh
from partita.cost.work import Recompute, Work
from partita.errors import PlanError, ScheduleError
from partita.planner.engines import Features
from partita.schedule import KINDS, check_kind, placement_of

_T = TypeVar("_T")

SCHEDULES = tuple(kind for kind in KINDS if kind != "forward-only")
"""The schedules that train."""


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """The parts of an arrangement that are not for the planner to choose; None for those that are.

    Attributes:
        tp: Tensor parallel ranks.
        pp: Pipeline ranks.
        dp: Replicas.
        cp: Ranks over which every sequence is split.
        ep: Groups of ranks over which experts are distributed.
        etp: Ranks over which each expert is split, where experts are distributed; 1 unless it is fixed.
        vpp: Stages on each pipeline rank.
        layers: Decoder layers of each stage.
        schedule: The pipeline schedule.
        microbatches: Micro-batches of a replica's share of a step.
        zero: The stage of ZeRO.
        recompute: What is recomputed.
        sequence_parallel: Whether activations between products are split over the tokens.
        overlap_gradients: Whether gradients are summed over replicas while the backward runs.
    """

    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    cp: int | None = None
    ep: int | None = None
    etp: int | None = None
    vpp: int | None = None
    layers: tuple[int, ...] | None = None
    schedule: str | None = None
    microbatches: int | None = None
    zero: int | None = None
    recompute: Recompute | None = None
    sequence_parallel: bool | None = None
    overlap_gradients: bool | None = None

    @property
    def given(self) -> dict[str, object]:
        """The parts that are fixed, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Family:
    """Arrangements with the same mesh and micro-batches.

    Attributes:
        mesh: The ranks.
        microbatches: Micro-batches of a replica's share of a step.
    """

    mesh: Mesh
    microbatches: int


@dataclass(frozen=True)
class Group:
    """Arrangements that differ only in layers and settings.

    Attributes:
        mesh: The ranks.
        microbatches: Micro-batches of a replica's share of a step.
        schedule: The pipeline schedule.
        vpp: Stages on each pipeline rank.
    """

    mesh: Mesh
    microbatches: int
    schedule: str
    vpp: int

    @property
    def placement(self) -> Placement:
        """The placement of the stages."""
        return placement_of(self.schedule) if self.mesh.pp > 1 else "loop"

    @property
    def homes(self) -> tuple[int, ...]:
        """The pipeline rank of each stage."""
        return _homes(self.placement, self.mesh.pp, self.mesh.pp * self.vpp)


@lru_cache(maxsize=1024)
def _homes(placement: Placement, pp: int, stages: int) -> tuple[int, ...]:
    return tuple(home_of(placement, pp, stage)[0] for stage in range(stages))


@dataclass(frozen=True)
class Settings:
    """What each arrangement of a group chooses besides its layers, but for what it recomputes."""

    zero: int
    sequence_parallel: bool
    overlap_gradients: bool


@dataclass(frozen=True)
class Bound:
    """What no arrangement of a mesh goes below.

    Attributes:
        seconds: Seconds of the work (see `Costs.seconds_of`).
        bytes: Bytes of the rank that needs most of its memory.
        limit: Bytes that this rank may use.
    """

    seconds: float
    bytes: int
    limit: int

    @property
    def can_fit(self) -> bool:
        """Whether an arrangement of the mesh may fit."""
        return self.bytes <= self.limit


@dataclass(frozen=True)
class Most:
    """The largest sizes of a mesh's axes that a model can use; larger ones must be fixed.

    Attributes:
        tp: Tensor ranks: the heads.
        pp: Pipeline ranks: the layers.
        cp: Context ranks: the tokens of a sequence; 1 where sequences cannot be split.
        ep: Groups with different experts: the experts; 1 without.
    """

    tp: int
    pp: int
    cp: int = 1
    ep: int = 1


EVERY_SIZE = 16
"""Ranks of a stage up to which every number of ranks for experts is tried."""

SIZES_OF_EXPERTS = (8, 64)
"""What is tried of more ranks, besides 1, the tensor ranks, and as many as possible: those of one node, and of several."""


def meshes(ranks: int, fixed: Fixed, most: Most, features: Features) -> Iterator[Mesh]:
    """Every mesh of that many ranks whose sizes are fixed, or that the model can use and the engine executes.

    Raises:
        PlanError: No mesh of `ranks` ranks has the sizes that are fixed.
    """
    named_sizes = (("tp", fixed.tp), ("pp", fixed.pp), ("dp", fixed.dp), ("cp", fixed.cp))
    sizes = {name: size for name, size in named_sizes if size is not None}
    taken, is_whole = math.prod(sizes.values()), {"tp", "pp", "dp"} <= sizes.keys()
    if ranks % taken or (is_whole and taken != ranks):
        named = " x ".join(f"{name} {value}" for name, value in sizes.items())
        rule = "be" if is_whole else "divide"
        raise PlanError(
            f"the fixed sizes {named} must {rule} the {ranks} ranks, but come to {taken}. Change one of them."
        )
    contexts = most.cp if features.context else 1
    for tp in _sizes(fixed.tp, ranks, most.tp):
        for pp in _sizes(fixed.pp, ranks // tp, most.pp):
            for cp in _sizes(fixed.cp, ranks // (tp * pp), contexts):
                dp = ranks // (tp * pp * cp)
                if fixed.dp in (None, dp):
                    yield from _with_experts(Mesh(dp=dp, pp=pp, tp=tp, cp=cp), fixed, most.ep, features)


def _sizes(fixed: int | None, ranks: int, most: int) -> Sequence[int]:
    """The sizes of an axis that divide `ranks`: the fixed one, or all up to `most`."""
    if fixed is not None:
        return () if ranks % fixed else (fixed,)
    return [size for size in divisors(ranks) if size <= most]


def _with_experts(mesh: Mesh, fixed: Fixed, most: int, features: Features) -> Iterator[Mesh]:
    """The mesh with each distribution of experts over the ranks of its stages."""
    sizes = _sizes(fixed.ep, mesh.stage_size, most)
    if mesh.stage_size > EVERY_SIZE and fixed.ep is None:
        sizes = sorted({1, max(sizes), *(size for size in (mesh.tp, *SIZES_OF_EXPERTS) if size in sizes)})
    for ep in sizes:
        made = with_experts(mesh, ep, fixed, features)
        if made is not None:
            yield made


def with_experts(mesh: Mesh, ep: int, fixed: Fixed, features: Features) -> Mesh | None:
    """The mesh with experts distributed over `ep` ranks; None if they cannot be, or if the engine does not execute it."""
    if ep == 1 and fixed.etp not in (None, mesh.tp):
        return None
    try:
        made = replace(mesh, ep=ep, etp=None if ep == 1 else fixed.etp or 1)
    except PlanError:
        return None  # ep x etp does not divide the ranks of a stage
    return made if fixed.ep is not None or features.executes_experts(made) else None


def families(mesh: Mesh, work: Work, fixed: Fixed) -> Iterator[Family]:
    """Every family of a mesh: the micro-batches that `partita train` accepts for it."""
    if work.purpose != "train":
        share = -(-work.sequences // mesh.dp)
        microbatches = fixed.microbatches or min(share, mesh.pp)
        if not mesh.experts_join_replicas and mesh.dp <= work.sequences and microbatches <= share:
            yield Family(mesh, microbatches)
        return
    if work.batch_size % mesh.dp:
        return
    share = work.batch_size // mesh.dp
    for microbatches in divisors(share) if fixed.microbatches is None else [fixed.microbatches]:
        if share % microbatches:
            continue
        if fixed.cp is None and fixed.dp is None and math.gcd(share // microbatches, mesh.cp) > 1:
            continue  # as many replicas with fewer sequences each have the same tokens, and exchange no keys
        yield Family(mesh, microbatches)


def groups(family: Family, work: Work, fixed: Fixed, num_layers: int) -> Iterator[Group]:
    """Every group of a family: the schedules and numbers of stages that `partita train` accepts for it."""
    mesh, microbatches = family.mesh, family.microbatches
    if work.purpose != "train":
        vpp = fixed.vpp or (len(fixed.layers) // mesh.pp if fixed.layers else 1)
        if fixed.layers is None or len(fixed.layers) == mesh.pp * vpp:
            yield Group(mesh, microbatches, "forward-only", vpp)
        return
    for schedule in _schedules(mesh, fixed):
        for vpp in _stages(mesh, schedule, fixed, num_layers):
            is_twin = schedule == "interleaved-1f1b" and vpp == 1 and fixed.schedule is None  # that is 1f1b
            if not is_twin and _exists(schedule, mesh.pp, microbatches, vpp):
                yield Group(mesh, microbatches, schedule, vpp)


def settings(mesh: Mesh, work: Work, fixed: Fixed, features: Features) -> list[Settings]:
    """Every combination of settings of a mesh that an engine executes, and those that are fixed."""
    if work.purpose != "train":
        sequence = fixed.sequence_parallel or False
        return [Settings(0, sequence, False)]
    zeros = _choices(fixed.zero, features.zero, matters=mesh.dp * mesh.cp > 1, without=0)
    sequences = _choices(fixed.sequence_parallel, features.sequence_parallel, matters=mesh.tp > 1, without=False)
    overlaps = _choices(
        fixed.overlap_gradients, features.overlap_gradients, matters=mesh.dp * mesh.cp > 1, without=False
    )
    return [Settings(zero, sequence, overlap) for zero in zeros for sequence in sequences for overlap in overlaps]


def recomputes(work: Work, fixed: Fixed, features: Features) -> tuple[Recompute, ...]:
    """What may be recomputed, from the fastest to what needs the least memory."""
    if work.purpose != "train":
        return ("none",)
    return features.recompute if fixed.recompute is None else (fixed.recompute,)


def divisors(number: int) -> list[int]:
    """The divisors of a number, the smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def _choices(fixed: _T | None, possible: Sequence[_T], *, matters: bool, without: _T) -> Sequence[_T]:
    """The fixed value, or all possible ones; only `without` where the mesh makes no difference between them."""
    if fixed is not None:
        return (fixed,)
    return possible if matters else (without,)


def _schedules(mesh: Mesh, fixed: Fixed) -> Sequence[str]:
    if mesh.pp == 1:
        return () if fixed.schedule == "zb-v" else (fixed.schedule or "1f1b",)
    return SCHEDULES if fixed.schedule is None else (fixed.schedule,)


def _stages(mesh: Mesh, schedule: str, fixed: Fixed, num_layers: int) -> Sequence[int]:
    """The numbers of stages on a rank to choose from."""
    if fixed.layers is not None:
        return () if len(fixed.layers) % mesh.pp else (len(fixed.layers) // mesh.pp,)
    if fixed.vpp is not None:
        return (fixed.vpp,)
    if schedule == "interleaved-1f1b":
        if mesh.pp == 1:
            return (1,)
        # Of the numbers with the same largest stage, the smallest: more stages are then no shorter.
        largest = {vpp: -(-num_layers // (mesh.pp * vpp)) for vpp in range(num_layers // mesh.pp, 1, -1)}
        return sorted({layers: vpp for vpp, layers in largest.items()}.values())
    if schedule == "zb-v":
        return (2,) if 2 * mesh.pp <= num_layers else ()
    return (1,)


def _exists(schedule: str, pp: int, microbatches: int, vpp: int) -> bool:
    try:
        check_kind(schedule, pp, microbatches, vpp)
    except ScheduleError:
        return False
    return True
