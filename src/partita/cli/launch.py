"""Launch: a job is done by this process, if it is a rank already or needs no others, or else by ranks that are started here."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer

from partita.cli.job import Job, from_json, to_json
from partita.cli.terminal.console import err, plural
from partita.cli.terminal.failure import show
from partita.cli.terminal.messages import adopt_all
from partita.core.mesh import AXES, Mesh
from partita.engine import open_engine
from partita.errors import DistributedError
from partita.ranks import environment, launcher, liveness
from partita.ranks.backends import local_mlx_backend, local_torch_backend
from partita.ranks.environment import EngineName
from partita.ranks.failure import Failure
from partita.ranks.launcher import Outcome

JOB = "PARTITA_JOB"
"""The file with the job of a rank that `run` started."""


def run(job: Job) -> NoReturn:
    """Do `job` on every rank of its mesh, and end the process with the code that it returns.

    A job of one rank is done here. Ranks for more are started, unless this process is one of them already.

    Raises:
        DistributedError: A launcher started another number of ranks than the mesh has, or the backend cannot make the mesh.
    """
    request, world = job.request, environment.world()
    mesh = request.mesh
    if world is None and mesh.size > 1:
        raise typer.Exit(_start(job))
    if world is not None and world != mesh.size:
        raise DistributedError(
            f"the mesh {mesh} has {plural(mesh.size, 'rank')}, but the launcher started {world}. Start {mesh.size}, "
            f"or change --tp and --dp so that their product is {world}."
        )
    raise typer.Exit(work_together(job.work, request.engine, job.backend))


def _start(job: Job) -> int:
    mesh, engine = job.request.mesh, job.request.engine
    backend = local_mlx_backend(mesh, job.backend) if engine == "mlx" else local_torch_backend(job.backend)
    debug = "--debug" in sys.argv
    with tempfile.TemporaryDirectory(prefix="partita-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(to_json(job, debug=debug), encoding="utf-8")
        outcome = start(
            sys.argv[1:], mesh.size, backend=backend, instead=_instead(mesh, engine, job.backend), settings={JOB: str(file)}
        )  # fmt: skip
    return show_outcome(outcome, debug=debug)


def read_job(file: str, kinds: dict[str, type[Job]]) -> tuple[Job, bool]:
    """The job that `run` wrote for its ranks, and whether errors are shown with tracebacks."""
    return from_json(Path(file).read_text(encoding="utf-8"), kinds)


def start(
    arguments: Sequence[str],
    ranks: int,
    **options: Any,
) -> Outcome:
    """Run `partita *arguments` as that many ranks of this machine; as `launcher.start`, whose `options` it takes."""
    outcome = launcher.start(arguments, ranks, tell=lambda line: err().print(line, style="dim"), **options)
    _show_cursor()
    return outcome


def show_outcome(outcome: Outcome, *, debug: bool = False) -> int:
    """Show why a run failed, if it did. Returns what to exit with."""
    failure = outcome.failure
    if failure is None:
        return outcome.code
    if failure.code == Failure.INTERRUPTED:
        show(failure)
    elif failure.code == Failure.MISUSED:
        show(failure, debug=debug, detail=outcome.stderr if debug else "")
    else:
        who = "" if outcome.rank is None else f"rank {outcome.rank}"
        show(failure, debug=debug or outcome.rank is None, who=who, detail=outcome.stderr)
    return outcome.code


def work_together(work: Callable[[], int], name: EngineName = "torch", backend: str | None = None) -> int:
    """Meet the other ranks and do `work`. Its result, the exit code of the run, is returned on the first rank, and 0 on others.

    A non-zero code of another rank would look like that rank's own failure.

    Args:
        work: What each rank does.
        name: The engine that does it.
        backend: Of MLX; by default what the launcher has prepared.

    Raises:
        DistributedError: The launcher is one that MLX does not know.
    """
    adopt_all()
    engine = open_engine(name)
    joined = engine.join(backend)
    if joined != (environment.world() or 1):
        raise DistributedError(
            f"the launcher started {environment.world()} ranks, but MLX knows of {joined}. Start them with mpirun or "
            "mlx.launch, or let `partita` do it."
        )
    with liveness.doing("working"):
        code = work()
    sys.stdout.flush()
    engine.leave()
    return code if environment.is_first() else 0


def _instead(mesh: Mesh, engine: EngineName, wanted: str | None) -> str | None:
    """What takes the place of Open MPI where it cannot be had, unless it was asked for."""
    if wanted or os.environ.get("PARTITA_BACKEND"):
        return None
    if engine == "torch":
        return "gloo"
    return "ring" if sum(mesh.axis_size(axis) > 1 for axis in AXES) == 1 else None


def _show_cursor() -> None:
    """Show the cursor again: a rank that was ended in the middle of its progress bar has left it hidden."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")
        sys.stderr.flush()
