"""`partita schedule`: what each pipeline rank computes when, how long it idles, and how many micro-batches it keeps alive."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.cli.arguments import inputs
from partita.cli.arguments.options import OUTPUT, AsJson
from partita.cli.terminal.console import out, print_json, write
from partita.cli.terminal.timeline import check_file
from partita.errors import ScheduleError
from partita.schedule import (
    KINDS,
    Costs,
    Schedule,
    Timeline,
    build,
    check,
    chrome_trace,
    grid,
    lower,
    picture,
    simulate,
)

COSTS = "Costs, all in the same unit of time"
SCHEDULE = "Schedule"
MAX_LISTED = 32
"""The largest number of ranks whose peaks are printed; JSON has all of them."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSource:
    """Options that specify a schedule: a kind and its sizes, or a file."""

    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="\n\n".join(f"[bold]{name}[/bold]: {what}" for name, what in KINDS.items()),
            metavar="KIND",
            show_default=False,
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    pp: Annotated[
        int | None, typer.Option("--pp", help="Pipeline ranks.", show_default=False, rich_help_panel=SCHEDULE)
    ] = None
    microbatches: Annotated[
        int | None,
        typer.Option(
            "--microbatches",
            help="Number of micro-batches of a step.",
            show_default=False,
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    vpp: Annotated[
        int | None,
        typer.Option(
            "--vpp",
            help="Stages per rank (default: the usual number of the kind).",
            show_default=False,
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            help="For interleaved-1f1b: run this many micro-batches on a stage before the rank's next stage (default: --pp).",
            show_default=False,
            rich_help_panel=SCHEDULE,
        ),
    ] = None
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE.csv",
            help="Read and check a schedule instead of --kind: one row per rank, cells like 2F0 (stage, F B W or BW, "
            "micro-batch).",
            show_default=False,
            rich_help_panel=SCHEDULE,
        ),
    ] = None

    @property
    def asked(self) -> dict[str, str | int | None]:
        """The options that specify a schedule without a file, by name."""
        return {
            "--kind": self.kind, "--pp": self.pp, "--microbatches": self.microbatches, "--vpp": self.vpp,
            "--group-size": self.group_size,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(ScheduleSource):
    """The options of `partita schedule`."""

    f: Annotated[
        str,
        typer.Option(
            "--f",
            metavar="TIME",
            help="Forward time: one for all stages, or one per stage: 3,4,4.",
            rich_help_panel=COSTS,
        ),
    ] = "1"
    b: Annotated[
        str, typer.Option("--b", metavar="TIME", help="Input gradient time, likewise.", rich_help_panel=COSTS)
    ] = "1"
    w: Annotated[
        str,
        typer.Option(
            "--w", metavar="TIME", help="Weight gradient time, likewise; BW takes b + w.", rich_help_panel=COSTS
        ),
    ] = "1"
    comm: Annotated[
        float,
        typer.Option("--comm", metavar="TIME", help="Latency of a transfer between ranks.", rich_help_panel=COSTS),
    ] = 0.0
    lowered: Annotated[
        bool,
        typer.Option(
            "--lowered", help="Add sends and receives, and show steps instead of time.", rich_help_panel=OUTPUT
        ),
    ] = False
    as_json: AsJson = False
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print the schedule in the form that --from reads.", rich_help_panel=OUTPUT)
    ] = False
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            help="Draw the timeline as .svg or .png.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE.json",
            help="Write a trace for ui.perfetto.dev, with a millisecond for each unit of time.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None


