"""Causal attention over the keys of all ranks, of which each rank keeps its own only: keys and values travel in a ring.

Forward: in step s a rank has the keys and values of rank r - s, computes what its rows attend of them, and meanwhile passes
them on to rank r + 1. The parts are merged by their log-sum-exps. Backward: the same, with the gradients of the keys and
values one step behind them. (Ring attention: Liu et al. 2023, 2310.01889.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from partita.core.sharding.context import Block, Chunks, blocks_of
from partita.ranks.liveness import ME
from partita.torch.collectives.comm import Communicator, Work, exactly_empty
from partita.torch.layers.block_attention import TILE, Kernel, kernel_of, visible_pairs, wide

_KEYS, _GRADIENTS = 0x51A0, 0x51A1
"""Tags of our messages."""


@dataclass(frozen=True)
class Ring:
    """The sequences of an attention.

    Attributes:
        comm: The context parallel ranks.
        chunks: The chunks of every rank.
        window: How many keys a row sees at most, its own included (default: all before it).
        scale: By which the products of queries and keys are multiplied.
    """

    comm: Communicator
    chunks: tuple[Chunks, ...]
    window: int | None
    scale: float

    def rows_of(self, rank: int) -> int:
        """How many positions a rank has."""
        return sum(stop - start for start, stop in self.chunks[rank])

    def owner(self, step: int) -> int:
        """The rank whose keys this one has in a step."""
        return (self.comm.rank - step) % self.comm.size

    def blocks(self, step: int, kernel: Kernel) -> list[Block]:
        """What this rank computes in a step."""
        tile = kernel.tile if self.window is None else TILE
        return blocks_of(self.chunks[self.comm.rank], self.chunks[self.owner(step)], self.window, tile)

    def visible(self, block: Block, device: torch.device) -> Tensor | None:
        """The visible pairs of a block that needs a mask."""
        if block.kind != "window" or self.window is None:
            return None
        rows, keys = (stop - start for start, stop in (block.rows, block.keys))
        return visible_pairs(rows, keys, block.shift, self.window, device)


def ring_attention(query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
    """The attention of this rank's rows to the keys of all ranks.

    Args:
        query: `[n, heads, own rows, width]`.
        key: `[n, kv heads, own rows, width]`.
        value: `[n, kv heads, own rows, value width]`.
        ring: What the ranks have.

    Returns:
        `[n, own rows, heads, value width]`.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (one.to(torch.get_autocast_dtype(device)) for one in (query, key, value))
    with torch.autocast(device, enabled=False):
        output: Tensor = _Ring.apply(query, key, value, ring)
    return output


