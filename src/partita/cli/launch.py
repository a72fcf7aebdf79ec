"""Run a job in this process if it is a rank or the job needs only one, else in ranks that this process starts."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer

from partita.cli.job import Job, from_json, to_json
from partita.cli.terminal.console import OutputClosed, err, plural, write
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
"""Environment variable with the job file of a rank that `run` started."""


def run(job: Job) -> NoReturn:
    """Run `job` on every rank of its mesh, and exit with the code that it returns.

    A job of one rank usually runs in this process. For a larger mesh ranks are started, unless this process is one of them.

    Raises:
        DistributedError: A launcher started a number of ranks other than the mesh's, or the backend does not support the mesh.
    """
    request, world = job.request, environment.world()
    mesh = request.mesh
    if world is None and job.has_launcher:
        raise typer.Exit(start_job(job))
    if world is not None and world != mesh.size:
        raise DistributedError(
            f"the mesh {mesh} has {plural(mesh.size, 'rank')}, but {environment.launcher()} started {world}. "
            f"Start {mesh.size}, or change --tp and --dp so that their product is {world}."
        )
    raise typer.Exit(work_together(job.work, request.engine, job.backend))


def start_job(job: Job) -> int:
    """Run `job` on ranks of this machine that this process starts. Returns the exit code."""
    mesh, engine = job.request.mesh, job.request.engine
    if mesh.size == 1:
        backend = "gloo"  # whose variables tell either engine that it is alone
    else:
        backend = local_mlx_backend(mesh, job.backend) if engine == "mlx" else local_torch_backend(job.backend)
    debug = "--debug" in sys.argv
    with tempfile.TemporaryDirectory(prefix="partita-") as folder, job.beside() as beside:
        file = Path(folder) / "job.json"
        file.write_text(to_json(job, debug=debug), encoding="utf-8")
        outcome = start(
            sys.argv[1:], mesh.size, backend=backend, instead=_instead(mesh, engine, job.backend), beside=beside,
            settings={JOB: str(file)},
        )  # fmt: skip
        if _marker_of(file).exists():  # rank 0 was ended before it could end its line
            _end_line()
    return show_outcome(outcome, debug=debug)


_marker: Path | None = None
"""In a rank that `run` started, the file that exists while stdout ends inside a line."""


def _marker_of(job: Path) -> Path:
    return job.with_name("open_line")


@contextlib.contextmanager
def open_line() -> Iterator[None]:
    """A context in which text is streamed to stdout. At its end, whatever ends it, the line is ended too."""
    if _marker is not None:
        _marker.touch()
    try:
        yield
    finally:
        _end_line()
        if _marker is not None:
            _marker.unlink(missing_ok=True)


def _end_line() -> None:
    with contextlib.suppress(OutputClosed):
        write("\n")


def read_job(file: str, kinds: dict[str, type[Job]]) -> tuple[Job, bool]:
    """Read the job that `run` wrote for its ranks, and whether errors are printed with tracebacks."""
    global _marker
    _marker = _marker_of(Path(file))
    return from_json(Path(file).read_text(encoding="utf-8"), kinds)


def start(
    arguments: Sequence[str],
    ranks: int,
    **options: Any,
) -> Outcome:
    """Run `partita *arguments` on that many ranks of this machine; `options` are those of `launcher.start`."""
    outcome = launcher.start(arguments, ranks, tell=lambda line: err().print(line, style="dim"), **options)
    _show_cursor()
    return outcome


def show_outcome(outcome: Outcome, *, debug: bool = False) -> int:
    """Print why a run failed, if it did. Returns the exit code."""
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
    """Connect to the other ranks and call `work`. The first rank returns its result, the exit code of the run; others return 0.

    A non-zero code of another rank would look like that rank's own failure.

    Args:
        work: The function that each rank calls.
        name: The engine to run on.
        backend: Backend of MLX; by default the one that the launcher has prepared.

    Raises:
        DistributedError: MLX does not support the launcher.
    """
    adopt_all()
    engine = open_engine(name)
    joined = engine.join(backend)
    if joined != (environment.world() or 1):
        library = {"mlx": "MLX"}.get(name, name)
        launchers = "mpirun or mlx.launch" if name == "mlx" else "torchrun, mpirun or srun"
        raise DistributedError(
            f"{environment.launcher()} started {environment.world()} ranks, but {library} knows of {joined}. "
            f"Start them with {launchers}, or let `partita` do it."
        )
    with liveness.doing("working"):
        code = work()
    sys.stdout.flush()
    engine.leave()
    return code if environment.is_first() else 0


def _instead(mesh: Mesh, engine: EngineName, wanted: str | None) -> str | None:
    """The backend to use if Open MPI is not available, unless it was requested."""
    if wanted or os.environ.get("PARTITA_BACKEND"):
        return None
    if engine == "torch":
        return "gloo"
    return "ring" if sum(mesh.axis_size(axis) > 1 for axis in AXES) == 1 else None


def _show_cursor() -> None:
    """Show the cursor again, which a rank that was ended during its progress bar has left hidden."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")
        sys.stderr.flush()
