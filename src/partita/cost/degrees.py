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
    def expert_dp(self) -> int:
        """Copies of an expert's weights: experts fold over the ranks of a stage (dp x cp x tp)."""
        return max(1, self.dp * self.cp * self.tp // (self.ep * self.etp))

    def groups(self, hardware: Hardware) -> Groups:
        """The groups along each axis: tp is innermost, then cp, pp and dp."""
        n = self.ranks
        stage = self.tp * self.cp
        return Groups(
            tp=hardware.group(1, self.tp, n),
            cp=hardware.group(self.tp, self.cp, n),
            pp=hardware.group(stage, self.pp, n),
            dp=hardware.group(stage * self.pp, self.dp, n),
            sharded=hardware.group(stage * self.pp, self.dp, n),
            ep=hardware.group(self.etp, self.ep, n),
        )


@dataclass(frozen=True)
class Groups:
    """A group along each axis; `sharded` is the one over which ZeRO distributes."""

    tp: Group
    cp: Group
    pp: Group
    dp: Group
    sharded: Group
    ep: Group


@lru_cache(maxsize=4096)
def degrees_of(mesh: Mesh) -> Degrees:
    """The degrees of a mesh."""
    return Degrees(dp=mesh.dp, pp=mesh.pp, tp=mesh.tp)
