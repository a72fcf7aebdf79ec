"""The groups of a run along the axes of its mesh."""

from __future__ import annotations

import os
from collections.abc import Sequence

import mlx.core as mx

from partita.core.mesh import Mesh
from partita.errors import DistributedError, PlanError
from partita.mlx.collectives.checked import CheckedCommunicator
from partita.mlx.collectives.comm import Communicator
from partita.ranks import liveness
from partita.ranks.backends import MLX_BACKENDS, open_mpi, refuse_mesh
from partita.ranks.groups import AxisGroups, along_axes

_OF_LAUNCHER = {
    "mpi": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "ring": ("MLX_HOSTFILE",),
    "jaccl": ("MLX_JACCL_COORDINATOR",),
    "nccl": ("NCCL_HOST_IP",),
}
"""Environment variables that a launcher sets for a rank, by backend."""


class ParallelGroups(AxisGroups[Communicator]):
    """This rank's groups: `.mesh`, `.tp`, `.pp`, `.dp`, `.cp` and `.replicas` (dp and cp), and its rank `.rank` in the run."""


def backend_of_environment() -> str | None:
    """The backend that the launcher of this process has prepared (mpirun, mlx.launch, ours), or None without one."""
    if os.environ.get("OMPI_COMM_WORLD_SIZE") == "1":
        return None  # `mpirun -n 1`, which MLX cannot join.
    return next(
        (backend for backend, names in _OF_LAUNCHER.items() if any(os.environ.get(name) for name in names)), None
    )


_worlds: dict[tuple[str, bool, bool], Communicator] = {}


def init(backend: str | None = None, *, reduce_in_float32: bool = False, checked: bool = False) -> Communicator:
    """Join the ranks that the launcher's environment defines, or run as a single rank without a launcher.

    Args:
        backend: `mpi`, `ring`, `jaccl` or `nccl`; default: the backend that the launcher prepared.
        reduce_in_float32: Whether float16 and bfloat16 are summed in float32.
        checked: Whether the ranks compare each collective before running it; see `CheckedCommunicator`.

    Returns:
        A communicator of all ranks of the run.

    Raises:
        DistributedError: The backend is unknown, or cannot be joined. It never falls back to a single rank.
    """
    backend = backend or backend_of_environment()
    if backend is None:
        return Communicator.single()
    if backend not in MLX_BACKENDS:
        raise DistributedError(f"backend must be one of {', '.join(MLX_BACKENDS)}; got {backend!r}.")
    key = backend, reduce_in_float32, checked
    if key not in _worlds:
        kind = CheckedCommunicator if checked else Communicator
        world = kind(_join(backend), backend=backend, reduce_in_float32=reduce_in_float32)
        _worlds[key] = world
        liveness.join(world.rank, world.size, world.all_gather_object)
    return _worlds[key]


def join(backend: str | None = None) -> int:
    """Join the ranks that the launcher's environment defines, like `init`. Returns the number of ranks."""
    return init(backend).size


def leave() -> None:
    """Wait for all ranks of the run."""
    for world in _worlds.values():
        world.barrier()
    liveness.farewell()


def has_met_others() -> bool:
    """Whether this process has joined a run of several ranks."""
    return any(world.size > 1 for world in _worlds.values())


def _join(backend: str) -> mx.distributed.Group:
    mpi = open_mpi() if backend == "mpi" else None
    if mpi is not None and mpi.library is not None:
        os.environ.setdefault("MLX_MPI_LIBNAME", mpi.library)
    if not any(os.environ.get(name) for name in _OF_LAUNCHER[backend]):
        raise DistributedError(
            f"the {backend} backend needs a launcher, which sets {' or '.join(_OF_LAUNCHER[backend])}. Start the ranks with "
            f"{'mpirun' if backend == 'mpi' else 'mlx.launch'}, or let `partita` start them."
        )
    try:
        return mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the {backend} backend of MLX cannot be joined: {error}. Is it installed, and does the launcher match it?"
        ) from error


def make_groups(
    mesh: Mesh, *, backend: str | None = None, reduce_in_float32: bool = False, checked: bool = False
) -> ParallelGroups:
    """The groups of `mesh` over the ranks of the run. Every rank must call it. The arguments are those of `init`.

    Raises:
        DistributedError: The mesh and the run have different numbers of ranks, or the backend cannot create the groups.
        PlanError: The mesh distributes experts.
    """
    if mesh.ep > 1:
        raise PlanError(f"ep={mesh.ep} needs the torch engine: MLX splits each expert over tp. Leave ep out.")
    world = init(backend, reduce_in_float32=reduce_in_float32, checked=checked)
    if mesh.size != world.size:
        raise DistributedError(
            f"the mesh {mesh} has {mesh.size} rank{'s' if mesh.size > 1 else ''}, but the run has {world.size}. "
            f"Start {mesh.size}, or change dp, pp, cp or tp so that their product is {world.size}."
        )
    if world.backend is not None:
        refuse_mesh(mesh, world.backend)
    made = along_axes(mesh, lambda groups: _along(groups, world))
    liveness.ME.stage = made["pp"].rank
    return ParallelGroups(mesh, **made)


def _along(groups: Sequence[Sequence[int]], world: Communicator) -> Communicator:
    """This rank's communicator in one of `groups`."""
    if len(groups[0]) == 1:
        return Communicator.single()
    if len(groups) == 1:
        return world
    mine = next(color for color, ranks in enumerate(groups) if world.rank in ranks)
    return world.split(mine, groups[mine].index(world.rank))


def single_groups(
    mesh: Mesh | None = None, *, tp: Communicator | None = None, pp: Communicator | None = None
) -> ParallelGroups:
    """The groups of a single rank, or of ranks with a tensor or a pipeline group only."""
    alone = Communicator.single()
    return ParallelGroups(mesh or Mesh(), tp or alone, pp or alone, *(alone,) * 5)


def as_communicator(group: Communicator | mx.distributed.Group | None) -> Communicator:
    """The communicator of an MLX group (None: all ranks of the run)."""
    if isinstance(group, Communicator):
        return group
    return init() if group is None else Communicator(group)
