"""Small programs for the launcher: `python -m tests.mlx.programs` is one rank of a run of MLX, however it was started."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import typer

from partita.cli import launch
from partita.cli.terminal.failure import fail
from partita.core.mesh import Mesh
from partita.errors import ModelError
from partita.ranks import environment, rank_process
from tests.support.jobs import job


def note_pids(*pids: int) -> None:
    with (Path(os.environ["PIDS"]) / f"rank{environment.number()}").open("w") as file:
        file.write(" ".join(map(str, pids)))


def sums() -> None:
    """Every rank adds its number, through `launch.run` as a command does; the first says what came out."""

    def work() -> int:
        import mlx.core as mx

        from partita.mlx.collectives.groups import init

        everyone = init()
        total = everyone.all_sum(mx.array([everyone.rank + 1]))
        if environment.is_first():
            print(everyone.backend, everyone.size, total.item(), flush=True)
        return 3 if environment.is_first() else 4

    launch.run(job(Mesh(tp=int(sys.argv[2])), work, "mlx"))


def splits() -> None:
    """A mesh of two axes, whose split groups are still there when the ranks end."""

    def work() -> int:
        import mlx.core as mx

        from partita.mlx.collectives.groups import make_groups

        groups = make_groups(Mesh(pp=2, tp=2))
        sums = [int(comm.all_sum(mx.array([groups.rank])).item()) for comm in (groups.tp, groups.pp)]
        left = groups.tp.all_sum(mx.ones(3))
        sys.modules["left"] = (groups, left)  # type: ignore[assignment]
        if environment.is_first():
            print(*sums, flush=True)
        return 0

    launch.run(job(Mesh(pp=2, tp=2), work, "mlx"))


def one_fails_while_others_wait() -> None:
    from partita.mlx.collectives.groups import init

    everyone = init()
    everyone.barrier()
    if everyone.rank == 1:
        raise ValueError("this rank has had enough")
    everyone.barrier()


def one_is_killed_while_others_wait() -> None:
    from partita.mlx.collectives.groups import init

    everyone = init()  # all ranks have met; a heartbeat after this would report another activity
    if everyone.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    everyone.barrier()


def all_refuse() -> None:
    from partita.mlx.collectives.groups import init

    init().barrier()
    raise ModelError("the model is not [one]")


def wait_in_a_collective() -> None:
    from partita.mlx.collectives.groups import init

    everyone = init()
    everyone.barrier()
    note_pids(os.getpid())
    if everyone.rank == 0:
        time.sleep(300)
    everyone.barrier()


def main() -> None:
    rank_process.attach()
    try:
        globals()[sys.argv[1]]()
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except Exception as error:
        sys.exit(fail(error, debug="--debug" in sys.argv))


if __name__ == "__main__":
    main()
