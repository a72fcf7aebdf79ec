"""`partita verify`: prove that a model split over ranks equals the unsplit one, or name the first module that differs."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import typer

from partita.cli import launch
from partita.cli.arguments.engine import choose_engine
from partita.cli.arguments.memory import zero_level
from partita.cli.arguments.model import plan_early, refuse_device, request_of
from partita.cli.arguments.options import (
    OUTPUT,
    SPLIT,
    Dtype,
    Microbatches,
    ModelArgument,
    PlanOptions,
    RunOptions,
    ScheduleKind,
)
from partita.cli.arguments.stages import choose
from partita.cli.job import Job
from partita.cli.terminal.console import out, plural, print_json, runs
from partita.core.mesh import Mesh
from partita.engine import open_engine
from partita.proof.report import Report, Row
from partita.proof.verify import level_of
from partita.ranks import environment
from partita.ranks.failure import Failure

COMPARISON = "Comparison"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(RunOptions, PlanOptions):
    """The options of `partita verify`."""

    model: ModelArgument
    tp: Annotated[
        int,
        typer.Option(
            "--tp", min=1, help="Tensor parallel ranks (default: 2 if no other option splits the model, else 1).",
            show_default=False, rich_help_panel=SPLIT),
    ] = 1  # fmt: skip
    schedule: ScheduleKind = None
    microbatches: Microbatches = None
    steps: Annotated[
        int,
        typer.Option(
            "--steps", min=0, help="Also compare this many training steps; 0 compares none.", rich_help_panel=COMPARISON
        ),
    ] = 3
    zero: Annotated[
        str | None,
        typer.Option(
            "--zero",
            metavar="LEVEL",
            help="Train with states that replicas (--dp, --cp) share: `1` (also without a value) the optimizer's, `2` "
            "gradients too, `3` weights too (default: that of --plan, or 0).",
            show_default=False,
            rich_help_panel=COMPARISON,
        ),
    ] = None
    dtype: Annotated[
        list[Dtype] | None,
        typer.Option(
            "--dtype",
            help="Compare in this dtype. Repeatable (default: float64 and the dtype of the weights; on MLX float32).",
            show_default=False,
            rich_help_panel=COMPARISON,
        ),
    ] = None
    all_rows: Annotated[
        bool,
        typer.Option(
            "--all", help="Print a row for every layer, not one for all identical layers.", rich_help_panel=OUTPUT
        ),
    ] = False


def verify(options: VerifyOptions) -> None:
    """Compare a split model with the unsplit one: module outputs, gradients, generated tokens and training steps.

    Exits with 1 if they differ, and names the first module that differs.
    """
    if options.plan is None and "tp" not in options.given and options.pp * options.dp == 1:
        options = replace(options, tp=2)
    name = choose_engine(options.engine)
    request, given = request_of(
        options.model, options, engine=name, trust_remote_code=options.trust_remote_code
    )  # fmt: skip
    mesh = request.mesh
    wanted = options.microbatches if options.microbatches is not None else 1 if mesh.pp == 1 else 2 * mesh.pp
    stages = choose(
        request, options.schedule, batch_size=wanted * mesh.dp, microbatches=wanted, is_planned=given is not None
    )
    zero = None if options.zero is None else int(zero_level(options.zero))
    level_of(zero, given, mesh)  # raises here, before ranks start
    refuse_device(name, options.device)
    launch.run(
        VerifyJob(
            request=stages.request, plan=plan_early(stages.request, given), backend=options.backend, device=options.device,
            training=stages.training, steps=options.steps, zero=zero,
            dtypes=[one.value for one in options.dtype or ()] or None, all_rows=options.all_rows,
            as_json=options.as_json,
        )
    )  # fmt: skip


@dataclass(kw_only=True)
class VerifyJob(Job):
    """The work of each rank of `verify`.

    Attributes:
        training: Settings of the training steps.
        steps: Number of training steps.
        zero: What the replicas share in them; None for the plan's level.
        dtypes: The dtypes to compare in; None for the default.
        all_rows: Whether every layer gets a row.
        as_json: Whether the report is printed as JSON.
    """

    training: dict[str, Any]
    steps: int
    zero: int | None
    dtypes: list[str] | None
    all_rows: bool
    as_json: bool

    def work(self) -> int:
        """Compare, and print the report on the first rank."""
        engine = open_engine(self.request.engine)
        report = engine.verify(
            self.request.model, **self.split, **self.training, steps=self.steps, zero=self.zero, dtype=self.dtypes
        )
        if environment.is_first():
            if self.as_json:
                print_json(_as_data(self.request.model, self.request.mesh, report))
            else:
                _show(report, all_rows=self.all_rows)
        return 0 if report.equal else Failure.DIFFERS


def _as_data(model: str, mesh: Mesh, report: Report) -> dict[str, Any]:
    return {
        "model": model,
        "mesh": mesh.to_data(),
        "equal": report.equal,
        "first_wrong": report.first_wrong,
        "what": report.what,
        "reference": report.reference,
        "rows": [
            {
                "kind": row.kind,
                "name": row.name,
                "error": row.error if math.isfinite(row.error) else None,
                "tolerance": row.tolerance,
                "dtype": row.dtype,
                "ok": row.ok,
            }
            for row in report.rows
        ],
        "skipped": [asdict(skip) for skip in report.skipped],
        "substituted": list(report.substituted),
    }


def _show(report: Report, *, all_rows: bool) -> None:
    console = out()
    console.print(report.what, style="dim", soft_wrap=True)
    if report.reference:
        console.print(f"reference of the unsplit model: {report.reference}", style="dim", soft_wrap=True)
    for note in report.substituted:
        console.print(note, style="yellow", soft_wrap=True)
    for dtype in report.dtypes:
        if len(report.dtypes) > 1:
            console.print(f"In {dtype}:", style="bold")
        console.print(_table([row for row in report.rows if row.dtype == dtype], all_rows=all_rows))
    for skip in report.skipped:
        where = f" in {skip.dtype}" if skip.dtype else ""
        console.print(f"Not compared{where}: {', '.join(skip.kinds)}: {skip.reason}.", style="yellow", soft_wrap=True)
    text, style = _verdict(report)
    console.print(text, style=style, soft_wrap=True)


def _table(rows: list[Row], *, all_rows: bool) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("compared", "name", "layers"):
        table.add_column(head, overflow="fold")
    for head in ("largest error", "allowed", ""):
        table.add_column(head, justify="right", no_wrap=True)
    shown = ""
    for kind, name, ids, alike in _groups(rows, all_rows=all_rows):
        worst = max(alike, key=lambda row: (not row.ok, row.error))
        wrong_ids = runs(_layers_of([row for row in alike if not row.ok])) if ids else ""
        verdict = Text("equal", "green") if worst.ok else Text(f"DIFFERS {wrong_ids}".rstrip(), "bold red")
        error, allowed = _number(worst.error), f"{worst.tolerance:.0e}"
        if kind in ("tokens", "dtype"):
            error, allowed = "", ""
        table.add_row(kind if kind != shown else "", name, ids, error, allowed, verdict)
        shown = kind
    return table


def _verdict(report: Report) -> tuple[str, str]:
    """The last line and its style."""
    compared = plural(len(report.rows), "comparison")
    if not report.rows:
        return "Nothing was compared, so the split is not verified.", "bold red"
    if not report.equal:
        wrong = sum(not row.ok for row in report.rows)
        return (
            f"Split DIFFERS from unsplit in {wrong} of {compared}. The first difference is {report.first_wrong}.",
            "bold red",
        )
    text = f"Split equals unsplit in {compared}."
    for dtype in report.dtypes:
        largest, nearest = report.largest(dtype), report.nearest(dtype)
        if largest is None or nearest is None:
            continue
        where = f"In {dtype} the" if dtype else "The"
        text += f" {where} largest error is {_number(largest.error)} ({largest.kind} {largest.name})"
        if nearest is not largest:
            text += f", and {_number(nearest.error)} is nearest to its tolerance, {nearest.tolerance:.1e} "
            text += f"({nearest.kind} {nearest.name})"
        text += "."
    missing = sorted({kind for skip in report.skipped for kind in skip.kinds})
    return text + (f" Not compared: {', '.join(missing)}." if missing else ""), "bold green"


def _number(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def _groups(rows: Any, *, all_rows: bool) -> list[tuple[str, str, str, list[Any]]]:
    """Rows of one kind whose names differ only in the layer number, in order of the first: kind, name, layers, rows."""
    order = {kind: index for index, kind in enumerate(dict.fromkeys(row.kind for row in rows))}
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        name = row.name if all_rows else _LAYER.sub(r"\1*\3", row.name, count=1)
        groups.setdefault((row.kind, name), []).append(row)
    sorted_groups = sorted(groups.items(), key=lambda item: order[item[0][0]])
    return [(kind, name, "" if all_rows else runs(_layers_of(rows)), rows) for (kind, name), rows in sorted_groups]


def _layers_of(rows: list[Any]) -> list[int]:
    return sorted({int(match[2]) for row in rows if (match := _LAYER.match(row.name))})


_LAYER = re.compile(r"((?:^|.*?\.))(\d+)((?:\.|$))")
