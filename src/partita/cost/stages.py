"""Stages: the layers of an arrangement, counted by kind on each pipeline rank and virtual stage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from partita.core.layout.placement import Placement, stage_at
from partita.core.sharding.split import deal
from partita.cost.model import ModelCost
from partita.cost.work import Arrangement
from partita.errors import PlanError


@dataclass(frozen=True)
class StageCost:
    """One stage: how many layers of each kind it has, and what else.

    Attributes:
        kinds: (kind, count) of its decoder layers.
        mtp: Prediction layers.
        embedding: Whether it has the embedding.
        loss: Whether it has the loss.
    """

    kinds: tuple[tuple[int, int], ...]
    mtp: int
    embedding: bool
    loss: bool

    @property
    def layers(self) -> int:
        """Layers of all kinds."""
        return sum(count for _, count in self.kinds) + self.mtp


def stages_of(model: ModelCost, arrangement: Arrangement) -> tuple[tuple[StageCost, ...], ...]:
    """For each pipeline rank its virtual stages."""
    return _stages(model, arrangement.mesh.pp, arrangement.layers, arrangement.placement)


@lru_cache(maxsize=4096)
def _stages(
    model: ModelCost, pp: int, layers: tuple[int, ...], placement: Placement
) -> tuple[tuple[StageCost, ...], ...]:
    counts = layers or tuple(deal(model.spec.num_layers, pp, allow_empty=True))
    if sum(counts) != model.spec.num_layers or any(count < 0 for count in counts):
        raise PlanError(
            f"layers must be numbers of at least 0 that come to the {model.spec.num_layers} layers of {model.spec.family}, but "
            f"are {counts}, which come to {sum(counts)}."
        )
    vpp = len(counts) // pp
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    last = len(counts) - 1

    def stage(index: int) -> StageCost:
        kinds = Counter(model.kinds[starts[index] : starts[index + 1]])
        is_last = index == last
        return StageCost(tuple(sorted(kinds.items())), model.mtp if is_last else 0, index == 0, is_last)

    return tuple(tuple(stage(stage_at(placement, pp, rank, place)) for place in range(vpp)) for rank in range(pp))
