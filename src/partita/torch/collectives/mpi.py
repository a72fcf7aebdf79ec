"""A communicator over Open MPI for CPU tensors: shared memory between ranks of one host, any network between hosts.

The environment shows whether a process is a rank of Open MPI. Tensors on other devices use torch.distributed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partita.ranks.liveness import ME
from partita.ranks.waiting import open_mpi_waits, wait_until
from partita.torch.collectives import operators
from partita.torch.collectives.arrivals import Arrivals
from partita.torch.collectives.comm import Communicator, Work, exactly_empty

_SUM = dist.ReduceOp.SUM


def is_there() -> bool:
    """Whether this process is a rank of Open MPI and can use it."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ and find_spec("mpi4py") is not None


def _mpi() -> Any:
    for name, value in open_mpi_waits(int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))).items():
        os.environ.setdefault(name, value)
    from mpi4py import MPI

    return MPI


def meet() -> None:
    """Set the environment variables of torch.distributed, which mpirun does not set."""
    if not is_there() or "RANK" in os.environ:
        return
    world = _mpi().COMM_WORLD
    # Ranks start at different times.
    wait_until(world.Ibarrier().Test)
    machine = socket.gethostname()
    is_local = len(set(world.allgather(machine))) == 1
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("", 0))
        address, port = world.bcast(("127.0.0.1" if is_local else machine, probe.getsockname()[1]))
    if is_local:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        LOCAL_WORLD_SIZE=os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
        MASTER_ADDR=address, MASTER_PORT=str(port),
    )  # fmt: skip


class _Request:
    """A transfer in progress, and the memory it reads or writes."""

    def __init__(self, request: Any, kept: Tensor) -> None:
        self.request, self.kept = request, kept

    def wait(self) -> None:
        """Block until the transfer is complete."""
        with ME.over("a transfer"):
            wait_until(self.request.Test)

    def is_completed(self) -> bool:
        """Whether the transfer is complete."""
        return bool(self.request.Test())


