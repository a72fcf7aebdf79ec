"""The groups of a rank along the axes of a mesh, for the communicators of any engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Protocol, Self, TypeVar

from partita.core.mesh import Axis, ExpertAxis, Mesh
from partita.core.sharding.cuts import TensorPlan


class Communicator(Protocol):
    """The ranks of one group, as shared code uses them; an engine's own communicator also has collectives of tensors."""

    @property
    def rank(self) -> int:
        """This rank's index in the group."""

    @property
    def size(self) -> int:
        """Ranks of the group."""

    def all_gather_object(self, value: object) -> list[Any]:
        """Gather the objects of all ranks of the group, in rank order."""

    def barrier(self) -> None:
        """Wait until every rank of the group has called this."""


AXES_OF_GROUPS: Mapping[str, tuple[Axis, ...] | ExpertAxis] = MappingProxyType(
    {"tp": ("tp",), "pp": ("pp",), "dp": ("dp",), "cp": ("cp",), "replicas": ("dp", "cp"), "ep": "ep", "edp": "edp"}
)
"""The axes of a mesh along which each group of `AxisGroups` extends."""

C = TypeVar("C", bound=Communicator, covariant=True)
T = TypeVar("T", bound=Communicator)


@dataclass(frozen=True)
class AxisGroups(Generic[C]):
    """This rank's groups along every axis.

    Attributes:
        mesh: The mesh of the run.
        tp: The tensor parallel group.
        pp: The pipeline group.
        dp: The data parallel group: the replicas, which see different sequences.
        cp: The context parallel group, whose ranks see parts of the same sequences.
        replicas: The ranks that hold the same weights, and whose gradients are summed: dp and cp together.
        ep: The ranks that hold the experts of a layer together (ep x etp); this rank alone if experts are not distributed.
        edp: The ranks that hold the same experts; `replicas` if experts are not distributed.
    """

    mesh: Mesh
    tp: C
    pp: C
    dp: C
    cp: C
    replicas: C
    ep: C
    edp: C

    def part(self, cut: TensorPlan) -> int:
        """The part of a tensor that this rank holds: its index among the ranks over which the tensor is split."""
        return self.ep.rank if cut.axis == "ep" else self.tp.rank

    def along(self, cut: TensorPlan) -> C:
        """The ranks that hold the parts of a tensor."""
        return self.ep if cut.axis == "ep" else self.tp

    def copies(self, cut: TensorPlan | None) -> C:
        """The ranks that hold the same part of a tensor as this one, apart from tensor ranks; None for one of no plan."""
        return self.edp if cut is not None and cut.axis == "ep" else self.replicas

    @property
    def writes(self) -> bool:
        """Whether this rank has the first copy of some tensor of the unsplit model."""
        return self.dp.rank == 0 or (self.mesh.ep > 1 and self.edp.rank == 0)

    @property
    def rank(self) -> int:
        """The global number of this rank."""
        return self.mesh.rank(dp=self.dp.rank, pp=self.pp.rank, cp=self.cp.rank, tp=self.tp.rank)

    @property
    def axes(self) -> list[C]:
        """The groups with more than one rank. A value that is gathered along each in turn reaches every rank."""
        return [*self.axes_of_replica, *([self.dp] if self.dp.size > 1 else [])]

    @property
    def axes_of_replica(self) -> list[C]:
        """Those of `axes` along which a replica extends."""
        return [comm for comm in (self.tp, self.cp, self.pp) if comm.size > 1]

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this is the first rank of its replica."""
        return all(comm.rank == 0 for comm in self.axes_of_replica)

    def __deepcopy__(self, memo: object) -> Self:
        """Return itself: a copy of a model communicates with the same ranks."""
        return self


def along_axes(mesh: Mesh, make: Callable[[Sequence[Sequence[int]]], T]) -> dict[str, T]:
    """The communicators of `AxisGroups` by name; those with the same ranks are one. Every rank must call it.

    Args:
        mesh: The mesh of the run.
        make: Returns this rank's communicator, given the global ranks of all groups along the same axes.
    """
    made: dict[tuple[tuple[int, ...], ...], T] = {}
    found: dict[str, T] = {}
    for name, axes in AXES_OF_GROUPS.items():
        groups = mesh.expert_groups if axes == "ep" else mesh.groups(axes)
        if groups not in made:
            made[groups] = make(groups)
        found[name] = made[groups]
    return found
