"""The process groups of a run along the axes of its mesh, and the default groups of the seed API's layers."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partita.core.layout.layout import set_default_pipeline_rank
from partita.core.mesh import Mesh
from partita.errors import DistributedError
from partita.ranks import liveness, schedulers
from partita.ranks.groups import AxisGroups, along_axes
from partita.torch.collectives import mpi
from partita.torch.collectives.comm import Communicator, Work
from partita.torch.collectives.mappings import gather_from, scatter_to


@dataclass(frozen=True)
class GroupInfo:
    """This rank's group along one axis.

    Attributes:
        comm: Its communicator.
    """

    comm: Communicator

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The torch.distributed group; None if no process group is initialized."""
        return self.comm.group

    @property
    def global_ranks(self) -> list[int]:
        """Ranks of the group's members in the whole run."""
        return list(self.comm.global_ranks)

    @property
    def rank(self) -> int:
        """Rank of this process within the group."""
        return self.comm.rank

    @property
    def world_size(self) -> int:
        """Number of ranks in the group."""
        return self.comm.size

    def reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, *, async_op: bool = False) -> Tensor | Work:
        """Reduce `tensor` over the group in place. Returns the tensor, or with `async_op` (sums only) a handle to wait for."""
        if not async_op:
            return self.comm.all_reduce_(tensor, op)
        if op != dist.ReduceOp.SUM:
            raise DistributedError(f"async_op=True needs op SUM, but op is {op}. Leave async_op out.")
        return self.comm.start_all_reduce_(tensor)

    def split(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of `tensor` `[..., N, ...]` along `dim`: `[..., N / world_size, ...]`."""
        return scatter_to(tensor, self.comm, dim)

    def gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """The parts of all ranks along `dim`: `[..., N, ...]` to `[..., N * world_size, ...]`."""
        return gather_from(tensor, self.comm, dim)


class ParallelGroups(AxisGroups[Communicator]):
    """This rank's groups: `.mesh`, `.tp`, `.pp`, `.dp`, `.cp`, `.replicas` (dp and cp), `.ep`, `.edp`, and its `.rank`."""


@dataclass(frozen=True)
class ParallelGroupInfo:
    """This rank's groups along every axis, with the seed API's names.

    Attributes:
        mp: The model (tensor) parallel group.
        pp: The pipeline group.
        dp: The data parallel group.
    """

    mp: GroupInfo
    pp: GroupInfo
    dp: GroupInfo


_groups: ParallelGroups | None = None
_made: dict[Mesh, ParallelGroups] = {}
_made_of: dist.ProcessGroup | None = None
"""The process group that the groups in `_made` belong to: another run in this process has its own groups."""
_timeout: timedelta | None = None


def init_process_group(
    *, backend: str | None = None, timeout_s: float = 1800.0, lost_after_s: float | None = None
) -> None:
    """Join the ranks that the launcher's environment defines (torchrun's RANK, WORLD_SIZE, ...), or run as a single rank.

    Does nothing if a process group exists already. `backend` defaults to gloo on CPU and NCCL on CUDA; ranks that
    share a GPU default to gloo. The other arguments are those of `init_parallelism`.

    Raises:
        DistributedError: A process group with another backend exists already.
    """
    global _timeout
    if dist.is_initialized():
        there = dist.get_backend_config()
        if backend is not None and backend not in (dist.get_backend(), there):
            raise DistributedError(
                f"backend is {backend!r}, but torch.distributed is initialized already, with {there}. Leave it out."
            )
        return
    _timeout = timedelta(seconds=timeout_s)
    mpi.meet()
    schedulers.adopt()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = backend or ("cuda:nccl,cpu:gloo" if has_own_gpu() else "gloo")
    is_alone = "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1"
    store, rank, world = (dist.HashStore(), 0, 1) if is_alone else _store(_timeout)  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=_timeout, store=store, rank=rank, world_size=world)
    _watch_peers(timeout_s, lost_after_s)


def has_own_gpu() -> bool:
    """Whether each rank of this machine has its own GPU, which NCCL requires."""
    return torch.cuda.is_available() and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()


