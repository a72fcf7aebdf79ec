"""`python -m bench`: measure, show, and keep the results."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import (
    block,
    chat,
    checkpoint,
    compile,
    context,
    decode,
    experts,
    load,
    messages,
    mlx_decode,
    mlx_load,
    pipeline,
    pipeline_decode,
    planner,
    quantized,
    serving,
    sharded,
    startup,
    waiting,
)
from bench.contest import OnRound
from bench.ranks import RankError, Ranks
from bench.report import show, write_docs
from bench.results import LATEST, PARTIAL, Run, Setting, Table, machine_facts

COMPARISONS = {
    "messages": messages.run,
    "waiting": waiting.run,
    "block": block.run,
    "decode": decode.run,
    "quantized": quantized.run,
    "chat": chat.run,
    "serving": serving.run,
    "compile": compile.run,
    "pipeline": pipeline.run,
    "pipeline-decode": pipeline_decode.run,
    "sharded": sharded.run,
    "experts": experts.run,
    "context": context.run,
    "load": load.run,
    "checkpoint": checkpoint.run,
    "planner": planner.run,
    "startup": startup.run,
    "mlx-decode": mlx_decode.run,
    "mlx-load": mlx_load.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Partita beside its peers, interleaved.")
    parser.add_argument("--only", choices=COMPARISONS, action="append", help="this comparison only (repeat for more)")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that everything runs")
    parser.add_argument("--write-docs", action="store_true", help="measure nothing, write the last whole run into docs")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.write_docs:
        if not LATEST.exists():
            console.print(f"There is no {LATEST}: run `make bench` first.")
            return 1
        console.print(f"wrote {write_docs(Run.load(LATEST))}")
        return 0
    facts = machine_facts()
    start = time.monotonic()
    tables: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="partita-bench-") as folder:
        setting = Setting(Path(folder), options.quick, lambda title: _shown(console, title), Ranks)
        for name in options.only or COMPARISONS:
            measured = COMPARISONS[name](setting)
            tables += measured
            for table in measured:
                show(console, table)
    whole = not (options.only or options.quick)
    path = LATEST if whole else PARTIAL
    Run(facts, tuple(tables)).save(path)
    missed = sum(row.met is False for table in tables for row in table.rows)
    minutes = (time.monotonic() - start) / 60
    console.print(f"x ours: above 1, ours is faster or smaller. {missed} targets missed. {minutes:.1f} min. {path}")
    return 0


@contextmanager
def _shown(console: Console, title: str) -> Iterator[OnRound]:
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda fraction: progress.update(task, completed=fraction)
        progress.update(task, completed=1.0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except RankError as error:
        sys.exit(f"{error}")
