"""Jobs of tests: any function as what each rank of a command does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from partita.cli.job import Job
from partita.core.mesh import Mesh
from partita.core.request import PlanRequest


@dataclass(kw_only=True)
class Call(Job):
    """Calls a function on every rank."""

    call: Callable[[], int]

    def work(self) -> int:
        return self.call()


def job(
    mesh: Mesh, call: Callable[[], int], engine: Literal["torch", "mlx"] = "torch", backend: str | None = None
) -> Call:
    return Call(request=PlanRequest("", mesh, engine=engine), backend=backend, call=call)
