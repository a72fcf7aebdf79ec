"""Collectives of tensors that a group's backend cannot access, staged through CPU memory.

gloo sends and receives CPU tensors only, and few of its collectives take CUDA tensors. So ranks that share one GPU, where NCCL
allows one rank per GPU, copy each message to the CPU, exchange it there, and copy the result back. Each function corresponds to
the `Communicator` method of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from partita.torch.collectives.comm import Communicator, Work


def on_host(tensor: Tensor) -> Tensor:
    """A contiguous copy of `tensor` in CPU memory, of the same dtype."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _put_back(tensor: Tensor, host: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.copy_(host)


def all_reduce_(comm: Communicator, tensor: Tensor, op: torch.distributed.ReduceOp.RedOpType) -> Tensor:
    """Reduce over the ranks in place."""
    return _put_back(tensor, comm.all_reduce_(on_host(tensor), op))


def all_gather(comm: Communicator, tensor: Tensor, dim: int, sizes: Sequence[int] | None) -> Tensor:
    """The tensors of all ranks, concatenated along `dim`."""
    return comm.all_gather(on_host(tensor), dim, sizes).to(tensor.device)


def reduce_scatter(comm: Communicator, tensor: Tensor, dim: int, sizes: Sequence[int] | None) -> Tensor:
    """This rank's part of the sum along `dim`."""
    return comm.reduce_scatter(on_host(tensor), dim, sizes).to(tensor.device)


def all_to_all(comm: Communicator, tensor: Tensor, sizes: Sequence[int], received: Sequence[int]) -> Tensor:
    """The rows that all ranks send to this one."""
    return comm.all_to_all(on_host(tensor), sizes, received).to(tensor.device)


def broadcast_(comm: Communicator, tensor: Tensor, source: int) -> Tensor:
    """Send the tensor of rank `source` to every rank, in place."""
    host = comm.broadcast_(on_host(tensor), source)
    return tensor if comm.rank == source else _put_back(tensor, host)


def send(comm: Communicator, tensor: Tensor, to: int) -> None:
    """Send to rank `to`."""
    comm.send(on_host(tensor), to)


def recv_(comm: Communicator, tensor: Tensor, source: int) -> Tensor:
    """Receive from rank `source` into `tensor`."""
    return _put_back(tensor, comm.recv_(on_host(tensor), source))


class Transfer:
    """A transfer in progress, its CPU buffer, and for a receive the tensor that gets the result."""

    def __init__(self, work: Work, host: Tensor, into: Tensor | None) -> None:
        self.work, self.host, self.into = work, host, into

    def wait(self) -> None:
        """Block until the transfer is complete and the result is in its tensor."""
        self.work.wait()
        if self.into is not None:
            _put_back(self.into, self.host)
            self.into = None

    def is_completed(self) -> bool:
        """Whether `wait` would return immediately."""
        return bool(self.work.is_completed())  # type: ignore[attr-defined]


def start_send(comm: Communicator, tensor: Tensor, to: int, tag: int) -> Work:
    """Start sending to rank `to`; `tensor` may be changed immediately."""
    host = on_host(tensor)
    return Transfer(comm.start_send(host, to, tag), host, None)


def start_recv_(comm: Communicator, tensor: Tensor, source: int, tag: int) -> Work:
    """Start receiving from rank `source` into `tensor`, which holds the message after `wait()`."""
    host = on_host(tensor)
    return Transfer(comm.start_recv_(host, source, tag), host, tensor)
