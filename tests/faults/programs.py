"""`python -m tests.faults.programs ENGINE WORK FOLDER`: one rank of a run that works at one thing until it is ended.

Each rank leaves a file `rank<N>` with its pid in FOLDER once the work has begun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from partita.cli.terminal.failure import fail
from partita.generation import Sampling
from partita.ranks import environment, rank_process


def begin(folder: Path, number: int) -> None:
    new = folder / f".rank{number}"
    new.write_text(str(os.getpid()))
    new.rename(folder / f"rank{number}")


def torch_work(work: str, folder: Path) -> None:
    import torch

    from partita.core.mesh import Mesh
    from partita.torch import generate, init_parallelism, load, save
    from partita.torch.collectives.groups import make_groups

    torch.set_num_threads(1)
    ranks = environment.world() or 1
    everyone = init_parallelism(ranks).tp
    if work == "collective":
        repeat(folder, everyone.rank, lambda: everyone.all_reduce_(torch.ones(1000)))
    if work == "send":
        pipeline = make_groups(Mesh(pp=ranks)).pp
        right, left = (pipeline.rank + 1) % ranks, (pipeline.rank - 1) % ranks

        def pass_on() -> None:
            sent = pipeline.start_send(torch.ones(1000), right)
            pipeline.recv_(torch.empty(1000), left)
            sent.wait()

        repeat(folder, everyone.rank, pass_on)
    groups = make_groups(Mesh(tp=ranks))
    model: Any = load(str(folder / "model"), tp=ranks, groups=groups)
    if work == "load":
        repeat(folder, everyone.rank, lambda: load(str(folder / "model"), tp=ranks, groups=groups))
    if work == "save":
        numbers = iter(range(10**9))
        repeat(folder, everyone.rank, lambda: save(model, folder / f"saved-{next(numbers)}"))
    if work == "generate":
        repeat(folder, everyone.rank, lambda: generate(model, [[1, 2, 3]], Sampling(max_new_tokens=20)))
    if work == "compile":
        repeat(folder, everyone.rank, compiled_again(model, lambda: everyone.rank == 1 and (folder / "raise").exists()))


def compiled_again(model: Any, fails: Callable[[], bool]) -> Callable[[], object]:
    """A forward that compiles the layers again each time, in which the compiler of a rank fails once `fails` says so."""
    import torch

    def backend(graph: Any, inputs: object) -> Any:
        if fails():
            raise RuntimeError("this rank cannot compile")
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend)

    def once() -> None:
        torch._dynamo.reset()
        model(input_ids=torch.arange(6)[None])

    return once


def mlx_work(work: str, folder: Path) -> None:
    import mlx.core as mx

    from partita.core.mesh import Mesh
    from partita.mlx import generate, load, save
    from partita.mlx.collectives.groups import make_groups

    ranks = environment.world() or 1
    groups = make_groups(Mesh(tp=ranks))
    everyone = groups.tp
    if work == "collective":
        repeat(folder, everyone.rank, lambda: mx.eval(everyone.all_sum(mx.ones(1000))))
    if work == "send":
        right, left = (everyone.rank + 1) % ranks, (everyone.rank - 1) % ranks

        def pass_on() -> None:
            if everyone.rank % 2:
                everyone.recv((1000,), mx.float32, left)
                everyone.send(mx.ones(1000), right)
            else:
                everyone.send(mx.ones(1000), right)
                everyone.recv((1000,), mx.float32, left)

        repeat(folder, everyone.rank, pass_on)
    model: Any = load(str(folder / "model"), tp=ranks, groups=groups)
    if work == "load":
        repeat(folder, everyone.rank, lambda: load(str(folder / "model"), tp=ranks, groups=groups))
    if work == "save":
        numbers = iter(range(10**9))
        repeat(folder, everyone.rank, lambda: save(model, folder / f"saved-{next(numbers)}"))
    if work == "generate":
        repeat(folder, everyone.rank, lambda: generate(model, [[1, 2, 3]], Sampling(max_new_tokens=20)))


def repeat(folder: Path, number: int, once: Callable[[], object]) -> None:
    once()
    begin(folder, number)
    while True:
        once()
        if number == 1 and (folder / "raise").exists():
            raise ValueError("this rank has had enough")


def main() -> None:
    rank_process.attach()
    engine, work, folder = sys.argv[1:]
    try:
        {"torch": torch_work, "mlx": mlx_work}[engine](work, Path(folder))
    except Exception as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()