def _store(timeout: timedelta) -> tuple[Any, int, int]:
    """The rendezvous store, this process's rank and the number of ranks; empty if torch's default store is suitable.

    torch's store listens on all networks, even if all ranks are on one machine. And torchrun keeps one store for all attempts,
    so gloo would read the addresses of ranks that have exited (torch 2.13).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0":
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        return dist.PrefixStore(f"attempt {attempt}", store), rank, world  # type: ignore[attr-defined]
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if address != "127.0.0.1" or not port.isdigit() or "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        return None, -1, -1
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    door = socket.create_server((address, int(port))).detach() if rank == 0 else None
    store = dist.TCPStore(address, int(port), world, rank == 0, timeout, master_listen_fd=door)  # type: ignore[attr-defined]
    return store, rank, world


def _watch_peers(stall_s: float, limit_s: float | None = None) -> None:
    """Start the detection of lost ranks (see `partita.ranks.liveness`)."""

    def gather(value: object) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    liveness.join(dist.get_rank(), dist.get_world_size(), gather, limit_s=limit_s, stall_s=stall_s)


def join(backend: str | None = None) -> int:
    """Join the ranks that the launcher's environment defines. Returns the number of ranks.

    `backend` exists for MLX's `join`; with torch, our launcher's environment selects gloo or Open MPI.
    """
    init_process_group()
    return dist.get_world_size()


def leave() -> None:
    """Wait for all ranks of the run, and end the process group."""
    dist.barrier()
    liveness.farewell()
    dist.destroy_process_group()


def make_groups(mesh: Mesh, *, backend: str | None = None) -> ParallelGroups:
    """The groups of `mesh` over the ranks of the run, which it joins; created once per mesh. Every rank must call it.

    `backend` exists for MLX's `make_groups`; torch ranks selected theirs when they joined.

    Raises:
        DistributedError: The mesh and the run have different numbers of ranks.
    """
    if "RANK" in os.environ:
        init_process_group()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if mesh.size != world:
        raise DistributedError(
            f"the mesh {mesh} has {mesh.size} rank{'s' if mesh.size > 1 else ''}, but the run has {world}. "
            f"Start {mesh.size}, or change dp, pp, cp or tp so that their product is {world}."
        )
    global _made_of
    run = dist.group.WORLD if dist.is_initialized() else None
    if run is not _made_of:
        _made.clear()
        _made_of = run
    if mesh not in _made:
        rank = dist.get_rank() if run is not None else 0
        infos = along_axes(mesh, lambda groups: _along(groups, mesh, rank, run))
        _made[mesh] = ParallelGroups(mesh, **infos)
    liveness.ME.stage = _made[mesh].pp.rank
    return _made[mesh]


def _along(groups: Sequence[Sequence[int]], mesh: Mesh, rank: int, run: dist.ProcessGroup | None) -> Communicator:
    """This rank's communicator in one of `groups`."""
    mine = _alone(rank, run)
    for ranks in groups:
        if len(ranks) == 1:
            continue
        group = run if len(ranks) == mesh.size else dist.new_group(list(ranks), timeout=_timeout)
        if rank in ranks:
            mine = mpi.MpiCommunicator(group) if mpi.is_there() else Communicator(group)
    return mine


def _alone(rank: int, run: dist.ProcessGroup | None) -> Communicator:
    """A communicator of this rank only. In a run of several ranks it has its own group, since torch reads None as all ranks."""
    if run is None or run.size() == 1:
        return Communicator(run) if run is not None else Communicator.single()
    return Communicator(dist.new_group([rank], timeout=_timeout, use_local_synchronization=True))


def single_groups(
    *, mesh: Mesh | None = None, tp: Communicator | None = None, pp: Communicator | None = None
) -> ParallelGroups:
    """The groups of a single rank, or of ranks with a tensor or a pipeline group only."""
    alone = Communicator.single()
    return ParallelGroups(mesh or Mesh(), tp or alone, pp or alone, *(alone,) * 5)


def init_parallelism(
    model_parallelism: int = 1,
    pipeline_parallelism: int = 1,
    *,
    backend: str | None = None,
    timeout_s: float = 1800.0,
    lost_after_s: float | None = None,
) -> ParallelGroups:
    """Join the run and create its groups. The data parallel size is the number of ranks divided by the other two sizes.

    Args:
        model_parallelism: Number of ranks in a tensor parallel group (tp).
        pipeline_parallelism: Number of ranks in a pipeline group (pp).
        backend: torch.distributed backend (default: gloo on CPU, NCCL on CUDA if each rank has its own GPU).
        timeout_s: Seconds after which a collective fails that other live ranks do not join.
        lost_after_s: Seconds of silence after which a rank counts as lost and all other ranks exit with
            exit code 75 and a message that names it (default: `PARTITA_LOST_AFTER`, else 30; 0 for never).

    Raises:
        DistributedError: It was called already, or the number of ranks is not a multiple of the product.

    Source: `ml.utils.parallel.init_parallelism`.
    """
    global _groups
    if _groups is not None:
        raise DistributedError("parallelism is initialized already. Call reset_parallelism() first to change it.")
    init_process_group(backend=backend, timeout_s=timeout_s, lost_after_s=lost_after_s)
    world = dist.get_world_size()
    per_replica = Mesh(pp=pipeline_parallelism, tp=model_parallelism).size
    if world % per_replica:
        raise DistributedError(
            f"the run has {world} ranks, which is not a multiple of model_parallelism ({model_parallelism}) x "
            f"pipeline_parallelism ({pipeline_parallelism}) = {per_replica}."
        )
    _groups = make_groups(Mesh(dp=world // per_replica, pp=pipeline_parallelism, tp=model_parallelism))
    set_default_pipeline_rank(lambda: _groups.pp.rank if _groups is not None else None)
    return _groups


initialize_parallelism = init_parallelism


def reset_parallelism() -> None:
    """Forget the default groups, so that `init_parallelism` may be called again. The process group stays."""
    global _groups
    _groups = None
    set_default_pipeline_rank(None)


def parallelism_is_initialized() -> bool:
    """Whether `init_parallelism` was called."""
    return _groups is not None


def parallel_group_info() -> ParallelGroupInfo:
    """This rank's default groups: `.mp`, `.pp` and `.dp`, each with `.group`, `.global_ranks`, `.rank`, `.world_size`.

    Raises:
        DistributedError: `init_parallelism` was not called.
    """
    if _groups is None:
        raise DistributedError("parallelism is not initialized. Call partita.torch.init_parallelism() first.")
    return ParallelGroupInfo(GroupInfo(_groups.tp), GroupInfo(_groups.pp), GroupInfo(_groups.dp))