def schedule(options: ScheduleOptions) -> None:
    """Simulate a pipeline schedule: what each rank computes when, its bubble, and the micro-batches it keeps alive.

    The bubble is a fraction of the makespan (of all ranks, first start to last end) and of the longest span.

    A span is one rank's first start to its own last end: the bubble that remains where steps overlap at their ends.
    """
    if options.as_json and options.as_csv:
        raise ScheduleError("give --json or --csv, not both.")
    if options.picture is not None:
        check_file("--picture", options.picture, ".svg", ".png")
    if options.trace is not None:
        check_file("--trace", options.trace)
    costs = Costs(_times("--f", options.f), _times("--b", options.b), _times("--w", options.w), options.comm)
    made = _make(options)
    if options.lowered:
        made = lower(made, costs)
    timeline = simulate(made, costs)
    name = f"{options.source or options.kind}, pp {made.num_ranks}, {_microbatches(made.num_microbatches)}"
    if options.picture is not None:
        picture({name: timeline}, options.picture)
    if options.trace is not None:
        trace = json.dumps(chrome_trace({name: timeline}, unit_us=1000.0))
        options.trace.write_text(trace, encoding="utf-8")
    if options.as_csv:
        write(made.to_csv())
    elif options.as_json:
        print_json(_as_data(timeline, costs, options.kind))
    else:
        _show(timeline, name, lowered=options.lowered)


def _make(options: ScheduleSource) -> Schedule:
    asked, source = options.asked, options.source
    if source is not None:
        given = [name for name, value in asked.items() if value is not None]
        if given:
            raise ScheduleError(f"--from {source} specifies the complete schedule: leave out {', '.join(given)}.")
        return _read(source)
    if options.kind is None or options.pp is None or options.microbatches is None:
        missing = [name for name, value in list(asked.items())[:3] if value is None]
        raise ScheduleError(f"{', '.join(missing)} missing: give --kind, --pp and --microbatches, or --from FILE.csv.")
    return build(options.kind, options.pp, options.microbatches, options.vpp, group_size=options.group_size)


def _read(source: Path) -> Schedule:
    try:
        made = Schedule.from_csv(inputs.read(source, "--from").decode("utf-8"))
        check(made)
    except UnicodeDecodeError as error:
        raise ScheduleError(f"--from {source} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    except OSError as error:
        raise ScheduleError(f"--from {source} cannot be read: {error.strerror}.") from None
    except ScheduleError as error:
        raise ScheduleError(f"--from {source}: {error}") from None
    return made


def _times(option: str, text: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ScheduleError(
            f"{option} must be a number, or one per stage separated by commas, but is {text!r}."
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def _microbatches(number: int) -> str:
    return f"{number:,} micro-batch{'' if number == 1 else 'es'}"


def _as_data(timeline: Timeline, costs: Costs, kind: str | None) -> dict[str, Any]:
    made = timeline.schedule
    return {
        "kind": kind,
        "pp": made.num_ranks,
        "vpp": max(made.rank_of.count(rank) for rank in range(made.num_ranks)),
        "microbatches": made.num_microbatches,
        "rank_of": list(made.rank_of),
        "costs": {"f": costs.f, "b": costs.b, "w": costs.w, "comm": costs.comm},
        "makespan": timeline.makespan,
        "bubble_makespan": timeline.bubble_makespan,
        "bubble_span": timeline.bubble_span,
        "busy": list(timeline.busy),
        "peak_activations": list(timeline.peak_activations),
    }


def _show(timeline: Timeline, name: str, *, lowered: bool) -> None:
    made = timeline.schedule
    console = out()
    console.print(f"{name}\n", style="bold", soft_wrap=True)
    console.print(grid(made if lowered else timeline, console.width) + "\n", soft_wrap=True)
    console.print(
        f"bubble    {timeline.bubble_makespan:.2%} of the makespan, {timeline.bubble_span:.2%} of the longest span"
    )
    console.print(f"makespan  {timeline.makespan:,.6g}")
    console.print(f"alive     at most {_peaks(timeline)}", soft_wrap=True)


def _peaks(timeline: Timeline) -> str:
    peaks = timeline.peak_activations
    if len(set(peaks)) == 1:
        return f"{_microbatches(peaks[0])} on {'every' if len(peaks) > 1 else 'the one'} rank"
    shown = [str(peak) for peak in peaks]
    if len(shown) > MAX_LISTED:
        shown[MAX_LISTED // 2 : -MAX_LISTED // 2] = ["..."]
    return f"{' '.join(shown)} micro-batches on ranks 0 to {len(peaks) - 1}"
