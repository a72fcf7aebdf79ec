"""What was measured: tables of contestants, on a machine, as data."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench.contest import OnRound, Samples
from bench.ranks import Ranks

RESULTS = Path(__file__).parent / "results"
LATEST = RESULTS / "latest.json"
PARTIAL = RESULTS / "partial.tmp"
"""Of runs with --only or --quick, which do not replace a whole run's results."""


@dataclass(frozen=True)
class Setting:
    """What a comparison is given.

    Attributes:
        folder: For checkpoints; removed at the end.
        quick: Whether few rounds will do.
        work: Shows a work's progress while it is open.
        ranks: Starts fresh ranks.
    """

    folder: Path
    quick: bool
    work: Callable[[str], AbstractContextManager[OnRound]]
    ranks: Callable[..., Ranks]


@dataclass(frozen=True)
class Target:
    """`ratio` is how many times our time (or bytes) theirs should be at least, `most` at most; `words` say it."""

    ratio: float
    words: str
    most: float | None = None


@dataclass(frozen=True)
class Row:
    """One contestant of one work.

    `median`, `low` and `high` (10th and 90th percentile) are in the table's unit; `ratio` is the median over the rounds of
    its value over ours in the same round, with percentiles likewise.
    """

    contestant: str
    median: float
    low: float
    high: float
    rounds: int
    ratio: float
    ratio_low: float
    ratio_high: float
    target: Target | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.target.ratio <= self.ratio and (self.target.most is None or self.ratio <= self.target.most)


@dataclass(frozen=True)
class Table:
    """One work: its contestants in one unit, of which less is better, or a rate, of which more is.

    `left_out` has the contestants that were not measured, and why.
    """

    name: str
    title: str
    unit: str
    rows: tuple[Row, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A whole run."""

    machine: Mapping[str, Any]
    tables: tuple[Table, ...]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Run:
        data = json.loads(path.read_text())
        return Run(
            data["machine"],
            tuple(Table(**{**table, "rows": tuple(map(_row, table["rows"]))}) for table in data["tables"]),
        )


def _row(data: Mapping[str, Any]) -> Row:
    target = data["target"]
    return Row(**{**data, "target": None if target is None else Target(**target)})


def summarize(
    name: str,
    title: str,
    unit: str,
    scale: float,
    samples: Samples,
    ours: str,
    targets: Mapping[str, Target],
    *,
    rate: bool = False,
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """The table of `samples`, whose values times `scale` are in `unit`; with `rate`, `scale` divided by them."""
    rows = []
    for contestant, values in samples.values.items():
        low, median, high = percentiles([scale / value if rate else value * scale for value in values])
        ratios = [theirs / mine for theirs, mine in zip(values, samples.values[ours], strict=True)]
        ratio_low, ratio, ratio_high = percentiles(ratios)
        target = targets.get(contestant)
        rows.append(Row(contestant, median, low, high, len(values), ratio, ratio_low, ratio_high, target))
    return Table(name, title, unit, tuple(rows), dict(left_out))


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 10th, 50th and 90th."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[0], statistics.median(values), deciles[8]


def machine_facts() -> dict[str, Any]:
    """Where and when this ran."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "partita": version("partita"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
