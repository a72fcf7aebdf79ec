"""Each replica's part of every parameter: an equal range of its elements, in the order of its memory.

        parameter           [..., n_r, ...] of this rank, the same on each of N replicas
        shard               its elements [i * c, (i + 1) * c) on replica i, c = ceil(elements / N); the last ones have fewer
        gradients           summed in float32 or wider, and scattered to their owners: one reduce-scatter for many parameters
        parameters          one all-gather for many shards

A range of elements, not of rows, so that a parameter of any shape is distributed evenly. Source: Rajbhandari et al. 2020,
1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from partita.torch.collectives.comm import Communicator
from partita.torch.training.norms import Places
from partita.torch.training.replicas import BUCKET_BYTES


@dataclass(eq=False)
class Slot:
    """A parameter, and this replica's shard of it.

    Attributes:
        name: The parameter's name.
        parameter: The parameter.
        numel: Number of its elements.
        order: Its dims, the outermost in memory first.
        shape: Its sizes in that order.
        chunk: Number of elements of a full shard.
        start: The first element of this replica's shard.
        comm: The ranks that hold the parameter.
        shard: The elements from `start`, flat; a view of the parameter until `detach`.
        full: After `detach`, the parameter's memory, which is empty unless the parameter is gathered.
    """

    name: str
    parameter: nn.Parameter
    numel: int
    order: tuple[int, ...]
    shape: tuple[int, ...]
    chunk: int
    start: int
    comm: Communicator
    shard: nn.Parameter
    full: Tensor | None = None

    @classmethod
    def of(cls, name: str, parameter: nn.Parameter, comm: Communicator) -> Slot:
        """This replica's shard of a parameter, whose memory becomes contiguous in some order of its dims if it is not."""
        order = tuple(sorted(range(parameter.dim()), key=lambda dim: parameter.stride()[dim], reverse=True))
        if not parameter.data.permute(order).is_contiguous():
            parameter.data, order = parameter.data.contiguous(), tuple(range(parameter.dim()))
        numel = parameter.numel()
        chunk = -(-numel // comm.size)
        start = min(comm.rank * chunk, numel)
        flat = parameter.data.permute(order).view(-1)
        shard = nn.Parameter(flat[start : start + chunk], parameter.requires_grad)
        shape = tuple(parameter.shape[dim] for dim in order)
        return cls(name, parameter, numel, order, shape, chunk, start, comm, shard)

    def flat(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of the parameter's shape, in the order of the shards."""
        return tensor.permute(self.order).reshape(-1)

    def shaped(self, flat: Tensor) -> Tensor:
        """The reverse of `flat`."""
        return flat.view(self.shape).permute(tuple(self.order.index(dim) for dim in range(len(self.order))))

    def own(self, tensor: Tensor) -> Tensor:
        """This replica's elements of a tensor of the parameter's shape."""
        return self.flat(tensor)[self.start : self.start + self.chunk]

    def owned(self, places: Places, values: Tensor) -> Tensor:
        """Of `values`, one for each element of the shard, those of the elements in `places` (see `norms.owned_parts`)."""
        if places is None:
            return values
        held = torch.zeros(self.shaped_like(), dtype=torch.bool, device=values.device)
        for place in places:
            held.narrow(*place).fill_(True)
        return values[self.own(held)]

    def shaped_like(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.shape[self.order.index(dim)] for dim in range(len(self.order)))

    def detach(self, *, is_only: bool = False) -> None:
        """Give the shard its own memory, and release the parameter's; the parameter is the flat shard until `open`.

        Args:
            is_only: Whether nothing else refers to the parameter's memory.
        """
        self.shard.data = self.shard.data.clone()
        self.full = self.parameter.data if is_only else torch.empty_like(self.parameter.data)
        self.full.untyped_storage().resize_(0)
        self.close()

    def open(self) -> None:
        """Give the parameter its shape, without memory."""
        assert self.full is not None
        self.parameter.data = self.full

    def close(self) -> None:
        """Release the parameter's memory, and make the parameter the flat shard, whose elements can be read."""
        self.release()
        self.parameter.data = self.shard.data

    def attach(self) -> None:
        """Make the shard a view of the gathered parameter again."""
        self.full = None
        self.shard.data = self.own(self.parameter.data)

    def allocate(self) -> Tensor:
        """Give the parameter memory for all its elements, which the caller fills."""
        assert self.full is not None
        self.full.untyped_storage().resize_(self.numel * self.full.itemsize)
        return self.full

    def release(self) -> None:
        """Release the parameter's memory; tensors that autograd saved keep referring to it, and are filled by `gather`."""
        if self.full is not None:
            self.full.untyped_storage().resize_(0)


@torch.no_grad()
def scatter_gradients(slots: Sequence[Slot]) -> list[tuple[Slot, Tensor]]:
    """Sum the gradients of `slots` over the replicas, add each replica's part to those of its shards, and free the rest.

    A gradient that a replica lacks counts as zero. Every replica must call it with the same slots.

    Returns:
        For each slot the number of replicas that had a gradient, a scalar on the device.
    """
    found: list[tuple[Slot, Tensor]] = []
    for bucket in _buckets(slots):
        dtype, comm = bucket[0].parameter.dtype, bucket[0].comm
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        total = sum(slot.chunk for slot in bucket)
        device = bucket[0].parameter.device
        rows = torch.zeros((comm.size, total + len(bucket)), dtype=wide, device=device)
        for (slot, offset), place in zip(_offsets(bucket), range(total, total + len(bucket)), strict=True):
            grad = slot.parameter.grad
            if grad is not None:
                _fill_rows(rows[:, offset : offset + slot.chunk], slot.flat(grad))
                rows[:, place] = 1
                slot.parameter.grad = grad = None
        part = comm.reduce_scatter(rows.view(-1))
        for (slot, offset), place in zip(_offsets(bucket), range(total, total + len(bucket)), strict=True):
            mine = part[offset : offset + slot.shard.numel()].to(dtype, copy=True)
            slot.shard.grad = mine if slot.shard.grad is None else slot.shard.grad.add_(mine)
            found.append((slot, part[place].clone()))
    return found


Target = Callable[[Slot], Tensor]
"""Returns the tensor of a parameter's shape that is filled from its shards."""


@torch.no_grad()
def start_gathering(slots: Sequence[Slot]) -> Callable[[Target], None]:
    """Start to gather the shards of all replicas; every replica calls it with the same slots.

    Returns:
        A function that waits for them and copies them into the tensors that it is given.
    """
    started = []
    for bucket in _buckets(slots):
        total = sum(slot.chunk for slot in bucket)
        mine = torch.zeros((1, total), dtype=bucket[0].parameter.dtype, device=bucket[0].parameter.device)
        for slot, offset in _offsets(bucket):
            mine[0, offset : offset + slot.shard.numel()] = slot.shard.data
        started.append((bucket, *bucket[0].comm.start_all_gather(mine)))

    @torch.no_grad()
    def finish(target: Target) -> None:
        for bucket, rows, work in started:
            work.wait()
            for slot, offset in _offsets(bucket):
                target(slot).copy_(slot.shaped(rows[:, offset : offset + slot.chunk].reshape(-1)[: slot.numel]))
        started.clear()

    return finish


def gather_shards(slots: Sequence[Slot], target: Target) -> None:
    """Copy the shards of all replicas into tensors of the parameters' shapes; every replica calls it with the same slots."""
    for bucket in _buckets(slots):
        start_gathering(bucket)(target)


@torch.no_grad()
def unsharded(slot: Slot, part: Tensor) -> Tensor:
    """The tensor of the parameter's shape of which each replica has its shard `part`; every replica calls it."""
    mine = part.new_zeros((1, slot.chunk))
    mine[0, : part.numel()] = part
    return slot.shaped(slot.comm.all_gather(mine, 0).reshape(-1)[: slot.numel])


def _fill_rows(rows: Tensor, flat: Tensor) -> None:
    """Copy `flat` into `rows` `[N, c]`, one row after the other."""
    chunk = rows.shape[1]
    count = flat.numel() // chunk if chunk else 0
    rows[:count] = flat[: count * chunk].view(count, chunk)
    if count * chunk < flat.numel():
        rows[count, : flat.numel() - count * chunk] = flat[count * chunk :]


def _offsets(slots: Iterable[Slot]) -> Iterator[tuple[Slot, int]]:
    """The slots of a bucket with the offset of each in a replica's row."""
    offset = 0
    for slot in slots:
        yield slot, offset
        offset += slot.chunk


def _buckets(slots: Iterable[Slot]) -> Iterator[list[Slot]]:
    """The slots of one dtype on the same ranks in groups of about `BUCKET_BYTES`."""
    alike: dict[tuple[int, torch.dtype], list[Slot]] = {}
    for slot in slots:
        alike.setdefault((id(slot.comm), slot.parameter.dtype), []).append(slot)
    for same in alike.values():
        bucket: list[Slot] = []
        size = 0
        for slot in same:
            bucket.append(slot)
            size += slot.numel * slot.parameter.itemsize
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
