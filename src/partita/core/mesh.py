"""Mesh: ranks on the axes data (dp), pipeline (pp), context (cp) and tensor (tp); experts (ep) fold over those of a stage."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from partita.errors import PlanError

Axis = Literal["dp", "pp", "cp", "tp"]
ExpertAxis = Literal["edp", "ep", "etp"]
AXES: tuple[Axis, ...] = ("dp", "pp", "cp", "tp")
"""The axes whose sizes multiply to the number of ranks, from the outside in."""
EXPERT_AXES: tuple[ExpertAxis, ...] = ("edp", "ep", "etp")
"""The axes on which the ranks of a stage hold experts, from the outside in: copies, experts, parts of an expert."""
MAX_RANKS = 1 << 20
"""The largest number of ranks of a mesh, so that a plan can list them all."""


class Coordinate(NamedTuple):
    """The position of a rank on each axis."""

    dp: int
    pp: int
    tp: int
    cp: int = 0


class ExpertCoordinate(NamedTuple):
    """The position of a rank among those of its stage that hold experts."""

    edp: int
    ep: int
    etp: int


@dataclass(frozen=True, repr=False)
class Mesh:
    """`dp * pp * cp * tp` ranks; tp varies fastest, then cp, pp and dp, so that the ranks that communicate most are neighbours.

    Experts fold over the ranks of a stage, taken in the order of dp, cp and tp ("MoE Parallel Folding", 2504.14960): of these
    ranks, `etp` neighbours hold parts of the same experts, `ep` such groups hold different experts, and the rest (`edp`)
    hold copies.

    For 8 ranks with tp=2 and pp=2 the tp groups are [[0, 1], [2, 3], [4, 5], [6, 7]], the pp groups
    [[0, 2], [1, 3], [4, 6], [5, 7]] and the dp groups [[0, 4], [1, 5], [2, 6], [3, 7]].

    Attributes:
        dp: Replicas of the model, which see different sequences.
        pp: Ranks over which the layers are distributed.
        tp: Ranks over which every layer is split.
        cp: Ranks over which every sequence is split.
        ep: Groups of ranks over which the experts of a layer are distributed; 1 to split experts as other layers.
        etp: Ranks over which each expert is split; None for as many of tp as remain after ep.

    Raises:
        PlanError: A size is not positive, or ep x etp does not divide the ranks of a stage.

    Examples:
        >>> mesh = Mesh(dp=2, pp=2, tp=2)
        >>> mesh.groups("pp")
        ((0, 2), (1, 3), (4, 6), (5, 7))
        >>> mesh.coordinate(6)
        Coordinate(dp=1, pp=1, tp=0, cp=0)
        >>> Mesh(dp=2, tp=2, ep=2).groups("ep")
        ((0, 2), (1, 3))
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None

    def __post_init__(self) -> None:
        for axis in (*AXES, "ep", "etp"):
            size = getattr(self, axis)
            if (type(size) is not int or size < 1) and (axis, size) != ("etp", None):
                raise PlanError(f"{axis} must be a whole number of at least 1, but is {size!r}.")
        if self.size > MAX_RANKS:
            raise PlanError(
                f"dp x pp x cp x tp must come to at most {MAX_RANKS:,} ranks, but {self} are {self.size:,}."
            )
        if self.etp is None:
            object.__setattr__(self, "etp", self._default_etp())
        if self.stage_size % (self.ep * self.expert_tp):
            raise PlanError(
                f"ep x etp must divide the ranks of a stage, dp x cp x tp, but {self.ep} x {self.etp} does not divide "
                f"{self.stage_size}. {self._nearest_experts()}"
            )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.dp * self.pp * self.cp * self.tp

    @property
    def stage_size(self) -> int:
        """Ranks that run the same stage: dp x cp x tp."""
        return self.dp * self.cp * self.tp

    @property
    def expert_tp(self) -> int:
        """Ranks over which each expert is split: `etp`, which is never None once the mesh exists."""
        return self.etp or 1

    @property
    def layer_meshes(self) -> tuple[Mesh, ...]:
        """The smallest meshes that hold a layer as this one does; none if one rank holds a layer.

        Experts that are distributed beyond a tensor group are in two: distributed over it, and over replicas.
        """
        if self.ep > 1 and not self.experts_send_tokens:
            return (Mesh(tp=self.tp, ep=self.ep, etp=self.etp),)
        inside = (Mesh(tp=self.tp, ep=self.tp if self.ep > 1 else 1),) if self.tp > 1 else ()
        beyond = (Mesh(dp=self.ep, ep=self.ep),) if self.ep > 1 else ()
        parts = (Mesh(tp=self.expert_tp),) if self.ep > 1 and self.expert_tp > 1 else ()
        return (*inside, *beyond, *parts)

    @property
    def experts_send_tokens(self) -> bool:
        """Whether tokens are sent to the ranks of their experts; not inside a tensor group, whose ranks have all tokens."""
        return self.ep > 1 and self.ep * self.expert_tp != self.tp

    @property
    def experts_join_replicas(self) -> bool:
        """Whether several replicas (dp) hold the experts of a layer together, so that they must compute it together."""
        return self.ep > 1 and self.cp * self.tp % (self.ep * self.expert_tp) != 0

    @property
    def distinct(self) -> int:
        """How many of a stage's ranks, in their order, hold different parts; the parts repeat after them."""
        return math.lcm(self.tp, self.ep * self.expert_tp) if self.ep > 1 else self.tp

    def distinct_ranks(self, pp: int) -> tuple[int, ...]:
        """The first `distinct` ranks of pipeline rank `pp`."""
        return self.group(("dp", "cp", "tp"), self.rank(pp=pp))[: self.distinct]

    def to_data(self) -> dict[str, int]:
        """The sizes as plain data; axes that are not used are left out. `Mesh(**data)` is the inverse."""
        data = {"dp": self.dp, "pp": self.pp, "tp": self.tp, "cp": self.cp, "ep": self.ep, "etp": self.expert_tp}
        unused = [name for name in ("cp", "ep") if data[name] == 1]
        unused += ["etp"] if self.expert_tp == self._default_etp() else []
        return {name: size for name, size in data.items() if name not in unused}

    def axis_size(self, axis: Axis | ExpertAxis) -> int:
        """Ranks of one group along `axis`."""
        if axis == "edp":
            return self.stage_size // (self.ep * self.expert_tp)
        if axis not in AXES and axis not in EXPERT_AXES:
            raise PlanError(f"axis must be one of {', '.join((*AXES, *EXPERT_AXES))}, but is {axis!r}.")
        return int(getattr(self, axis))

    def coordinate(self, rank: int) -> Coordinate:
        """The coordinate of `rank`."""
        if not 0 <= rank < self.size:
            raise PlanError(f"rank must be in [0, {self.size}) of {self}, but is {rank}.")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        dp, pp = divmod(rest, self.pp)
        return Coordinate(dp, pp, tp, cp)

    def expert_coordinate(self, rank: int) -> ExpertCoordinate:
        """The coordinate of `rank` among those of its stage that hold experts."""
        here = self.coordinate(rank)
        rest, etp = divmod((here.dp * self.cp + here.cp) * self.tp + here.tp, self.expert_tp)
        return ExpertCoordinate(*divmod(rest, self.ep), etp)

    def rank(self, *, dp: int = 0, pp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """The rank at a coordinate."""
        for axis, index in zip(AXES, (dp, pp, cp, tp), strict=True):
            if not 0 <= index < self.axis_size(axis):
                raise PlanError(f"{axis} must be in [0, {self.axis_size(axis)}) of {self}, but is {index}.")
        return ((dp * self.pp + pp) * self.cp + cp) * self.tp + tp

    def group(self, axes: Axis | ExpertAxis | Iterable[Axis], rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axes` only, in order, itself included.

        Args:
            axes: One axis, or several of `AXES`.
            rank: A rank of the group.
        """
        if isinstance(axes, str):
            if axes in EXPERT_AXES:
                return self._expert_group(EXPERT_AXES.index(axes), rank)
            self.axis_size(axes)
        here = [self.coordinate(rank)._asdict()]
        for axis in (axes,) if isinstance(axes, str) else axes:
            here = [{**place, axis: index} for place in here for index in range(self.axis_size(axis))]
        return tuple(sorted(self.rank(**place) for place in here))

    def groups(self, axes: Axis | ExpertAxis | Iterable[Axis]) -> tuple[tuple[int, ...], ...]:
        """Every group along `axes`, in the order of its first rank. Each rank is in one."""
        axes = axes if isinstance(axes, str) else tuple(axes)
        return tuple(sorted({self.group(axes, rank) for rank in range(self.size)}))

    @property
    def expert_groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that hold the experts of a layer together, ep x etp; each rank alone if experts are not distributed."""
        count = self.ep * self.expert_tp if self.ep > 1 else 1
        stages = [self.group(("dp", "cp", "tp"), self.rank(pp=pp)) for pp in range(self.pp)]
        return tuple(sorted(stage[at : at + count] for stage in stages for at in range(0, len(stage), count)))

    def _expert_group(self, index: int, rank: int) -> tuple[int, ...]:
        here = self.coordinate(rank)
        stage = self.group(("dp", "cp", "tp"), self.rank(pp=here.pp))
        inside = math.prod(self.axis_size(axis) for axis in EXPERT_AXES[index + 1 :])
        count = self.axis_size(EXPERT_AXES[index])
        place = (here.dp * self.cp + here.cp) * self.tp + here.tp
        first = place - place // inside % count * inside
        return tuple(stage[first + inside * step] for step in range(count))

    def _default_etp(self) -> int:
        if self.ep == 1:
            return self.tp
        fitting = [n for n in range(1, self.tp + 1) if self.tp % n == 0 and self.stage_size % (self.ep * n) == 0]
        return max(fitting, default=1)

    def _nearest_experts(self) -> str:
        fitting = [n for n in range(1, self.stage_size + 1) if self.stage_size % (n * self.expert_tp) == 0]
        if not fitting:
            return f"Choose etp among the divisors of {self.stage_size}."
        return f"The nearest that does is ep={min(fitting, key=lambda n: abs(n - self.ep))}."

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{name}={size}' for name, size in self.to_data().items())})"

    def __str__(self) -> str:
        context = f" x cp {self.cp}" if self.cp > 1 else ""
        experts = f", experts ep {self.ep} x etp {self.etp}" if self.ep > 1 or (self.etp or self.tp) != self.tp else ""
        return f"dp {self.dp} x pp {self.pp}{context} x tp {self.tp}{experts}"
