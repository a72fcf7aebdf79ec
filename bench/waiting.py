"""Waiting: what a rank that waits costs, on a quiet machine and beside other processes that need its cores."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.contest import Contest, Contestant, compete
from bench.ranks import Ranks, over_gloo, own_rank
from bench.results import Setting, Table, Target, summarize

OURS = "Partita's communicator"
OURS_GLOO = "the same over gloo"
MPI = "mpi4py's Allreduce"
MLX_MPI = "MLX over Open MPI"
MLX_RING = "MLX over the ring"

WAIT_S = 1.0
BYTES = 4 << 10
RANKS = (2, 4)
LOADS = (0, 1, 2)
LOOPS = 40_000
"""Additions in Python that a rank makes while the others wait: about 2 ms."""


def run(setting: Setting) -> list[Table]:
    """CPU time of a waiting rank; sums and steps of unequal work, beside processes that compute."""
    tables = [_asleep(setting), _asleep_mlx(setting)]
    for count in RANKS:
        with setting.ranks(count) as ranks:
            for load in LOADS:
                with _others(load):
                    tables += [_sums(setting, ranks, load), _unequal(setting, ranks, load)]
    return tables


def _asleep(setting: Setting) -> Table:
    title = f"CPU time of a rank that waits {WAIT_S:.0f} s in an all-reduce"
    contest = Contest(waits, (), budget_s=1, rounds=2 if setting.quick else 5, clock=time.process_time)
    with setting.work(title) as progress, setting.ranks(2) as ranks:
        samples = compete(ranks, contest, progress)
    return summarize("wait-cpu", title, "ms", 1e3, samples, OURS, {MPI: Target(5.0, "ours at least 5 x less")})


def _asleep_mlx(setting: Setting) -> Table:
    title = f"CPU time of an MLX rank that waits {WAIT_S:.0f} s in an all-reduce"
    contest = Contest(mlx_waits, (), budget_s=1, rounds=2 if setting.quick else 5, clock=time.process_time)
    with setting.work(title) as progress, setting.ranks(2, "mlx") as ranks:
        samples = compete(ranks, contest, progress)
    return summarize("wait-cpu-mlx", title, "ms", 1e3, samples, next(iter(samples.values)), {})


def _sums(setting: Setting, ranks: Ranks, load: int) -> Table:
    title = f"All-reduce of {BYTES >> 10} KiB, {_beside(ranks, load)}"
    contest = Contest(sums, (0,), 50, budget_s=1 if setting.quick else 8, most_rounds=100)
    with setting.work(title) as progress:
        samples = compete(ranks, contest, progress)
    return summarize(f"wait-sum-{ranks.size}-{load}", title, "us", 1e6, samples, OURS, {})


def _unequal(setting: Setting, ranks: Ranks, load: int) -> Table:
    title = f"One rank computes while the others wait, {_beside(ranks, load)}"
    contest = Contest(sums, (LOOPS,), 8, budget_s=1 if setting.quick else 8, most_rounds=100)
    with setting.work(title) as progress:
        samples = compete(ranks, contest, progress)
    return summarize(f"wait-step-{ranks.size}-{load}", title, "ms a step", 1e3, samples, OURS, {})


def _beside(ranks: Ranks, load: int) -> str:
    return f"{ranks.size} ranks beside {load} other process{'' if load == 1 else 'es'}"


@contextmanager
def _others(count: int) -> Iterator[None]:
    """`count` processes that compute."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def waits() -> dict[str, Contestant]:
    """Every contestant sums after rank 0 has slept."""
    return {name: Contestant(_late(sums), _nothing) for name, sums in _all_reduces().items()}


def mlx_waits() -> dict[str, Contestant]:
    """MLX's own sums over both of its backends after rank 0 has slept."""
    import mlx.core as mx

    def contestant(backend: str) -> Contestant:
        group = mx.distributed.init(backend=backend)
        return Contestant(_late(lambda: mx.eval(mx.distributed.all_sum(mx.ones(BYTES // 4), group=group))), _nothing)

    return {name: contestant(backend) for name, backend in ((MLX_MPI, "mpi"), (MLX_RING, "ring"))}


def sums(loops: int) -> dict[str, Contestant]:
    """Every contestant sums; before each sum one rank, another one each time, makes `loops` additions."""

    def contestant(all_reduce: Callable[[], object]) -> Contestant:
        turn = 0

        def step() -> None:
            nonlocal turn
            turn += 1
            if loops and turn % _size() == own_rank():
                sum(range(loops))
            all_reduce()

        return Contestant(step, _nothing)

    all_reduces = _all_reduces()
    return {name: contestant(all_reduces[name]) for name in (OURS, MPI)}


def _size() -> int:
    import torch.distributed as dist

    return dist.get_world_size()


def _all_reduces() -> dict[str, Callable[[], object]]:
    import torch

    from bench.floor import open_mpi_sum
    from partita.core.mesh import Mesh
    from partita.torch.collectives.groups import make_groups

    groups = make_groups(Mesh(tp=_size()))
    sums = {OURS: groups.tp.all_reduce_, OURS_GLOO: over_gloo(groups).tp.all_reduce_, MPI: open_mpi_sum()}
    zeros = torch.zeros(BYTES // 4)
    return {name: lambda call=call: call(zeros) for name, call in sums.items()}  # type: ignore[misc]


def _late(all_reduce: Callable[[], object]) -> Callable[[], None]:
    def step() -> None:
        if own_rank() == 0:
            time.sleep(WAIT_S)
        all_reduce()

    return step


def _nothing() -> None:
    """The comparison `messages` and the tests check these sums."""
