"""Mesh: ranks and coordinates, for every mesh of up to 16 ranks."""

from __future__ import annotations

import pytest

from partita.core.mesh import AXES, Axis, Coordinate, Mesh
from partita.errors import PlanError

MESHES = [Mesh(dp, pp, tp) for dp in range(1, 17) for pp in range(1, 17) for tp in range(1, 17) if dp * pp * tp <= 16]


def test_eight_ranks() -> None:
    mesh = Mesh(dp=2, pp=2, tp=2)
    assert mesh.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.groups("pp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.groups("dp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.coordinate(6) == Coordinate(dp=1, pp=1, tp=0)
    assert str(mesh) == "dp 2 x pp 2 x tp 2"


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_coordinates_are_one_to_one(mesh: Mesh) -> None:
    assert mesh.size == mesh.dp * mesh.pp * mesh.tp
    places = [mesh.coordinate(rank) for rank in range(mesh.size)]
    assert sorted(places) == places  # tp varies fastest, then pp, then dp
    assert len(set(places)) == mesh.size
    assert [mesh.rank(dp=p.dp, pp=p.pp, tp=p.tp) for p in places] == list(range(mesh.size))


@pytest.mark.parametrize("axis", AXES)
def test_groups_partition_the_ranks(axis: Axis) -> None:
    for mesh in MESHES:
        groups = mesh.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)
        for group in groups:
            assert len(group) == mesh.axis_size(axis)
            assert all(mesh.group(axis, rank) == group for rank in group)
            places = [mesh.coordinate(rank)._asdict() for rank in group]
            assert [place.pop(axis) for place in places] == list(range(len(group)))
            assert all(place == places[0] for place in places)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", None, True])
@pytest.mark.parametrize("axis", AXES)
def test_refuses_sizes(axis: Axis, size: object) -> None:
    with pytest.raises(PlanError, match=f"{axis} must be a whole number of at least 1, but is {size!r}"):
        Mesh(**{axis: size})  # type: ignore[arg-type]


def test_refuses_places_outside() -> None:
    mesh = Mesh(1, 2, 3)
    for rank in (-1, 6):
        with pytest.raises(PlanError, match=rf"rank must be in \[0, 6\) of dp 1 x pp 2 x tp 3, but is {rank}"):
            mesh.coordinate(rank)
    for axis, index in (("dp", 1), ("pp", 2), ("tp", 3), ("tp", -1)):
        with pytest.raises(PlanError, match=f"{axis} must be in"):
            mesh.rank(**{axis: index})
