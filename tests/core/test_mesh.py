"""Mesh: ranks and coordinates, for every mesh of up to 16 ranks."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest

from partita.core.mesh import AXES, EXPERT_AXES, Axis, Coordinate, ExpertCoordinate, Mesh
from partita.errors import PlanError

SIZES = [sizes for sizes in product(range(1, 17), repeat=4) if prod(sizes) <= 16]
MESHES = [Mesh(dp=dp, pp=pp, cp=cp, tp=tp) for dp, pp, cp, tp in SIZES]


def test_eight_ranks() -> None:
    mesh = Mesh(dp=2, pp=2, tp=2)
    assert mesh.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.groups("pp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.groups("dp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.coordinate(6) == Coordinate(dp=1, pp=1, tp=0)
    assert str(mesh) == "dp 2 x pp 2 x tp 2"


def test_context_is_between_tensor_and_pipeline() -> None:
    mesh = Mesh(dp=2, pp=2, cp=2, tp=2)
    assert mesh.groups("cp")[:2] == ((0, 2), (1, 3))
    assert mesh.groups("pp")[:2] == ((0, 4), (1, 5))
    assert mesh.groups(("dp", "cp"))[0] == (0, 2, 8, 10)
    assert str(mesh) == "dp 2 x pp 2 x cp 2 x tp 2"


def test_coordinates_are_one_to_one() -> None:
    for mesh in MESHES:
        assert mesh.size == mesh.dp * mesh.pp * mesh.cp * mesh.tp
        places = [mesh.coordinate(rank) for rank in range(mesh.size)]
        in_order = [(place.dp, place.pp, place.cp, place.tp) for place in places]
        assert sorted(set(in_order)) == in_order  # tp varies fastest, then cp, pp and dp
        assert [mesh.rank(**place._asdict()) for place in places] == list(range(mesh.size))


def test_experts_fold_over_the_ranks_of_a_stage() -> None:
    mesh = Mesh(dp=2, pp=2, tp=4, ep=4, etp=2)
    stage = mesh.group(("dp", "tp"), 0)
    assert stage == (0, 1, 2, 3, 8, 9, 10, 11)
    assert mesh.group("etp", 9) == (8, 9)
    assert mesh.group("ep", 9) == (1, 3, 9, 11)
    assert mesh.group("edp", 9) == (9,)
    assert mesh.expert_coordinate(9) == ExpertCoordinate(edp=0, ep=2, etp=1)
    assert str(mesh) == "dp 2 x pp 2 x tp 4, experts ep 4 x etp 2"


def test_expert_groups_partition_the_ranks_of_each_stage() -> None:
    for dp, pp, cp, tp in SIZES:
        for ep, etp in product((1, 2, 3, 4), (None, 1, 2)):
            if etp is None:
                if dp * cp * tp % ep:
                    continue
            elif dp * cp * tp % (ep * etp):
                with pytest.raises(PlanError, match="ep x etp must divide the ranks of a stage"):
                    Mesh(dp=dp, pp=pp, cp=cp, tp=tp, ep=ep, etp=etp)
                continue
            mesh = Mesh(dp=dp, pp=pp, cp=cp, tp=tp, ep=ep, etp=etp)
            for index, axis in enumerate(EXPERT_AXES):
                groups = mesh.groups(axis)
                assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
                for group in groups:
                    places = [mesh.expert_coordinate(rank) for rank in group]
                    assert [place[index] for place in places] == list(range(mesh.axis_size(axis)))
                    assert len({(place[:index], place[index + 1 :]) for place in places}) == 1
                    assert len({mesh.coordinate(rank).pp for rank in group}) == 1


@pytest.mark.parametrize(
    ("sizes", "etp"),
    [({"tp": 4}, 4), ({"tp": 4, "ep": 2}, 2), ({"dp": 2, "tp": 2, "ep": 2}, 2), ({"tp": 3, "ep": 3}, 1)],
)
def test_etp_is_what_remains_of_tp(sizes: dict[str, int], etp: int) -> None:
    assert Mesh(**sizes).etp == etp


def test_names_the_nearest_ep() -> None:
    with pytest.raises(PlanError, match=r"3 x 1 does not divide 4. The nearest that does is ep=2"):
        Mesh(dp=2, tp=2, ep=3)


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
    mesh = Mesh(pp=2, tp=3)
    for rank in (-1, 6):
        with pytest.raises(PlanError, match=rf"rank must be in \[0, 6\) of dp 1 x pp 2 x tp 3, but is {rank}"):
            mesh.coordinate(rank)
    for axis, index in (("dp", 1), ("pp", 2), ("tp", 3), ("tp", -1)):
        with pytest.raises(PlanError, match=f"{axis} must be in"):
            mesh.rank(**{axis: index})