class _Ring(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
        kernel, merged = kernel_of(query, key, value), _Merged(query, value.shape[-1])
        for step, keys, values in _travelling(ring, key, value):
            for block in ring.blocks(step, kernel):
                rows, columns = slice(*block.rows), slice(*block.keys)
                parts = query[:, :, rows], keys[:, :, columns], values[:, :, columns]
                visible = ring.visible(block, query.device)
                merged.add(rows, *kernel.forward(*parts, block.kind == "causal", visible, ring.scale))
        output = merged.output.transpose(1, 2).to(query.dtype).contiguous()
        ctx.save_for_backward(query, key, value, output, merged.lse)
        ctx.ring = ring
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        with torch.autocast(query.device.type, enabled=False):
            return *_gradients(ring, grad.transpose(1, 2), query, key, value, output.transpose(1, 2), lse), None


class _Merged:
    """The attention of rows to the keys added so far: the output in a wide dtype, and its log-sum-exp."""

    def __init__(self, query: Tensor, width: int) -> None:
        dtype = wide(query.dtype)
        self.output = query.new_zeros((*query.shape[:-1], width), dtype=dtype)
        self.lse = query.new_full(query.shape[:-1], -torch.inf, dtype=dtype)

    def add(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        """Add what `rows` attend of further keys."""
        # In tiles, since a product in the wide dtype takes twice the memory of a narrow output.
        tiles = (one.split(TILE, 2) for one in (self.output[:, :, rows], self.lse[:, :, rows], output, lse))
        for merged, before, part, sums in zip(*tiles, strict=True):
            both = torch.logaddexp(before, sums)
            merged.mul_((before - both).exp_()[..., None]).add_(part * (sums - both).exp_()[..., None])
            before.copy_(both)


def _gradients(
    ring: Ring, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kernel, dtype = kernel_of(query, key, value), wide(query.dtype)
    query_grad = query.new_zeros(query.shape, dtype=dtype)
    travelling: _Exchange | None = None
    for step, keys, values in _travelling(ring, key, value):
        ours = _Pair.zeros(keys, values, dtype)
        for block in ring.blocks(step, kernel):
            rows, columns = slice(*block.rows), slice(*block.keys)
            parts = grad[:, :, rows], query[:, :, rows], keys[:, :, columns], values[:, :, columns]
            whole = output[:, :, rows], lse[:, :, rows]
            visible = ring.visible(block, query.device)
            found = kernel.backward(*parts, *whole, block.kind == "causal", visible, ring.scale)
            query_grad[:, :, rows] += found[0]
            ours.key[:, :, columns] += found[1]
            ours.value[:, :, columns] += found[2]
        if travelling is not None:
            ours.memory.add_(travelling.wait())
        # These go to the rank that has the same keys next, after the last step to their owner.
        received = _Pair.empty(ring, ring.owner(step + 1), key, value, dtype)
        travelling = _Exchange(ring.comm, ours.memory, received.memory, _GRADIENTS)
    assert travelling is not None
    travelling.wait()
    return query_grad.to(query.dtype), received.key.to(key.dtype), received.value.to(value.dtype)


@dataclass(frozen=True)
class _Pair:
    """A key and a value, or their gradients, in one memory, which is sent at once."""

    memory: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def empty(cls, ring: Ring, rank: int, key: Tensor, value: Tensor, dtype: torch.dtype) -> _Pair:
        """Those of `rank`, whose positions may be more or fewer than this rank's `key` and `value` have."""
        shapes = [(*one.shape[:2], ring.rows_of(rank), one.shape[3]) for one in (key, value)]
        return cls._of(shapes, dtype, key.device)

    @classmethod
    def zeros(cls, key: Tensor, value: Tensor, dtype: torch.dtype) -> _Pair:
        """Zeros in the shapes of `key` and `value`."""
        pair = cls._of([tuple(key.shape), tuple(value.shape)], dtype, key.device)
        pair.memory.zero_()
        return pair

    @classmethod
    def _of(cls, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> _Pair:
        counts = [torch.Size(shape).numel() for shape in shapes]
        memory = exactly_empty((sum(counts),), dtype, device)
        key, value = (part.view(shape) for part, shape in zip(memory.split(counts), shapes, strict=True))
        return cls(memory, key, value)


class _Exchange:
    """A tensor on its way to the next rank, and another on its way from the one before."""

    def __init__(self, comm: Communicator, sent: Tensor, received: Tensor, tag: int) -> None:
        to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        self.sent, self.received = sent, received
        # NCCL runs them in this order, so of two neighbours one must receive first.
        works: list[Work] = []
        for sends in (True, False) if comm.rank % 2 == 0 else (False, True):
            works.append(comm.start_send(sent, to, tag) if sends else comm.start_recv_(received, source, tag))
        self.works = works

    def wait(self) -> Tensor:
        """The tensor received."""
        with ME.over("an exchange of keys"):
            for work in self.works:
                work.wait()
        return self.received


def _travelling(ring: Ring, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The keys and values that this rank has in each step; the next ones arrive while these are used."""
    held = _Pair.empty(ring, ring.comm.rank, key, value, key.dtype)
    held.key.copy_(key)
    held.value.copy_(value)
    for step in range(ring.comm.size):
        if step == ring.comm.size - 1:
            yield step, held.key, held.value
            return
        following = _Pair.empty(ring, ring.owner(step + 1), key, value, key.dtype)
        exchange = _Exchange(ring.comm, held.memory, following.memory, _KEYS)
        yield step, held.key, held.value
        exchange.wait()
        held = following
