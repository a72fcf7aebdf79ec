"""The costs of a model on a machine, in the form in which the search asks for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from partita.core.layout.placement import home_of, stage_at
from partita.core.mesh import Mesh
from partita.core.model.spec import ModelSpec
from partita.cost.estimate import estimate, lower_bound
from partita.cost.hardware import Hardware
from partita.cost.memory import memory
from partita.cost.model import ModelCost
from partita.cost.parts import StageBytes, alive_of, end_of_step_s, limits, new_tokens, stage_bytes, stage_s
from partita.cost.stages import StageCost
from partita.cost.time import least_end_of_step_s
from partita.cost.work import Arrangement, Estimate, MemoryUse, Recompute, Work
from partita.planner.costs import CostsOf
from partita.planner.layers import PRECISION, Amounts, Memory, loads_of
from partita.planner.space import Bound, Family, Group, Most, Settings

_BELOW = 1 - 1e-6
"""A bound is that much below what it adds up, for sums are rounded."""

LONG = 8192
"""Tokens of a sequence from which the search splits it over ranks; shorter ones only where ranks would have none."""

_NOTHING = StageCost((), 0, embedding=False, loss=False)


class _Needs(NamedTuple):
    """What a pipeline rank keeps besides layers, and of each of them at least.

    Attributes:
        end: The ends of the model that it has: 1 for the embedding, 2 for the loss, 3 for both.
        first: Micro-batches that the model's first stage keeps alive, if it is on this rank.
        kept: Micro-batches of the stage that keeps the fewest.
    """

    end: int
    first: int
    kept: int

    def outside(self, parts: StageBytes) -> float:
        """Bytes besides the layers."""
        return parts.rank[self.end] + self.first * parts.embedding


@dataclass(frozen=True)
class _Parts:
    """Seconds, and those of the forward: of a layer of each kind, a stage without layers, the embedding, and the loss."""

    kinds: tuple[tuple[float, float], ...]
    empty: tuple[float, float]
    embedding: tuple[float, float]
    loss: tuple[float, float]


class ModelCosts:
    """The costs of `work` with a model on `hardware`, which has as many ranks as the search uses."""

    def __init__(self, model: ModelCost, work: Work, hardware: Hardware, ranks: int) -> None:
        self._model, self._work, self._hardware = model, work, hardware.for_ranks(ranks)
        self.most = Most(
            model.spec.num_heads or ranks, model.spec.num_layers,
            model.longest_split(work.sequence_length) if _may_split_sequences(work, ranks) else 1,
            model.num_experts if model.has_fused_experts else 1,
        )  # fmt: skip
        self._seconds: dict[tuple[object, ...], Amounts] = {}
        self._found: dict[tuple[object, ...], _Parts] = {}
        self._wholes: dict[tuple[object, ...], tuple[float, float]] = {}
        self._ends: dict[tuple[object, ...], float] = {}
        self._counts = Counter(model.kinds)
        self._parts_of: dict[tuple[object, ...], StageBytes] = {}
        self._bytes: dict[Arrangement, Memory] = {}
        self._kept: dict[tuple[object, ...], tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {}
        self._limits: dict[int, tuple[int, ...]] = {}
        self._needs: dict[tuple[object, ...], tuple[tuple[_Needs, int], ...]] = {}
        self._limits_by_rank: dict[Mesh, tuple[float, ...]] = {}

    def bound(self, mesh: Mesh) -> Bound:
        """What all arrangements of a mesh need at least."""
        seconds, bytes_ = lower_bound(self._model, self._work, mesh, self._hardware)
        if self._work.purpose != "train":
            seconds *= new_tokens(self._work)
        return Bound(seconds, bytes_, max(self.limit(mesh)))

    def least_seconds_of_family(
        self, family: Family, recompute: Recompute = "none", parallel: Sequence[bool] = (False, True)
    ) -> float:
        """The seconds of the layers alone, evenly distributed: no schedule has no bubble."""
        group = Group(family.mesh, family.microbatches, "1f1b", 1)
        return family.microbatches * self._least(group, recompute, parallel)[0] / family.mesh.pp * _BELOW

    def least_share_of_family(self, family: Family, recompute: Recompute, chosen: Settings) -> float:
        """The share of the memory of all ranks together that all layers need with one micro-batch alive on each rank."""
        pp = family.mesh.pp
        bare = self._bare(Group(family.mesh, family.microbatches, "1f1b", 1), recompute, chosen)
        parts = self._parts_bytes(bare)
        held = sum(n * (parts.kinds[kind] + parts.kept[kind]) for kind, n in self._counts.items()) + parts.embedding
        middle, first, last, both = parts.rank
        ends = both + (pp - 1) * middle if pp == 1 else min(
            both + (pp - 1) * middle, first + last + (pp - 2) * middle)  # fmt: skip
        return (held + ends) / sum(self._limits_of(family.mesh))

    def least_seconds(
        self, group: Group, recompute: Recompute = "none", chosen: Settings | None = None,
        parallel: Sequence[bool] = (False, True),
    ) -> float:  # fmt: skip
        """The seconds of the layers alone, evenly distributed, and of the bubble that no assignment avoids.

        Letters: p ranks, v stages of a rank, m micro-batches, S the seconds of all stages, a share q of them the forwards.
        A rank of zb-h1 and zb-h2 starts when the first micro-batch has passed those before it: with T seconds it has at most
        t = (T - q times what they have) / m, and all ranks together have S = T / q (1 - (1 - q / m)^p).
        """
        p, v, m = group.mesh.pp, group.vpp, group.microbatches
        if chosen is None or self._work.purpose != "train":
            (total, forward), end = self._least(group, recompute, parallel), 0.0
        else:
            total, forward = self._whole(group, recompute, chosen.sequence_parallel, gathers=chosen.zero >= 3)
            end = self._end(group, chosen)
        if p == 1:
            return (m * total + end) * _BELOW
        if group.schedule == "interleaved-1f1b":
            least = (m + (p - 1) / v) * total / p
        elif group.schedule in ("zb-h1", "zb-h2"):
            q = forward / total
            least = q * total / (1 - (1 - q / m) ** p)
        elif group.schedule == "zb-v":
            least = m * total / p
        elif self._work.purpose == "train":
            least = total + (m - 1) * total / p
        else:
            least = max(total, m * total / p)
        return (least + end) * _BELOW

    def least_seconds_of(self, arrangement: Arrangement) -> float:
        """The seconds that a complete arrangement needs at least: its ranks start when the first micro-batch has come."""
        times = self.stage_seconds(arrangement).of(arrangement.layers)
        if not arrangement.schedule.startswith("zb"):
            return 0.0  # its estimate takes no longer than this
        homes = [home_of(arrangement.placement, arrangement.mesh.pp, index)[0] for index in range(len(times))]
        starts = (0.0, *accumulate(self._forwards(arrangement, homes[: arrangement.mesh.pp])))
        loads = loads_of(times, homes)
        latest = max(start + arrangement.microbatches * load for start, load in zip(starts, loads, strict=False))
        return _BELOW * (latest + end_of_step_s(self._model, self._work, arrangement, self._hardware))

    def _forwards(self, arrangement: Arrangement, homes: Sequence[int]) -> Iterator[float]:
        """Seconds of a micro-batch's forward on each of the first stages, which are on the ranks `homes`."""
        start, last = 0, len(arrangement.layers) - 1
        for stage, home in enumerate(homes):
            parts = self._parts(arrangement, 0 if self._hardware.is_uniform else home)
            end = start + arrangement.layers[stage]
            ends = parts.embedding[1] * (stage == 0) + parts.loss[1] * (stage == last)
            yield parts.empty[1] + ends + sum(parts.kinds[kind][1] for kind in self._model.kinds[start:end])
            start = end

    def stage_seconds(self, arrangement: Arrangement) -> Amounts:
        """Seconds of a micro-batch by stage and layer."""
        key = (
            arrangement.mesh, arrangement.microbatches, arrangement.placement, len(arrangement.layers),
            arrangement.recompute, arrangement.sequence_parallel, arrangement.zero >= 3,
        )  # fmt: skip
        if key not in self._seconds:
            self._seconds[key] = self._stage_seconds(arrangement)
        return self._seconds[key]

    def stage_bytes(self, arrangement: Arrangement) -> Memory:
        """Bytes by stage and layer, and the limits of the pipeline ranks."""
        if arrangement not in self._bytes:
            self._bytes[arrangement] = self._stage_bytes(arrangement)
        return self._bytes[arrangement]

    def memory(self, arrangement: Arrangement) -> tuple[MemoryUse, ...]:
        """The bytes of every rank."""
        return memory(self._model, self._work, arrangement, self._hardware.kernels)

    def limit(self, mesh: Mesh) -> tuple[int, ...]:
        """The bytes that every rank may use."""
        if mesh.size not in self._limits:
            self._limits[mesh.size] = limits(self._hardware, mesh.size)
        return self._limits[mesh.size]

    def estimate(self, arrangement: Arrangement) -> Estimate:
        """What a complete arrangement costs."""
        return estimate(self._model, self._work, arrangement, self._hardware)

    def seconds_of(self, estimate: Estimate) -> float:
        """Seconds of the work."""
        return seconds_of(self._work, estimate)

    def least_bytes(self, arrangement: Arrangement) -> float:
        """The bytes that all layers need at least, on the mean pipeline rank."""
        parts, needs = self._parts_bytes(arrangement), self._needs_of(arrangement)
        fewest = min([need.kept for need, _ in needs])
        held = 0.0
        for kind, n in self._counts.items():
            held += n * (parts.kinds[kind] + fewest * parts.kept[kind])
        ends: float = sum([n * need.outside(parts) for need, n in needs])
        return (held + ends) / arrangement.mesh.pp

    def least_share(self, arrangement: Arrangement) -> float:
        """The share of the memory of all ranks together that all layers need at least."""
        return self.least_bytes(arrangement) * arrangement.mesh.pp / sum(self._limits_of(arrangement.mesh))

    def is_short(self, arrangement: Arrangement, slack: float = 0.0) -> bool:
        """Whether no assignment fits, as `Memory.is_short`, which this equals, finds from the bytes of every stage."""
        if not self._hardware.is_uniform:
            homes = [home_of(arrangement.placement, arrangement.mesh.pp, i)[0] for i in range(len(arrangement.layers))]
            return self.stage_bytes(arrangement).is_short(homes, slack)
        parts, room = self._parts_bytes(arrangement), 0
        limit = self._limits_of(arrangement.mesh)[0] * (1 + slack + PRECISION)
        for need, ranks in self._needs_of(arrangement):
            free = limit - need.outside(parts)
            if free < 0:
                return True
            room += ranks * self._layers_within(free, parts, need.kept)
        return room < len(self._model.kinds)

    def _layers_within(self, free: float, parts: StageBytes, kept: int) -> int:
        """How many layers, the smallest first, fit into `free` bytes with so many micro-batches alive."""
        room = 0
        for size, count in sorted((parts.kinds[kind] + kept * parts.kept[kind], n) for kind, n in self._counts.items()):
            fit = min(count, int(free / size * (1 + PRECISION)))
            room += fit
            free -= fit * size
            if fit < count:
                break
        return room

    # --- the terms ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _bare(group: Group, recompute: Recompute, chosen: Settings) -> Arrangement:
        return Arrangement(
            mesh=group.mesh, layers=(0,) * (group.mesh.pp * group.vpp), schedule=group.schedule,
            placement=group.placement, microbatches=group.microbatches, zero=chosen.zero, recompute=recompute,
            sequence_parallel=chosen.sequence_parallel, overlap_gradients=chosen.overlap_gradients,
        )  # fmt: skip

    def _end(self, group: Group, chosen: Settings) -> float:
        """Seconds that the end of a step takes at least."""
        key = group.mesh, chosen.zero, chosen.overlap_gradients
        if key not in self._ends:
            bare = self._bare(group, "none", chosen)
            self._ends[key] = least_end_of_step_s(self._model, self._work, bare, self._hardware)
        return self._ends[key]

    def _least(self, group: Group, recompute: Recompute, parallel: Sequence[bool]) -> tuple[float, float]:
        """The smaller of `_whole` with and without sequence parallelism."""
        splits = parallel if group.mesh.tp > 1 and self._work.purpose == "train" else (False,)
        return min(self._whole(group, recompute, sequence_parallel, gathers=False) for sequence_parallel in splits)

    def _whole(
        self, group: Group, recompute: Recompute, sequence_parallel: bool, *, gathers: bool
    ) -> tuple[float, float]:
        """Seconds of all stages for a micro-batch on the fastest rank, and those of the forwards.

        Args:
            group: The arrangements.
            recompute: What they recompute.
            sequence_parallel: Whether activations between products are split.
            gathers: Whether weights are gathered before they are used (ZeRO 3).
        """
        key = group.mesh, group.microbatches, group.vpp, recompute, sequence_parallel, gathers
        found = self._wholes.get(key)
        if found is None:
            chosen = Settings(3 if gathers else 0, sequence_parallel, overlap_gradients=False)
            bare, ranks = self._bare(group, recompute, chosen), range(1 if self._hardware.is_uniform else group.mesh.pp)
            found = self._wholes[key] = min(self._sum_on(bare, pp) for pp in ranks)
        return found

    def _sum_on(self, bare: Arrangement, pp: int) -> tuple[float, float]:
        seconds, stages = self._parts(bare, pp), len(bare.layers)
        counts = [self._counts[kind] for kind in range(len(self._model.first))]
        sums = [
            sum(one[i] * count for one, count in zip(seconds.kinds, counts, strict=True))
            + stages * seconds.empty[i] + seconds.embedding[i] + seconds.loss[i]
            for i in (0, 1)
        ]  # fmt: skip
        return sums[0], sums[1]

    def _parts(self, arrangement: Arrangement, pp: int) -> _Parts:
        """Seconds of layers, of an empty stage, of the embedding and of the loss on a pipeline rank."""
        mesh, microbatches = arrangement.mesh, arrangement.microbatches
        work = self._work.batch_size if self._work.purpose == "train" else self._work.sequences
        sequences = math.ceil(math.ceil(work / mesh.dp) / microbatches)
        split = (mesh.size, mesh.tp, mesh.cp, mesh.ep, mesh.etp)
        where = split if self._hardware.is_uniform and arrangement.zero < 3 else (mesh, pp)
        key = where, sequences, arrangement.recompute, arrangement.sequence_parallel, arrangement.zero >= 3
        if key not in self._found:
            self._found[key] = self._parts_on(arrangement, pp)
        return self._found[key]

    def _parts_on(self, arrangement: Arrangement, pp: int) -> _Parts:
        def seconds(stage: StageCost) -> tuple[float, float]:
            return stage_s(self._model, self._work, arrangement, self._hardware, pp, stage)

        empty = seconds(_NOTHING)

        def more(stage: StageCost) -> tuple[float, float]:
            both = seconds(stage)
            return both[0] - empty[0], both[1] - empty[1]

        mtp = self._model.mtp
        return _Parts(
            tuple(more(replace(_NOTHING, kinds=((kind, 1),))) for kind in range(len(self._model.first))),
            empty, more(replace(_NOTHING, embedding=True)), more(replace(_NOTHING, loss=True, mtp=mtp)),
        )  # fmt: skip

    def _stage_seconds(self, arrangement: Arrangement) -> Amounts:
        mesh, stages = arrangement.mesh, len(arrangement.layers)
        ranks = range(1 if self._hardware.is_uniform else mesh.pp)
        parts = [self._parts(arrangement, pp) for pp in ranks]
        rows = [tuple(part.kinds[kind][0] for kind in self._model.kinds) for part in parts]
        homes = [home_of(arrangement.placement, mesh.pp, stage)[0] if len(parts) > 1 else 0 for stage in range(stages)]
        outside = [parts[home].empty[0] for home in homes]
        outside[0] += parts[homes[0]].embedding[0]
        outside[-1] += parts[homes[-1]].loss[0]
        return Amounts(tuple(rows[home] for home in homes), tuple(outside))

    def _stage_bytes(self, arrangement: Arrangement) -> Memory:
        """What a rank has once belongs to its first stage."""
        mesh, count = arrangement.mesh, len(arrangement.layers)
        parts = self._parts_bytes(arrangement)
        rows: list[tuple[float, ...]] = [()] * count
        outside = [0.0] * count
        made: dict[int, tuple[float, ...]] = {}
        for indexes, most in self._alive(arrangement):
            for index, kept in zip(indexes, most, strict=True):
                if kept not in made:
                    each = [own + kept * one for own, one in zip(parts.kinds, parts.kept, strict=True)]
                    made[kept] = tuple(map(each.__getitem__, self._model.kinds))
                rows[index] = made[kept]
                outside[index] += kept * parts.embedding if index == 0 else 0.0
            outside[indexes[0]] += parts.rank[(0 in indexes) + 2 * (count - 1 in indexes)]
        return Memory(Amounts(tuple(rows), tuple(outside)), self._limits_of(mesh))

    def _limits_of(self, mesh: Mesh) -> tuple[float, ...]:
        """The bytes that each pipeline rank may use: those of its smallest device."""
        if mesh not in self._limits_by_rank:
            limit, inner = self.limit(mesh), mesh.cp * mesh.tp
            self._limits_by_rank[mesh] = (float(limit[0]),) * mesh.pp if self._hardware.is_uniform else tuple(
                float(min(limit[(dp * mesh.pp + pp) * inner + rank] for dp in range(mesh.dp) for rank in range(inner)))
                for pp in range(mesh.pp)
            )  # fmt: skip
        return self._limits_by_rank[mesh]

    def _alive(self, arrangement: Arrangement) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """For each pipeline rank its stages, and the largest number of micro-batches that each keeps alive."""
        pp, vpp = arrangement.mesh.pp, arrangement.vpp
        key = arrangement.schedule, arrangement.placement, pp, arrangement.microbatches, vpp
        if key not in self._kept:
            alive = alive_of(self._work, arrangement)
            self._kept[key] = tuple(
                (
                    tuple(stage_at(arrangement.placement, pp, rank, place) for place in range(vpp)),
                    tuple(max(one[place] for one in alive[rank]) for place in range(vpp)),
                )
                for rank in range(pp)
            )
        return self._kept[key]

    def _needs_of(self, arrangement: Arrangement) -> tuple[tuple[_Needs, int], ...]:
        """What the pipeline ranks keep, and how many of them keep the same."""
        key = arrangement.schedule, arrangement.mesh.pp, arrangement.microbatches, arrangement.vpp
        found = self._needs.get(key)
        if found is None:
            last, counts = len(arrangement.layers) - 1, Counter[_Needs]()
            for indexes, most in self._alive(arrangement):
                end = (0 in indexes) + 2 * (last in indexes)
                counts[_Needs(end, most[indexes.index(0)] if 0 in indexes else 0, min(most))] += 1
            found = self._needs[key] = tuple(counts.items())
        return found

    def _parts_bytes(self, arrangement: Arrangement) -> StageBytes:
        mesh, zero = arrangement.mesh, arrangement.zero
        key = mesh, arrangement.microbatches, zero, arrangement.recompute, arrangement.sequence_parallel
        if key not in self._parts_of:
            one = replace(arrangement, schedule="1f1b", layers=(), placement="loop", overlap_gradients=False)
            self._parts_of[key] = stage_bytes(self._model, self._work, one, self._hardware)
        return self._parts_of[key]


def _may_split_sequences(work: Work, ranks: int) -> bool:
    return work.purpose == "train" and (work.sequence_length >= LONG or work.batch_size < ranks)


def costs_of(spec: ModelSpec, hardware: Hardware) -> CostsOf:
    """The costs of a model on a machine, for any work and number of ranks."""
    model = ModelCost.of(spec)
    return lambda work, ranks: ModelCosts(model, work, hardware, ranks)


def seconds_of(work: Work, estimate: Estimate) -> float:
    """Seconds of a training step; else of reading all prompts and decoding until the caches are full."""
    if work.purpose == "train":
        return estimate.step_s
    return estimate.prefill_s + new_tokens(work) * estimate.step_s