class MpiCommunicator(Communicator):
    """A group of ranks that communicate through Open MPI.

    Sums of float16 and bfloat16 are computed in float32. Results are bitwise equal on every rank and from run to run.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Create the communicator of `group` (default: all ranks). Every rank of the group must call it."""
        super().__init__(group)
        self._is_pair = False
        mpi = _mpi()
        world = mpi.COMM_WORLD
        self.mpi = world.Create_group(world.group.Incl(list(self.global_ranks)), tag=len(self.global_ranks))
        self._arrived = Arrivals(mpi, self.mpi).all
        self._types: dict[torch.dtype, Any] = {
            torch.float64: mpi.DOUBLE, torch.float32: mpi.FLOAT, torch.int64: mpi.INT64_T, torch.int32: mpi.INT32_T,
            torch.int16: mpi.INT16_T, torch.int8: mpi.INT8_T, torch.uint8: mpi.UINT8_T,
        }  # fmt: skip
        # Sums of the other two are computed in float32.
        self._sum_types = {**self._types, torch.bfloat16: mpi.FLOAT, torch.float16: mpi.FLOAT}
        self._ops: dict[Any, Any] = {
            dist.ReduceOp.SUM: mpi.SUM, dist.ReduceOp.AVG: mpi.SUM, dist.ReduceOp.MAX: mpi.MAX, dist.ReduceOp.MIN: mpi.MIN,
            dist.ReduceOp.PRODUCT: mpi.PROD,
        }  # fmt: skip
        self._in_place, self._memory, self._byte = mpi.IN_PLACE, mpi.memory.fromaddress, mpi.BYTE
        self._all_reduce, self._sum = self.mpi.Allreduce, mpi.SUM

    def _goes(self, tensor: Tensor) -> bool:
        return self.size > 1 and tensor.is_cpu

    def _elements(self, tensor: Tensor) -> list[Any]:
        size = tensor.numel()
        return [self._memory(tensor.data_ptr(), size * tensor.itemsize), size, self._types[tensor.dtype]]

    def _bytes(self, tensor: Tensor) -> list[Any]:
        return [self._memory(tensor.data_ptr(), tensor.numel() * tensor.itemsize), self._byte]

    def _summable(self, tensor: Tensor) -> Tensor:
        """`tensor`, or a contiguous copy in a dtype that MPI can reduce."""
        if tensor.dtype in self._types:
            return tensor.detach().contiguous()
        return tensor.detach().to(torch.float32 if tensor.is_floating_point() else torch.uint8).contiguous()

    @operators.traced_as(operators.all_reduce_)
    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """See `Communicator.all_reduce_`."""
        kind = self._sum_types.get(tensor.dtype)
        if kind is not None and op is _SUM and tensor.is_cpu and self.size > 1 and tensor.is_contiguous():
            # The fast path of layers. Every step of a small message costs: the context manager alone takes a quarter of its
            # time.
            total = tensor if tensor.dtype in self._types else tensor.detach().float()
            count = total.numel()
            ME.begin("an all-reduce")
            memory = self._memory(total.data_ptr(), count * total.itemsize)
            try:
                self._arrived()
                self._all_reduce(self._in_place, (memory, count, kind), self._sum)
            finally:
                ME.end()
            if total is not tensor:
                return self._written(tensor, total)
            torch.autograd.graph.increment_version(tensor)
            return tensor
        if not self._goes(tensor):
            return super().all_reduce_(tensor, op)
        buffer = self._summable(tensor)
        with ME.over("an all-reduce"):
            self._arrived()
            self.mpi.Allreduce(self._in_place, self._elements(buffer), self._ops[op])
        if op == dist.ReduceOp.AVG:
            buffer /= self.size
        return self._written(tensor, buffer)

    def _written(self, tensor: Tensor, buffer: Tensor) -> Tensor:
        if buffer.data_ptr() != tensor.data_ptr() or buffer.dtype != tensor.dtype:
            with torch.no_grad():
                tensor.copy_(buffer)
        else:
            torch.autograd.graph.increment_version(tensor)
        return tensor

    def start_all_reduce_(self, tensor: Tensor) -> Work:
        """See `Communicator.start_all_reduce_`; over shared memory it is over before an overlap would pay."""
        if not self._goes(tensor):
            return super().start_all_reduce_(tensor)
        self.all_reduce_(tensor)
        return Communicator.single().start_all_reduce_(tensor)

    def overlaps(self, tensor: Tensor) -> bool:
        """See `Communicator.overlaps`; Open MPI's proceed only while a rank waits for them."""
        return not self._goes(tensor) and super().overlaps(tensor)

    @operators.traced_as(operators.all_gather)
    def all_gather(self, tensor: Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
        """See `Communicator.all_gather`."""
        if not self._goes(tensor):
            return super().all_gather(tensor, dim, sizes)
        part = tensor.detach().contiguous()
        shapes = [list(part.shape) for _ in range(self.size)]
        for shape, size in zip(shapes, sizes or (), strict=False):
            shape[dim] = size
        counts = [torch.Size(shape).numel() for shape in shapes]
        flat = part.new_empty(sum(counts))
        in_bytes = [count * part.itemsize for count in counts]
        with ME.over("an all-gather"):
            self._arrived()
            self.mpi.Allgatherv(
                self._bytes(part), [self._memory(flat.data_ptr(), sum(in_bytes)), in_bytes, None, self._byte]
            )
        return torch.cat([part.view(shape) for part, shape in zip(flat.split(counts), shapes, strict=True)], dim)

    @operators.traced_as(operators.reduce_scatter)
    def reduce_scatter(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """See `Communicator.reduce_scatter`."""
        if not self._goes(tensor):
            return super().reduce_scatter(tensor, dim, sizes)
        sizes = sizes if sizes is not None else self.even_sizes(tensor.shape[dim])
        rows = self._summable(tensor.movedim(dim, 0))
        part = rows.new_empty((sizes[self.rank], *rows.shape[1:]))
        inner = torch.Size(rows.shape[1:]).numel()
        with ME.over("a reduce-scatter"):
            self._arrived()
            self.mpi.Reduce_scatter(
                self._elements(rows),
                self._elements(part),
                [size * inner for size in sizes],
                self._ops[dist.ReduceOp.SUM],
            )
        return part.to(tensor.dtype).movedim(0, dim)

    def all_to_all(self, tensor: Tensor, sizes: Sequence[int], received: Sequence[int]) -> Tensor:
        """See `Communicator.all_to_all`."""
        if not self._goes(tensor):
            return super().all_to_all(tensor, sizes, received)
        own = tensor.detach().contiguous()
        found = exactly_empty((sum(received), *own.shape[1:]), own.dtype, own.device)
        row = torch.Size(own.shape[1:]).numel() * own.itemsize
        sent, got = ([size * row for size in counts] for counts in (sizes, received))
        with ME.over("an all-to-all"):
            self._arrived()
            self.mpi.Alltoallv(
                [self._memory(own.data_ptr(), sum(sent)), sent, None, self._byte],
                [self._memory(found.data_ptr(), sum(got)), got, None, self._byte],
            )
        return found

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """See `Communicator.broadcast_`."""
        if not self._goes(tensor):
            return super().broadcast_(tensor, source)
        buffer = tensor.detach().contiguous()
        with ME.over("a broadcast"):
            self._arrived()
            self.mpi.Bcast(self._bytes(buffer), source)
        return self._written(tensor, buffer)

    def send(self, tensor: Tensor, to: int) -> None:
        """See `Communicator.send`."""
        if not self._goes(tensor):
            super().send(tensor, to)
            return
        buffer = tensor.detach().contiguous()
        with ME.over("a send"):
            wait_until(self.mpi.Isend(self._bytes(buffer), to).Test)

    def recv_(self, tensor: Tensor, source: int) -> Tensor:
        """See `Communicator.recv_`."""
        if not self._goes(tensor):
            return super().recv_(tensor, source)
        buffer = tensor.detach().contiguous()
        with ME.over("a receive"):
            wait_until(self.mpi.Irecv(self._bytes(buffer), source).Test)
        return self._written(tensor, buffer)

    def start_send(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        """See `Communicator.start_send`."""
        if not self._goes(tensor):
            return super().start_send(tensor, to, tag)
        return _Request(self.mpi.Isend(self._bytes(tensor), to, tag), tensor)

    def start_recv_(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        """See `Communicator.start_recv_`."""
        if not self._goes(tensor):
            return super().start_recv_(tensor, source, tag)
        return _Request(self.mpi.Irecv(self._bytes(tensor), source, tag), tensor)

    def barrier(self) -> None:
        """See `Communicator.barrier`."""
        if self.size > 1:
            with ME.over("a barrier"):
                wait_until(self.mpi.Ibarrier().Test)
