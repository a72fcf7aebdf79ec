"""Communicator: the only object through which layers talk to other ranks."""

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
from partita.torch.collectives import cpu_memory


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when the result is there."""


class _Done:
    def wait(self) -> None:
        return None


_DONE = _Done()

EXCHANGE_BYTES = 1 << 20
"""Up to this size two CPU ranks do better to send each other what they have than to use gloo's collectives: in 112
microseconds against 310 for 4 KB, 689 against 949 for 1 MB (best tenths, one host, two cores)."""

_TAG = 0x50A7
"""Marks our exchanges, so that they never meet a send of somebody else."""


@contextmanager
def _memory_of(tensor: Tensor) -> Iterator[Tensor]:
    """`tensor`, or where it does not lie in one piece a copy of it whose values it takes over."""
    if tensor.is_contiguous():
        yield tensor
        return
    copy = tensor.detach().contiguous()
    yield copy
    with torch.no_grad():
        tensor.copy_(copy)


def exactly_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor of exactly `dtype`, to receive into, also while `Float64Everywhere` widens other tensors."""
    with torch._C.DisableTorchFunction():
        return torch.empty(tuple(shape), dtype=dtype, device=device)


class Communicator:
    """A group of ranks of torch.distributed (gloo, NCCL, MPI), or one rank alone.

    Every rank of the group calls the same methods in the same order with tensors of the same dtype. Shapes may differ only
    where a method takes `sizes`.

    Attributes:
        rank: Place of this process in the group.
        size: Ranks of the group.
        global_ranks: Their ranks in the whole run.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """The communicator of `group`, by default of all ranks."""
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
        backends = dict(part.split(":", 1) for part in dist.get_backend_config(self.group).split(","))
        self._is_pair = self.size == 2 and "gloo" in backends.values()
        # The kinds of devices whose tensors the group's backends exchange themselves.
        self._direct = frozenset(device for device, backend in backends.items() if backend != "gloo" or device == "cpu")

    @classmethod
    def single(cls) -> Communicator:
        """One rank alone: every collective returns at once."""
        alone = cls.__new__(cls)
        alone.group = None
        alone.rank, alone.size, alone.global_ranks = 0, 1, (0,)
        alone._is_pair = False
        alone._direct = frozenset()
        return alone

    def _is_staged(self, tensor: Tensor) -> bool:
        """Whether a tensor has to travel through CPU memory."""
        return self.size > 1 and not tensor.is_cpu and tensor.device.type not in self._direct

    @waits_in("an all-reduce")
    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over the ranks, in place."""
        if self.size == 1:
            return tensor
        if self._is_staged(tensor):
            return cpu_memory.all_reduce_(self, tensor, op)
        if op == dist.ReduceOp.SUM and self._exchanges(tensor, tensor.numel()):
            other = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            self._exchange(tensor.contiguous(), other)
            with torch.no_grad():
                # a + b is b + a to the last bit, so that both ranks have the same sum.
                return tensor.add_(other)
        with _memory_of(tensor) as memory:
            dist.all_reduce(memory, op=op, group=self.group)
        return tensor

    def _exchanges(self, tensor: Tensor, numel: int) -> bool:
        """Whether a tensor of at most `numel` elements is to go by send and receive between two ranks."""
        return self._is_pair and tensor.device.type == "cpu" and numel * tensor.itemsize <= EXCHANGE_BYTES

    def _exchange(self, mine: Tensor, theirs: Tensor) -> None:
        """Send the other of two ranks `mine` and receive what it sends; the sizes may differ."""
        assert self.group is not None
        other = 1 - self.rank
        received = self.group.recv([theirs], other, _TAG)
        sent = self.group.send([mine], other, _TAG)
        received.wait()
        sent.wait()

    def start_all_reduce_(self, tensor: Tensor) -> Work:
        """Begin to sum over the ranks in place; `tensor` holds the sum after `wait()`."""
        if self.size == 1:
            return _DONE
        if not tensor.is_contiguous() or self._is_staged(tensor):
            self.all_reduce_(tensor)
            return _DONE
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work  # type: ignore[no-any-return]

    @waits_in("an all-gather")
    def all_gather(self, tensor: Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
        """The tensors of all ranks one behind the other along `dim`.

        Args:
            tensor: `[..., n_r, ...]`.
            dim: The dimension along which they are put together.
            sizes: `n_r` of each rank where they differ.

        Returns:
            `[..., sum(n_r), ...]`.
        """
        if self.size == 1:
            return tensor
        if self._is_staged(tensor):
            return cpu_memory.all_gather(self, tensor, dim, sizes)
        shape = list(tensor.shape)
        shape[dim] = max(sizes) if sizes is not None else shape[dim]
        # Both ranks must choose alike, so the larger part of the two decides.
        if self._exchanges(tensor, math.prod(shape)):
            shape[dim] = sizes[1 - self.rank] if sizes is not None else shape[dim]
            mine, theirs = tensor.contiguous(), tensor.new_empty(shape)
            self._exchange(mine, theirs)
            return torch.cat([mine, theirs] if self.rank == 0 else [theirs, mine], dim)
        if sizes is None or len(set(sizes)) == 1:
            parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
            dist.all_gather(parts, tensor.contiguous(), group=self.group)
            return torch.cat(parts, dim)
        # gloo gathers equal sizes only: pad along a leading dim, then cut the padding off.
        rows = tensor.movedim(dim, 0)
        padded = rows.new_empty((max(sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)]).movedim(0, dim)

    @waits_in("a reduce-scatter")
    def reduce_scatter(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """The sum over the ranks, of which each gets its part along `dim`.

        Args:
            tensor: `[..., n, ...]`, the same shape on every rank.
            dim: The dimension that is dealt out.
            sizes: How much of it each rank gets; by default equal parts.

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
            mine = rows.new_empty((sizes[self.rank], *rows.shape[1:]))
            dist.reduce_scatter_tensor(mine, rows, group=self.group)
        else:
            parts = list(rows.split(list(sizes)))
            mine = torch.empty_like(parts[self.rank])
            dist.reduce_scatter(mine, parts, group=self.group)
        return mine.movedim(0, dim)

    def gather_split(self, tensor: Tensor, dim: int, split: Split) -> Tensor:
        """The unsplit tensor of which each rank holds `split.ranges(rank)` of `dim`."""
        if self.size == 1:
            return tensor
        gathered = self.all_gather(tensor, dim, split.local_sizes)
        if split.is_in_order:
            return gathered
        whole = gathered.new_empty(
            (*gathered.shape[: dim % gathered.dim()], split.size, *gathered.shape[dim % gathered.dim() + 1 :])
        )
        offset = 0
        for ranges in split.by_rank:
            for start, stop in ranges:
                whole.narrow(dim, start, stop - start).copy_(gathered.narrow(dim, offset, stop - start))
                offset += stop - start
        return whole

    @waits_in("a broadcast")
    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Give every rank the tensor of rank `source` of the group, in place."""
        if self._is_staged(tensor):
            return cpu_memory.broadcast_(self, tensor, source)
        if self.size > 1:
            with _memory_of(tensor) as memory:
                dist.broadcast(memory, group=self.group, group_src=source)
        return tensor

    @waits_in("a broadcast")
    def broadcast_object(self, value: object, source: int = 0) -> object:
        """Give every rank the Python object of rank `source` of the group. For small things between our own ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=source)
        return box[0]

    @waits_in("an all-gather")
    def all_gather_object(self, value: object) -> list[object]:
        """The Python objects of all ranks, in order. For small things between our own ranks."""
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
        """Begin to send a contiguous tensor to rank `to` of the group; it must not be changed before `wait()`.

        Messages of one tag between two ranks arrive in the order in which they were begun. NCCL has no tags.
        """
        if self._is_staged(tensor):
            return cpu_memory.start_send(self, tensor, to, tag)
        work = dist.isend(tensor, group=self.group, group_dst=to, tag=tag)
        assert work is not None
        return work

    def start_recv_(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        """Begin to receive from rank `source` of the group into a contiguous tensor, which is there after `wait()`."""
        if self._is_staged(tensor):
            return cpu_memory.start_recv_(self, tensor, source, tag)
        work = dist.irecv(tensor, group=self.group, group_src=source, tag=tag)
        assert work is not None
        return work

    @waits_in("a barrier")
    def barrier(self) -> None:
        """Return when every rank of the group has come here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def even_sizes(self, size: int) -> tuple[int, ...]:
        """`size` dealt over the ranks, which must divide it."""
        if size % self.size:
            raise DistributedError(f"{size} cannot be dealt evenly to {self.size} ranks. Pass `sizes`, one a rank.")
        return (size // self.size,) * self.size

    def __deepcopy__(self, memo: object) -> Communicator:
        """A copy of a model talks to the same ranks."""
        return self

    def __repr__(self) -> str:
        return f"Communicator(rank {self.rank} of {self.size}, global ranks {list(self.global_ranks)})"
