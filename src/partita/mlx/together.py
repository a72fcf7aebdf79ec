"""What goes wrong on one rank goes wrong on all, so that none is left waiting in the next collective."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from partita.errors import DistributedError
from partita.mlx.comm import Communicator
from partita.mlx.groups import ParallelGroups


class _Together(AbstractContextManager[None]):
    def __init__(self, axes: list[Communicator]) -> None:
        self.axes = axes

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        said = None if error is None else f"{type(error).__name__}: {error}"
        # Along one axis after the other, which in the end is to everybody.
        for comm in self.axes:
            reports = comm.all_gather_object(said)
            said = next((report for report in reports if report is not None), None)
        if error is None and said is not None:
            raise DistributedError(f"another rank failed: {said}")


def together(groups: ParallelGroups) -> AbstractContextManager[None]:
    """A block at whose end every rank hears whether it went well everywhere; it holds no collective of its own.

    A rank that raised raises its own error; the others raise `DistributedError` with that of one that failed.
    """
    axes = [comm for comm in (groups.tp, groups.pp, groups.dp) if comm.size > 1]
    return _Together(axes) if axes else nullcontext()
