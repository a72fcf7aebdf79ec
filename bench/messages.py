"""Sums over ranks: the communicator's own call, as layers make it, beside what it stands on."""

from __future__ import annotations

from bench.contest import Contest, Contestant, compete
from bench.results import Setting, Table, Target, summarize

OURS = "Partita's communicator"
OURS_GLOO = "the same over gloo"
MPI = "mpi4py's Allreduce"
GLOO = "torch's all_reduce over gloo"

CASES = ((2, 4 << 10, 200), (2, 64 << 10, 100), (2, 1 << 20, 10), (4, 4 << 10, 50))
"""Ranks, bytes, sums a turn. Four ranks have to share the cores of this machine."""


def run(setting: Setting) -> list[Table]:
    """All-reduces of several sizes."""
    tables = []
    for ranks_count, size, steps in CASES:
        title = f"All-reduce of {size >> 10} KiB, {ranks_count} ranks"
        contest = Contest(set_up, (size,), steps, budget_s=3 if setting.quick else 10, most_rounds=100)
        with setting.work(title) as progress, setting.ranks(ranks_count) as ranks:
            samples = compete(ranks, contest, progress)
        targets = {GLOO: Target(30.0, "ours at least 30 x faster")} if (ranks_count, size) == (2, 4 << 10) else {}
        tables.append(summarize(f"all-reduce-{ranks_count}-{size}", title, "us", 1e6, samples, OURS, targets))
    return tables


def set_up(size: int) -> dict[str, Contestant]:
    """Every contestant sums a float32 tensor of `size` bytes in place."""
    import torch
    import torch.distributed as dist

    from bench.floor import open_mpi_sum
    from bench.ranks import over_gloo
    from partita.core.mesh import Mesh
    from partita.torch.collectives.groups import make_groups

    groups = make_groups(Mesh(tp=dist.get_world_size()))
    sums = {
        OURS: groups.tp.all_reduce_,
        OURS_GLOO: over_gloo(groups).tp.all_reduce_,
        MPI: open_mpi_sum(),
        GLOO: dist.all_reduce,
    }
    zeros = torch.zeros(size // 4)

    def contestant(name: str) -> Contestant:
        def check() -> None:
            x = torch.full((size // 4,), float(dist.get_rank() + 1))
            sums[name](x)
            want = sum(range(1, dist.get_world_size() + 1))
            assert (x == want).all(), f"{x[0]} is not {want}"

        return Contestant(lambda: sums[name](zeros), check)

    return {name: contestant(name) for name in sums}
