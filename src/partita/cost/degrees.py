"""The degrees of parallelism of a mesh, and which ranks of it form a group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from partita.core.mesh import Mesh
from partita.cost.hardware import Group, Hardware


@dataclass(frozen=True)
class Degrees:
    """Ranks along each axis.

    Attributes:
        dp: Replicas.
        pp: Pipeline ranks.
        cp: Ranks that each have a part of a sequence's tokens.
        tp: Tensor ranks.
        ep: Ranks over which the experts of a layer are distributed.
        etp: Tensor ranks of an expert.
    """

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.dp * self.pp * self.cp * self.tp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, and sum their gradients: dp x cp."""
        return self.dp * self.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts: experts fold over the ranks of a stage (dp x cp x tp)."""
        return max(1, self.dp * self.cp * self.tp // (self.ep * self.etp))

    @property
    def split(self) -> tuple[int, int, int]:
        """What decides a rank's part of a layer: tp, ep and etp."""
        return self.tp, self.ep, self.etp

    def groups(self, hardware: Hardware) -> Groups:
        """The groups along each axis: tp is innermost, then cp, pp and dp."""
        return _groups(self, hardware)


@dataclass(frozen=True)
class Groups:
    """A group along each axis; `dp` has the ranks along cp too, over which gradients are summed and ZeRO distributes."""

    tp: Group
    cp: Group
    pp: Group
    dp: Group
    ep: Group


@lru_cache(maxsize=4096)
def _groups(degrees: Degrees, hardware: Hardware) -> Groups:
    n, stage = degrees.ranks, degrees.tp * degrees.cp
    context = hardware.group(degrees.tp, degrees.cp, n)
    # The ranks along cp and dp together, between which the pipeline ranks are.
    outer = hardware.group(stage * degrees.pp, degrees.dp, n)
    return Groups(
        tp=hardware.group(1, degrees.tp, n),
        cp=context,
        pp=hardware.group(stage, degrees.pp, n),
        dp=Group(degrees.replicas, context.per_node * (outer.per_node if context.is_inside else 1)),
        ep=hardware.group(degrees.etp, degrees.ep, n),
    )


@lru_cache(maxsize=4096)
def degrees_of(mesh: Mesh) -> Degrees:
    """The degrees of a mesh."""
    return Degrees(dp=mesh.dp, pp=mesh.pp, cp=mesh.cp, tp=mesh.tp, ep=mesh.ep, etp=mesh.expert_tp)
