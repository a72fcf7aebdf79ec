"""`partita measure`: how fast this machine computes, moves bytes and communicates, as a hardware file."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.checkpoint.durable import failing_as
from partita.cli import launch
from partita.cli.arguments.engine import RUN, EngineOption, choose_engine
from partita.cli.arguments.options import OUTPUT, AsJson
from partita.cli.job import Job
from partita.cli.terminal.console import err, out, print_json, size
from partita.core.mesh import Mesh
from partita.core.request import PlanRequest
from partita.cost.hardware import Hardware, measured_file, parse, write
from partita.engine import check_measures, measure_machine
from partita.ranks import environment
from partita.ranks.backends import open_mpi

LIMIT_S, SECOND_S, LINKS_S = 100.0, 30.0, 10.0
"""Seconds after which measuring has ended, and of them those kept for the start and the measurements of a second backend."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """The options of `partita measure`."""

    ranks: Annotated[
        int,
        typer.Option(
            "--ranks", min=1, max=64, help="Measure while this many ranks share the machine, as they will later.",
            rich_help_panel=RUN),
    ] = 2  # fmt: skip
    engine: EngineOption = None
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", show_default=False, rich_help_panel=OUTPUT,
            help="Write the hardware file here (default: hardware.toml in the cache folder, which `--hardware this` reads)."),
    ] = None  # fmt: skip
    as_json: AsJson = False


def measure(options: MeasureOptions) -> None:
    """Measure matrix products, memory, layers and collectives of this machine, and write a hardware file.

    The file is what predictions of memory and time are made from. Measuring takes about a minute, and less than two on a busy
    machine, where it repeats less; other work on the machine distorts it.
    """
    name = choose_engine(options.engine)
    check_measures(name)
    file = options.out_file or measured_file()
    backends: list[str | None] = [None]
    if name == "torch" and options.ranks > 1:
        backends = ["mpi", "gloo"] if open_mpi() is not None else ["gloo"]
    found: dict[str | None, dict[str, Any]] = {}
    begin = time.time()
    with tempfile.TemporaryDirectory(prefix="partita-") as folder:
        for backend in backends:
            target = Path(folder) / f"{backend}.json"
            request = PlanRequest("", Mesh(dp=options.ranks), engine=name)
            ends = begin + (LIMIT_S if backend == backends[-1] else LIMIT_S - SECOND_S)
            job = MeasureJob(request=request, backend=backend, target=target, links_only=bool(found), ends=ends)
            code = launch.start_job(job) if options.ranks > 1 else launch.work_together(job.work, name)
            if code:
                raise typer.Exit(code)
            found[backend] = json.loads(target.read_text(encoding="utf-8"))
    text = _file_of(found, options.ranks)
    hardware = parse(text, str(file))
    with failing_as(file, "cannot be written"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    if options.as_json:
        print_json({"file": str(file), "ranks": options.ranks, "measured": {str(k): v for k, v in found.items()}})
    else:
        _show(hardware, file)


@dataclass(kw_only=True)
class MeasureJob(Job):
    """The work of each rank of `measure`.

    Attributes:
        target: The file for the first rank's numbers.
        links_only: Whether only the collectives are measured, over another backend.
        ends: The time (of `time.time`) at which it shall have ended.
    """

    target: Path
    links_only: bool = False
    ends: float

    def work(self) -> int:
        """Measure, and write the numbers on the first rank."""
        what = f"measuring ({self.backend})" if self.backend else "measuring"
        with _progress(what) as show:
            budget_s = min(self.ends - time.time(), LINKS_S if self.links_only else LIMIT_S)
            found = measure_machine(
                self.request.engine, links_only=self.links_only, on_progress=show, budget_s=budget_s
            )
        if environment.is_first():
            self.target.write_text(json.dumps(found), encoding="utf-8")
        return 0


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float, str], None] | None]:
    if not environment.is_first() or not err().is_terminal:
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err(), transient=True
    ) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda done, next_one: bar.update(task, completed=done, description=f"{what}: {next_one}")


def _file_of(found: Mapping[str | None, Mapping[str, Any]], ranks: int) -> str:
    """The text of the hardware file: the first backend is that of its links."""
    first = next(iter(found.values()))
    links = {str(name): one["link"] for name, one in found.items() if one["link"]}
    none = {"latency_s": 0.0, "bandwidth": 1e9}
    data = {
        "name": "this machine", "source": f"partita measure --ranks {ranks}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "devices_per_node": ranks, "kernels": "torch", "device": first["device"],
        "links": {"shared": next(iter(links.values()), none)}, "backends": links,
    }  # fmt: skip
    return write(data, "Written by `partita measure`. docs/planning.md describes every key.")


def _show(hardware: Hardware, file: Path) -> None:
    device = hardware.devices[0]
    out().print(
        f"{device.name}: {size(device.memory_bytes)} of memory a rank, {device.memory_bandwidth / 1e9:.1f} GB/s"
    )
    for dtype, peak in device.peak_flops.items():
        out().print(f"  {dtype} products  {peak / 1e9:,.0f} Gflop/s")
    out().print(
        f"  a layer takes at least {1e6 * device.layer_s:.0f} us forward, {1e6 * device.layer_backward_s:.0f} us backward, "
        f"{1e6 * device.decode_layer_s:.0f} us a decoded token"
    )
    for name, link in hardware.backends.items():
        curve = link.measured["all_reduce"]
        out().print(f"  {name}: an all-reduce takes {1e6 * curve[0][1]:.0f} us for {curve[0][0] / 1024:.0f} KiB, "
                    f"{1e3 * curve[-1][1]:.1f} ms for {curve[-1][0] / 2**20:.0f} MiB")  # fmt: skip
    out().print(f"wrote {file}")
