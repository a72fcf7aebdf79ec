"""Raise one rank's error on every rank, so that no rank is left waiting in the next collective."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.groups import ParallelGroups
from partita.ranks.agreement import failure_record, raise_failure_of_peer


class _CollectiveErrors(AbstractContextManager[None]):
    def __init__(self, axes: list[Communicator], rank: int) -> None:
        self.axes, self.rank = axes, rank

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        record = failure_record(self.rank, error)
        # Gather along one axis after the other, which reaches every rank.
        for comm in self.axes:
            records = comm.all_gather_object(record)
            record = next((one for one in records if one is not None), None)
        if error is None:
            raise_failure_of_peer([record])


def collective_errors(groups: ParallelGroups) -> AbstractContextManager[None]:
    """A context at whose end every rank learns whether any rank failed in it. The block itself must not contain collectives.

    A rank that raised raises its own error; the others raise `PeerFailed` with the error of a failed rank.
    """
    return _CollectiveErrors(groups.axes, groups.rank) if groups.axes else nullcontext()
