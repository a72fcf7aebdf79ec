"""Raise one rank's error on every rank, so that no rank is left waiting in the next collective."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from partita.ranks.agreement import failure_record, raise_failure_of_peer
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import ParallelGroups


class _CollectiveErrors(AbstractContextManager[None]):
    def __init__(self, gather: Callable[[object], list[Any]], rank: int) -> None:
        self.gather, self.rank = gather, rank

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        records = self.gather(failure_record(self.rank, error))
        if error is None:
            raise_failure_of_peer(records)


def collective_errors(groups: ParallelGroups) -> AbstractContextManager[None]:
    """A context at whose end every rank learns whether any rank failed in it. The block itself must not contain collectives.

    A rank that raised raises its own error; the others raise `PeerFailed` with the error of the first failing rank.
    """
    return (
        _CollectiveErrors(_gather_from_world, torch.distributed.get_rank()) if groups.mesh.size > 1 else nullcontext()
    )


def collective_errors_in(comm: Communicator) -> AbstractContextManager[None]:
    """Like `collective_errors`, among the ranks of `comm` only."""
    return _CollectiveErrors(comm.all_gather_object, comm.global_ranks[comm.rank])


def gather_from_all(groups: ParallelGroups, value: Any) -> list[Any]:
    """The value of every rank of the mesh, in rank order. Every rank must call it."""
    return _gather_from_world(value) if groups.mesh.size > 1 else [value]


def value_of_first(groups: ParallelGroups, value: Any) -> Any:
    """The value of rank 0 of the mesh, on every rank. Every rank must call it."""
    for comm in groups.axes:
        value = comm.broadcast_object(value)
    return value


def _gather_from_world(report: object) -> list[Any]:
    reports: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, report)
    return reports
