"""Mesh: ranks as coordinates on the axes data (dp), pipeline (pp) and tensor (tp)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from partita.errors import PlanError

Axis = Literal["dp", "pp", "tp"]
AXES: tuple[Axis, ...] = ("dp", "pp", "tp")
MAX_RANKS = 1 << 20
"""The largest number of ranks of a mesh, so that a plan can list them all."""


class Coordinate(NamedTuple):
    """The position of a rank on each axis."""

    dp: int
    pp: int
    tp: int


@dataclass(frozen=True)
class Mesh:
    """`dp * pp * tp` ranks; tp varies fastest, then pp, then dp, so that the ranks that communicate most are neighbours.

    For 8 ranks with tp=2 and pp=2 the tp groups are [[0, 1], [2, 3], [4, 5], [6, 7]], the pp groups
    [[0, 2], [1, 3], [4, 6], [5, 7]] and the dp groups [[0, 4], [1, 5], [2, 6], [3, 7]].

    Examples:
        >>> mesh = Mesh(dp=2, pp=2, tp=2)
        >>> mesh.groups("pp")
        ((0, 2), (1, 3), (4, 6), (5, 7))
        >>> mesh.coordinate(6)
        Coordinate(dp=1, pp=1, tp=0)
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if type(size) is not int or size < 1:
                raise PlanError(f"{axis} must be a whole number of at least 1, but is {size!r}.")
        if self.size > MAX_RANKS:
            raise PlanError(f"dp x pp x tp must come to at most {MAX_RANKS:,} ranks, but {self} are {self.size:,}.")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.dp * self.pp * self.tp

    def axis_size(self, axis: Axis) -> int:
        """Ranks of one group along `axis`."""
        if axis not in AXES:
            raise PlanError(f"axis must be one of {', '.join(AXES)}, but is {axis!r}.")
        return int(getattr(self, axis))

    def coordinate(self, rank: int) -> Coordinate:
        """The coordinate of `rank`."""
        if not 0 <= rank < self.size:
            raise PlanError(f"rank must be in [0, {self.size}) of {self}, but is {rank}.")
        return Coordinate(rank // (self.pp * self.tp), rank // self.tp % self.pp, rank % self.tp)

    def rank(self, *, dp: int = 0, pp: int = 0, tp: int = 0) -> int:
        """The rank at a coordinate."""
        for axis, index in zip(AXES, (dp, pp, tp), strict=True):
            if not 0 <= index < self.axis_size(axis):
                raise PlanError(f"{axis} must be in [0, {self.axis_size(axis)}) of {self}, but is {index}.")
        return (dp * self.pp + pp) * self.tp + tp

    def group(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axis` only, in order, itself included."""
        here = self.coordinate(rank)._asdict()
        return tuple(self.rank(**{**here, axis: index}) for index in range(self.axis_size(axis)))

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """Every group along `axis`, in the order of its first rank. Each rank is in one."""
        return tuple(sorted({self.group(axis, rank) for rank in range(self.size)}))

    def __str__(self) -> str:
        return f"dp {self.dp} x pp {self.pp} x tp {self.tp}"
