"""Communicator: the only object through which layers communicate with other ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from partita.core.sharding.split import Split
from partita.errors import DistributedError
from partita.ranks.liveness import waits_in
from partita.torch.collectives import cpu_memory, operators


class Work(Protocol):
    """A collective in progress."""

    def wait(self) -> object:
        """Block until the result is available."""


class _Done:
    def wait(self) -> None:
        return None


_DONE = _Done()

EXCHANGE_BYTES = 1 << 20
"""Up to this size, send and receive between two CPU ranks are faster than gloo's collectives: 112
microseconds instead of 310 for 4 KB, 689 instead of 949 for 1 MB (best tenths, one host, two cores)."""

_TAG = 0x50A7
"""Tag of our exchanges, so that they never match another library's send."""


@contextmanager
def _memory_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield `tensor`, or a contiguous copy whose values are copied back to it at the end."""
    if tensor.is_contiguous():
        yield tensor
        return
    copy = tensor.detach().contiguous()
    yield copy
    with torch.no_grad():
        tensor.copy_(copy)


def exactly_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor of exactly `dtype`, to receive into, even while `Float64Everywhere` widens other tensors."""
    with torch._C.DisableTorchFunction():
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def _rows_of_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor `[n, ...]` as `[n, bytes of a row]`."""
    width = math.prod(tensor.shape[1:])
    return tensor.view(tensor.shape[0], width).view(torch.uint8)


class Communicator:
    """A group of ranks of torch.distributed (gloo, NCCL, MPI), or one rank alone.

    Every rank of the group calls the same methods in the same order with tensors of the same dtype. Shapes may differ only
    where a method takes `sizes`.

    Attributes:
        rank: Rank of this process within the group.
        size: Number of ranks in the group.
        global_ranks: Ranks of the members in the whole run.
        key: Identifies the communicator within this process in compiled graphs.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Create the communicator of `group` (default: all ranks)."""
        if not dist.is_initialized():
            raise DistributedError(
                "torch.distributed is not initialized. Call partita.torch.init_parallelism() or "
                "torch.distributed.init_process_group() first, or use Communicator.single()."
            )
        self.group = group if group is not None else dist.group.WORLD
        assert self.group is not None
        self.rank: int = dist.get_rank(self.group)
        if self.rank < 0:
            raise DistributedError(f"rank {dist.get_rank()} is not in this group.")
        self.size: int = dist.get_world_size(self.group)
        self.global_ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(self.group))
        self.key = operators.register(self)
        backends = dict(part.split(":", 1) for part in dist.get_backend_config(self.group).split(","))
        self._is_pair = self.size == 2 and "gloo" in backends.values()
        # Device types whose tensors the group's backends can exchange directly.
        self._direct = frozenset(device for device, backend in backends.items() if backend != "gloo" or device == "cpu")

    @classmethod
    def single(cls) -> Communicator:
        """A single rank: every collective returns immediately."""
        alone = cls.__new__(cls)
        alone.group = None
        alone.rank, alone.size, alone.global_ranks = 0, 1, (0,)
        alone._is_pair = False
        alone._direct = frozenset()
        return alone

    def _is_staged(self, tensor: Tensor) -> bool:
        """Whether a tensor must be exchanged through CPU memory."""
        return self.size > 1 and not tensor.is_cpu and tensor.device.type not in self._direct

    @operators.traced_as(operators.all_reduce_)
    @waits_in("an all-reduce")
    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over the ranks in place."""
        if self.size == 1:
            return tensor
        if self._is_staged(tensor):
            return cpu_memory.all_reduce_(self, tensor, op)
        if op == dist.ReduceOp.SUM and self._exchanges(tensor, tensor.numel()):
            other = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            self._exchange(tensor.contiguous(), other)
            with torch.no_grad():
                # a + b equals b + a bit for bit, so both ranks get the same sum.
                return tensor.add_(other)
        with _memory_of(tensor) as memory:
            dist.all_reduce(memory, op=op, group=self.group)
        return tensor

    def _exchanges(self, tensor: Tensor, numel: int) -> bool:
        """Whether two ranks should exchange a tensor of at most `numel` elements by send and receive."""
        return self._is_pair and tensor.device.type == "cpu" and numel * tensor.itemsize <= EXCHANGE_BYTES

    def _exchange(self, local: Tensor, remote: Tensor) -> None:
        """Send `local` to the other of two ranks and receive its tensor into `remote`; the sizes may differ."""
        assert self.group is not None
        other = 1 - self.rank
        received = self.group.recv([remote], other, _TAG)
        sent = self.group.send([local], other, _TAG)
        received.wait()
        sent.wait()

    def start_all_reduce_(self, tensor: Tensor) -> Work:
        """Start a sum over the ranks in place; `tensor` holds the sum after `wait()`."""
        if self.size == 1:
            return _DONE
        if not tensor.is_contiguous() or self._is_staged(tensor):
            self.all_reduce_(tensor)
            return _DONE
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work  # type: ignore[no-any-return]

    @operators.traced_as(operators.all_gather)
    @waits_in("an all-gather")
    def all_gather(self, tensor: Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
        """The tensors of all ranks, concatenated along `dim` in rank order.

        Args:
            tensor: `[..., n_r, ...]`.
            dim: The dimension of concatenation.
            sizes: `n_r` of each rank if they differ.

        Returns:
            `[..., sum(n_r), ...]`.
        """
        if self.size == 1:
            return tensor
        if self._is_staged(tensor):
            return cpu_memory.all_gather(self, tensor, dim, sizes)
        shape = list(tensor.shape)
        shape[dim] = max(sizes) if sizes is not None else shape[dim]
        # Both ranks must choose alike, so the larger part decides.
        if self._exchanges(tensor, math.prod(shape)):
            shape[dim] = sizes[1 - self.rank] if sizes is not None else shape[dim]
            local, remote = tensor.contiguous(), tensor.new_empty(shape)
            self._exchange(local, remote)
            return torch.cat([local, remote] if self.rank == 0 else [remote, local], dim)
        if sizes is None or len(set(sizes)) == 1:
            parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
            dist.all_gather(parts, tensor.contiguous(), group=self.group)
            return torch.cat(parts, dim)
        # gloo gathers equal sizes only: pad along a leading dim, then remove the padding.
        rows = tensor.movedim(dim, 0)
        padded = rows.new_empty((max(sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)]).movedim(0, dim)

    def start_all_gather(self, tensor: Tensor) -> tuple[Tensor, Work]:
        """Start to gather contiguous tensors `[n, ...]` along their first dim; the `[size * n, ...]` are there after `wait()`.

        Where nothing is gained by it (see `overlaps`), they are there at once.
        """
        if not self.overlaps(tensor):
            return self.all_gather(tensor, 0), _DONE
        rows = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        work = dist.all_gather_into_tensor(rows, tensor, group=self.group, async_op=True)
        assert work is not None
        return rows, work

    def overlaps(self, tensor: Tensor) -> bool:
        """Whether collectives of such tensors proceed while this rank computes."""
        return self.group is not None and self.size > 1 and not self._is_staged(tensor)

    @operators.traced_as(operators.reduce_scatter)
    @waits_in("a reduce-scatter")
    def reduce_scatter(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """Sum over the ranks and return this rank's part along `dim`.

        Args:
            tensor: `[..., n, ...]`, the same shape on every rank.
            dim: The dimension to distribute.
            sizes: Size of each rank's part (default: equal parts).

        Returns:
            `[..., sizes[rank], ...]`.
        """
        if self.size == 1:
            return tensor
        if self._is_staged(tensor):
            return cpu_memory.reduce_scatter(self, tensor, dim, sizes)
        sizes = sizes if sizes is not None else self.even_sizes(tensor.shape[dim])
        rows = tensor.movedim(dim, 0).contiguous()
        if len(set(sizes)) == 1:
            part = rows.new_empty((sizes[self.rank], *rows.shape[1:]))
            dist.reduce_scatter_tensor(part, rows, group=self.group)
        else:
            parts = list(rows.split(list(sizes)))
            part = torch.empty_like(parts[self.rank])
            dist.reduce_scatter(part, parts, group=self.group)
        return part.movedim(0, dim)

    @waits_in("an all-to-all")
    def all_to_all(self, tensor: Tensor, sizes: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send rows to every rank and receive rows from every rank.

        Args:
            tensor: `[sum(sizes), ...]`, the rows for each rank in rank order.
            sizes: Number of rows for each rank.
            received: Number of rows from each rank.

        Returns:
            `[sum(received), ...]`, in rank order.
        """
        if self.size == 1:
            return tensor
        if self._is_staged(tensor):
            return cpu_memory.all_to_all(self, tensor, sizes, received)
        found = exactly_empty((sum(received), *tensor.shape[1:]), tensor.dtype, tensor.device)
        into, own = _rows_of_bytes(found), _rows_of_bytes(tensor.detach().contiguous())
        dist.all_to_all_single(into, own, list(received), list(sizes), group=self.group)
        return found

    def gather_split(self, tensor: Tensor, dim: int, split: Split) -> Tensor:
        """The unsplit tensor of which each rank holds `split.ranges(rank)` of `dim`."""
        if self.size == 1:
            return tensor
        gathered = self.all_gather(tensor, dim, split.local_sizes)
        if split.is_in_order:
            return gathered
        unsplit = gathered.new_empty(
            (*gathered.shape[: dim % gathered.dim()], split.size, *gathered.shape[dim % gathered.dim() + 1 :])
        )
        offset = 0
        for ranges in split.by_rank:
            for start, stop in ranges:
                unsplit.narrow(dim, start, stop - start).copy_(gathered.narrow(dim, offset, stop - start))
                offset += stop - start
        return unsplit

    @waits_in("a broadcast")
    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Send the tensor of rank `source` of the group to every rank, in place."""
        if self._is_staged(tensor):
            return cpu_memory.broadcast_(self, tensor, source)
        if self.size > 1:
            with _memory_of(tensor) as memory:
                dist.broadcast(memory, group=self.group, group_src=source)
        return tensor

    @waits_in("a broadcast")
    def broadcast_object(self, value: object, source: int = 0) -> object:
        """Send a small Python object of rank `source` of the group to every rank (pickled: trusted ranks only)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=source)
        return box[0]

    @waits_in("an all-gather")
    def all_gather_object(self, value: object) -> list[object]:
        """Small Python objects of all ranks, in rank order (pickled: trusted ranks only)."""
        if self.size == 1:
            return [value]
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @waits_in("a send")
    def send(self, tensor: Tensor, to: int) -> None:
        """Send to rank `to` of the group; returns when `tensor` may be changed."""
        if self._is_staged(tensor):
            cpu_memory.send(self, tensor, to)
        else:
            dist.send(tensor.contiguous(), group=self.group, group_dst=to)

    @waits_in("a receive")
    def recv_(self, tensor: Tensor, source: int) -> Tensor:
        """Receive from rank `source` of the group into `tensor`."""
        if self._is_staged(tensor):
            return cpu_memory.recv_(self, tensor, source)
        with _memory_of(tensor) as memory:
            dist.recv(memory, group=self.group, group_src=source)
        return tensor

    def start_send(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        """Start sending a contiguous tensor to rank `to` of the group; it must not be changed before `wait()`.

        Messages with the same tag between two ranks arrive in the order they were started. NCCL has no tags.
        """
        if self._is_staged(tensor):
            return cpu_memory.start_send(self, tensor, to, tag)
        work = dist.isend(tensor, group=self.group, group_dst=to, tag=tag)
        assert work is not None
        return work

    def start_recv_(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        """Start receiving from rank `source` of the group into a contiguous tensor, which is complete after `wait()`."""
        if self._is_staged(tensor):
            return cpu_memory.start_recv_(self, tensor, source, tag)
        work = dist.irecv(tensor, group=self.group, group_src=source, tag=tag)
        assert work is not None
        return work

    @waits_in("a barrier")
    def barrier(self) -> None:
        """Block until every rank of the group reaches this call."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def even_sizes(self, size: int) -> tuple[int, ...]:
        """`size` in equal parts, one per rank; the number of ranks must divide it."""
        if size % self.size:
            raise DistributedError(f"{size} cannot be split evenly over {self.size} ranks. Pass `sizes`, one per rank.")
        return (size // self.size,) * self.size

    def __deepcopy__(self, memo: object) -> Communicator:
        """Return itself: a copy of a model communicates with the same ranks."""
        return self

    def __repr__(self) -> str:
        return f"Communicator(rank {self.rank} of {self.size}, global ranks {list(self.global_ranks)})"
