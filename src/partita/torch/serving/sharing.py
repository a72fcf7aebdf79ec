"""Bytes that one rank decides, on every rank of its replica."""

from __future__ import annotations

import torch
from torch import Tensor

from partita.torch.collectives.groups import ParallelGroups

MESSAGE_BYTES = 4096
"""The size of a step's broadcast; a longer message is followed by a second one."""


def shared(groups: ParallelGroups, data: bytes | None) -> bytes:
    """The bytes of the first rank of the replica, on each of its ranks: along each axis in turn they reach all."""
    axes = groups.axes_of_replica
    if not axes:
        return data or b""
    first = _words(data or b"", MESSAGE_BYTES)
    for comm in axes:
        comm.broadcast_(first)
    size = int(first[0])
    if size > MESSAGE_BYTES - 8:
        first = _words(data or b"", 8 + size)
        for comm in axes:
            comm.broadcast_(first)
    return first[1:].numpy().tobytes()[:size]


def _words(data: bytes, size: int) -> Tensor:
    """`data` as int64 words after its length, with room for `size` bytes in all."""
    room = -(-max(size, 8) // 8)
    words = torch.zeros(room, dtype=torch.int64)
    words[0] = len(data)
    part = data[: 8 * (room - 1)]
    words[1:].numpy().view("u1")[: len(part)] = memoryview(part)
    return words
