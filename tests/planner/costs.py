"""Costs with few terms and random numbers, whose best arrangements can be found by comparing all."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from functools import cached_property

from partita.core.layout.placement import home_of
from partita.core.mesh import Mesh
from partita.cost.work import RECOMPUTE, Arrangement, Estimate, MemoryUse, Recompute, Work
from partita.errors import PlanError, ScheduleError
from partita.planner import Bound
from partita.planner.layers import Amounts, Memory, compositions, seconds_of
from partita.planner.model_costs import ModelCosts
from partita.planner.space import SCHEDULES, Family, Group, Most, Settings
from partita.schedule import check_kind, placement_of


class RandomCosts:
    """Layers of random sizes on devices of random speeds and memories."""

    def __init__(self, seed: int, work: Work, ranks: int, *, unlike: bool = False, scale: float = 1.0) -> None:
        chance = random.Random(seed)
        self.work, self.ranks = work, ranks
        self.most = Most(
            chance.choice((2, 4, 8)), chance.randint(2, 5), chance.choice((1, 2, 4)), chance.choice((1, 2, 8))
        )
        self.num_layers = self.most.pp
        self.cp_latency, self.ep_latency = chance.uniform(0, 0.5), chance.uniform(0, 0.5)
        self.ep_share = chance.uniform(0.5, 1)
        kinds = [chance.uniform(1, 4) for _ in range(chance.choice((1, 1, 2)))]
        self.sizes = sorted(chance.choice(kinds) for _ in range(self.num_layers))
        self.head = chance.uniform(0, 4)
        self.tp_latency, self.dp_latency = chance.uniform(0, 0.5), chance.uniform(0, 2)
        self.activation = chance.uniform(0.1, 3)
        self.factor = {kind: chance.uniform(0.9, 1.1) for kind in SCHEDULES}
        self.again = dict(zip(RECOMPUTE, (0.0, chance.uniform(0.01, 0.2), 0.33), strict=True))
        self.kept = dict(zip(RECOMPUTE, (1.0, chance.uniform(0.3, 0.9), 0.1), strict=True))
        speeds = (1.0, 0.5, 2.0) if unlike else (1.0,)
        self.slowness = [chance.choice(speeds) for _ in range(ranks)]
        whole = sum(self.sizes) + self.head
        least = scale * chance.uniform(0.5, 12) * whole / ranks * 16
        self.limits = [round(1e6 * least * (chance.choice((1.0, 0.6)) if unlike else 1)) for _ in range(ranks)]

    # --- what the search asks --------------------------------------------------------------------------------------

    def bound(self, mesh: Mesh) -> Bound:
        if mesh.tp == 7:
            raise PlanError("no model of these tests has seven parts")
        total = sum(self.sizes) * min(self.slowness) * self._distributed(mesh) / (mesh.tp * mesh.pp * mesh.cp)
        share = -(-self.work.batch_size // mesh.dp)
        each = (4 + 12 / (mesh.dp * mesh.cp)) * self._distributed(mesh)
        bytes_ = round(1e6 * sum(self.sizes) * each / (mesh.tp * mesh.pp) * 0.999)
        return Bound(min(self.factor.values()) * total * share, bytes_, max(self.limits))

    def least_seconds_of_family(
        self, family: Family, recompute: Recompute = "none", parallel: Sequence[bool] = (False, True)
    ) -> float:
        sequences = self.work.batch_size // (family.mesh.dp * family.microbatches)
        total = sum(self._layer(family.mesh, sequences, size) for size in self.sizes) * min(self.slowness)
        least = family.microbatches * total / family.mesh.pp
        return min(self.factor.values()) * least * (1 + self.again[recompute]) * (1 - 1e-9)

    def least_share_of_family(self, family: Family, recompute: Recompute, chosen: Settings) -> float:
        mesh = family.mesh
        each = (4 + 12 / (mesh.dp * mesh.cp if chosen.zero else 1)) * self._distributed(mesh)
        kept = self.activation * self.kept[recompute] * (self.work.batch_size // (mesh.dp * family.microbatches))
        held = sum(self.sizes) * (each + kept / mesh.cp) / mesh.tp + self.head * each / mesh.tp
        limit = [min(self.limits[rank] for rank in self._ranks(mesh, pp)) / 1e6 for pp in range(mesh.pp)]
        return held * (1 - 1e-9) / sum(limit)

    def least_seconds(
        self, group: Group, recompute: Recompute = "none", chosen: Settings | None = None,
        parallel: Sequence[bool] = (False, True),
    ) -> float:  # fmt: skip
        sequences = self.work.batch_size // (group.mesh.dp * group.microbatches)
        total = sum(self._layer(group.mesh, sequences, size) for size in self.sizes) * min(self.slowness)
        least = total / group.vpp + (group.microbatches - 1 / group.vpp) * total / group.mesh.pp
        return self.factor[group.schedule] * least * (1 + self.again[recompute]) * (1 - 1e-9)

    def least_seconds_of(self, arrangement: Arrangement) -> float:
        return 0.9 * self.estimate(arrangement).step_s

    def stage_seconds(self, arrangement: Arrangement) -> Amounts:
        mesh = arrangement.mesh
        sequences = self.work.batch_size // (mesh.dp * arrangement.microbatches)
        again = 1 + self.again[arrangement.recompute]
        slowness = [self._slowness(mesh, self._home(arrangement, stage)) for stage in self._stages(arrangement)]
        rows = tuple(
            tuple(slow * again * self._layer(mesh, sequences, size) for size in self.sizes) for slow in slowness
        )
        return Amounts(rows, (0.0,) * (len(rows) - 1) + (slowness[-1] * self._layer(mesh, sequences, self.head),))

    def stage_bytes(self, arrangement: Arrangement) -> Memory:
        mesh = arrangement.mesh
        sequences = self.work.batch_size // (mesh.dp * arrangement.microbatches)
        each = (4 + 12 / (mesh.dp * mesh.cp if arrangement.zero else 1)) * self._distributed(mesh)
        rows, kept = [], self.activation * self.kept[arrangement.recompute] * sequences / mesh.cp
        for stage in self._stages(arrangement):
            alive = self._alive(arrangement, self._home(arrangement, stage))
            rows.append(tuple(size * (each + kept * alive) / mesh.tp for size in self.sizes))
        outside = (0.0,) * (len(rows) - 1) + (self.head * each / mesh.tp,)
        limit = tuple(min(self.limits[rank] for rank in self._ranks(mesh, pp)) / 1e6 for pp in range(mesh.pp))
        return Memory(Amounts(tuple(rows), outside), limit)

    def estimate(self, arrangement: Arrangement) -> Estimate:
        mesh, held = arrangement.mesh, self.stage_bytes(arrangement).bytes.of(arrangement.layers)
        homes = [self._home(arrangement, stage) for stage in self._stages(arrangement)]
        times = self.stage_seconds(arrangement).of(arrangement.layers)
        step_s = self.factor[arrangement.schedule] * seconds_of(times, homes, arrangement.microbatches)
        step_s += self.dp_latency * (mesh.dp * mesh.cp > 1)
        step_s += 0.2 / (mesh.dp * mesh.cp if arrangement.zero else 1)
        used = [0.0] * mesh.pp
        for home, amount in zip(homes, held, strict=True):
            used[home] += amount
        memory = tuple(MemoryUse(weights=round(1e6 * used[mesh.coordinate(rank).pp])) for rank in range(mesh.size))
        return Estimate(
            arrangement=arrangement, step_s=step_s, prefill_s=0.0, tokens_per_s=1 / step_s, mfu=0.1, bubble=0.1,
            parts_s={"compute": step_s}, memory=memory, limit=tuple(self.limits[: mesh.size]),
        )  # fmt: skip

    def memory(self, arrangement: Arrangement) -> tuple[MemoryUse, ...]:
        return self.estimate(arrangement).memory

    def least_bytes(self, arrangement: Arrangement) -> float:
        memory = self.stage_bytes(arrangement)
        least = sum(map(min, zip(*memory.bytes.layers, strict=True))) + sum(memory.bytes.outside)
        return 1e6 * least / arrangement.mesh.pp

    def least_share(self, arrangement: Arrangement) -> float:
        limit = self.stage_bytes(arrangement).limit
        return self.least_bytes(arrangement) / 1e6 * len(limit) / sum(limit)

    def is_short(self, arrangement: Arrangement, slack: float = 0.0) -> bool:
        homes = [self._home(arrangement, stage) for stage in self._stages(arrangement)]
        return self.stage_bytes(arrangement).is_short(homes, slack)

    def limit(self, mesh: Mesh) -> tuple[int, ...]:
        return tuple(self.limits[: mesh.size])

    def seconds_of(self, estimate: Estimate) -> float:
        return estimate.step_s

    # --- the terms -------------------------------------------------------------------------------------------------

    def _layer(self, mesh: Mesh, sequences: int, size: float) -> float:
        latency = self.tp_latency * (mesh.tp > 1) + self.cp_latency * (mesh.cp > 1) + self.ep_latency * (mesh.ep > 1)
        return size * sequences * self._distributed(mesh) / (mesh.tp * mesh.cp) + latency

    def _distributed(self, mesh: Mesh) -> float:
        """What distributed experts leave of the time and bytes."""
        return self.ep_share if mesh.ep > 1 else 1.0

    def _slowness(self, mesh: Mesh, pp: int) -> float:
        return max(self.slowness[rank] for rank in self._ranks(mesh, pp))

    @staticmethod
    def _ranks(mesh: Mesh, pp: int) -> Iterator[int]:
        return (rank for rank in range(mesh.size) if mesh.coordinate(rank).pp == pp)

    @staticmethod
    def _stages(arrangement: Arrangement) -> range:
        return range(len(arrangement.layers))

    @staticmethod
    def _home(arrangement: Arrangement, stage: int) -> int:
        return home_of(arrangement.placement, arrangement.mesh.pp, stage)[0]

    @staticmethod
    def _alive(arrangement: Arrangement, pp: int) -> int:
        ahead = arrangement.mesh.pp - pp
        most = {"gpipe": arrangement.microbatches, "zb-h2": 2 * ahead - 1, "zb-v": arrangement.mesh.pp}
        return min(arrangement.microbatches, most.get(arrangement.schedule, ahead))


class AllArrangements:
    """Every arrangement of the work, written down without the search's own enumeration."""

    def __init__(self, costs: RandomCosts | ModelCosts, batch_size: int, ranks: int) -> None:
        self.costs, self.batch_size, self.ranks = costs, batch_size, ranks

    @cached_property
    def estimates(self) -> list[Estimate]:
        return [self.costs.estimate(one) for one in self._arrangements()]

    def _arrangements(self) -> Iterator[Arrangement]:
        ranks, most = self.ranks, self.costs.most
        for tp in range(1, min(ranks, most.tp) + 1):
            for pp in range(1, min(ranks, most.pp) + 1):
                for cp in range(1, min(ranks, most.cp) + 1):
                    for ep in range(1, most.ep + 1):
                        if ranks % (tp * pp * cp) == 0 and tp != 7 and ranks // pp % ep == 0:
                            etp = tp if ep == 1 else 1
                            yield from self._of(Mesh(dp=ranks // (tp * pp * cp), pp=pp, tp=tp, cp=cp, ep=ep, etp=etp))

    def _of(self, mesh: Mesh) -> Iterator[Arrangement]:
        batch = self.batch_size
        for microbatches in range(1, batch + 1):
            if batch % (mesh.dp * microbatches) or math.gcd(batch // (mesh.dp * microbatches), mesh.cp) > 1:
                continue  # several sequences that are split where each could be on a replica of its own
            for schedule in SCHEDULES if mesh.pp > 1 else ("1f1b",):
                for vpp in range(1, self.costs.most.pp // mesh.pp + 1):
                    is_new = not self._is_repeated(mesh, schedule, vpp)
                    if is_new and self._exists(schedule, mesh.pp, microbatches, vpp):
                        yield from self._with(mesh, microbatches, schedule, vpp)

    @staticmethod
    def _exists(schedule: str, pp: int, microbatches: int, vpp: int) -> bool:
        if pp == 1 and vpp > 1:
            return False
        try:
            check_kind(schedule, pp, microbatches, vpp)
        except ScheduleError:
            return False
        return not (schedule == "interleaved-1f1b" and vpp == 1)

    def _is_repeated(self, mesh: Mesh, schedule: str, vpp: int) -> bool:
        """Whether fewer virtual stages, but more than one, have as many layers in their largest one."""
        largest = math.ceil(self.costs.most.pp / (mesh.pp * vpp))
        fewer = [math.ceil(self.costs.most.pp / (mesh.pp * other)) for other in range(2, vpp)]
        return schedule == "interleaved-1f1b" and largest in fewer

    def _with(self, mesh: Mesh, microbatches: int, schedule: str, vpp: int) -> Iterator[Arrangement]:
        for layers in compositions(self.costs.most.pp, mesh.pp * vpp):
            for recompute in RECOMPUTE:
                for zero in (0, 1, 2, 3) if mesh.dp * mesh.cp > 1 else (0,):
                    yield Arrangement(
                        mesh=mesh, layers=layers, placement=placement_of(schedule), schedule=schedule,
                        microbatches=microbatches, zero=zero, recompute=recompute,
                    )  # fmt: skip
