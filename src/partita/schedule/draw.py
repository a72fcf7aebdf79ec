"""Readable timelines: `grid` as text, `picture` as SVG or PNG, `chrome_trace` for Perfetto."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.errors import ScheduleError
from partita.schedule.action import Kind, Schedule
from partita.schedule.text_grid import grid
from partita.schedule.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["chrome_trace", "grid", "picture"]

COLOURS: dict[Kind, tuple[float, float, float]] = {
    Kind.F: (0.27, 0.47, 0.70),
    Kind.B: (0.87, 0.52, 0.15),
    Kind.W: (0.36, 0.62, 0.36),
    Kind.BW: (0.76, 0.36, 0.30),
}
_MEANING = {Kind.F: "forward", Kind.B: "input gradient", Kind.W: "weight gradient", Kind.BW: "backward"}

_WIDTH = 13.0  # inches, width of a page
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 0.75, 0.2, 0.7, 0.8, 0.75  # inches around and between the timelines
_ROW, _HEIGHT = 0.27, 7.0  # inches: height of a rank, and largest height of a timeline
_MAX_SHAPES = 20_000  # more actions are drawn as pixels instead of shapes
_DIGIT = 0.62  # width of a digit, in font sizes
_SMALLEST = 4.0  # smaller numbers are not drawn
_POINTS = 72.0  # points per inch


def picture(timelines: Mapping[str, Timeline], path: str | Path, title: str = "") -> None:
    """Draw timelines below each other on one time scale, with their bubbles, into a file.

    Colours are kinds, shades are the virtual stages of a rank (the first is the darkest), and numbers, where there is
    space, are micro-batches.

    Args:
        timelines: Name -> timeline, such as predicted and measured.
        path: The file; its suffix is the format, .svg or .png.
        title: The title of the picture.

    Raises:
        ScheduleError: The suffix is another, the folder does not exist, or there are no timelines.
    """
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise ScheduleError(f"path must end with .svg or .png, but is {str(path)!r}.")
    if not path.parent.is_dir():
        raise ScheduleError(f"path {str(path)!r}: there is no folder {str(path.parent)!r}. Create it first.")
    if not timelines:
        raise ScheduleError("timelines is empty: give at least one.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [min(_HEIGHT, max(2, line.schedule.num_ranks) * _ROW) for line in timelines.values()]
    margin = _TOP if title else _TOP - 0.35
    total = margin + sum(heights) + _BETWEEN * (len(heights) - 1) + _BOTTOM
    figure = Figure(figsize=(_WIDTH, total))
    FigureCanvasAgg(figure)
    longest = max(line.makespan for line in timelines.values()) or 1.0
    top = total - margin
    for (name, line), height in zip(timelines.items(), heights, strict=True):
        box = (_LEFT / _WIDTH, (top - height) / total, 1 - (_LEFT + _RIGHT) / _WIDTH, height / total)
        axes = figure.add_axes(box)
        draw_timeline(axes, line, longest, height)
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold", pad=5)
        axes.set_title(_numbers(line), loc="right", fontsize=9, color="0.25", pad=5)
        top -= height + _BETWEEN
    axes.set_xlabel("time", fontsize=9)
    if title:
        figure.text(_LEFT / _WIDTH, 1 - 0.3 / total, title, fontsize=12, va="center")
    _legend(figure, timelines, total)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def chrome_trace(timelines: Mapping[str, Timeline], unit_us: float = 1_000_000.0) -> dict[str, Any]:
    """Timelines in Chrome's trace event format, which Perfetto (ui.perfetto.dev) opens: a process a timeline, a thread a rank.

    Args:
        timelines: Name -> timeline.
        unit_us: Microseconds of their unit of time; by default that is a second.

    Returns:
        What to write as JSON. Sends and receives are in it where they take time.
    """
    events: list[dict[str, Any]] = []
    for pid, (name, line) in enumerate(timelines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        begin = min((start for starts in line.starts for start in starts), default=0.0)
        for rank, row in enumerate(line.schedule.ranks):
            thread = {"pid": pid, "tid": rank}
            events.append({"ph": "M", "name": "thread_name", **thread, "args": {"name": f"rank {rank}"}})
            events.append({"ph": "M", "name": "thread_sort_index", **thread, "args": {"sort_index": rank}})
            for action, start, end in zip(row, line.starts[rank], line.ends[rank], strict=True):
                if action.is_compute or end > start:
                    events.append(
                        {
                            "ph": "X",
                            "name": str(action),
                            "cat": "compute" if action.is_compute else "transfer",
                            **thread,
                            "ts": (start - begin) * unit_us,
                            "dur": (end - start) * unit_us,
                            "args": {
                                "stage": action.stage,
                                "microbatch": action.microbatch,
                                "kind": action.kind.value,
                            },
                        }
                    )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def draw_timeline(axes: Axes, line: Timeline, longest: float, height: float) -> None:
    """Draw a timeline of at most `longest` into axes `height` inches high: a bar an action, ranks from the top."""
    from matplotlib.collections import PolyCollection

    schedule = line.schedule
    begin = min((start for starts in line.starts for start in starts), default=0.0)
    shades = _shades(schedule)
    corners, colours, texts = [], [], []
    inches = (_WIDTH - _LEFT - _RIGHT) / longest
    largest = min(8.0, height / schedule.num_ranks * _POINTS * 0.5)
    for rank, row in enumerate(schedule.ranks):
        for action, start, end in zip(row, line.starts[rank], line.ends[rank], strict=True):
            if not action.is_compute or end <= start:
                continue
            a, b = start - begin, end - begin
            corners.append(((a, rank - 0.44), (b, rank - 0.44), (b, rank + 0.44), (a, rank + 0.44)))
            colours.append(_mixed(COLOURS[action.kind], shades[action.stage]))
            text = str(action.microbatch)
            size = min(largest, (b - a) * inches * _POINTS / (len(text) * _DIGIT + 0.6))
            if size >= _SMALLEST:
                texts.append(((a + b) / 2, rank, text, size, "white" if shades[action.stage] < 0.3 else "0.1"))
    many = len(corners) > _MAX_SHAPES
    typical = line.makespan * inches * _POINTS * schedule.num_ranks / max(1, len(corners))  # points of a bar
    edge = 0.5 if typical > 4 else 0.0
    bars = PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=edge, rasterized=many)
    axes.add_collection(bars, autolim=False)
    if not many:
        for x, y, text, size, colour in texts:
            axes.text(x, y, text, fontsize=size, color=colour, ha="center", va="center_baseline")
    axes.set_xlim(0, longest * 1.002)
    axes.set_ylim(schedule.num_ranks - 0.5, -0.5)
    every = -(-schedule.num_ranks // 32)
    axes.set_yticks(range(0, schedule.num_ranks, every), [f"rank {r}" for r in range(0, schedule.num_ranks, every)])
    axes.tick_params(labelsize=8, length=0, axis="y")
    axes.tick_params(labelsize=8, length=3, axis="x")
    axes.set_facecolor("0.94")
    for side in axes.spines.values():
        side.set_visible(False)


def _numbers(line: Timeline) -> str:
    return (
        f"bubble {line.bubble_makespan:.1%} of makespan, {line.bubble_span:.1%} of span    "
        f"makespan {line.makespan:,.6g}    peak {max(line.peak_activations, default=0)} micro-batches"
    )


def _shades(schedule: Schedule) -> list[float]:
    """Of each stage how much white its colour gets: none for a rank's first stage, most for its last."""
    stages_of: dict[int, list[int]] = {}
    for stage, rank in enumerate(schedule.rank_of):
        stages_of.setdefault(rank, []).append(stage)
    shades = [0.0] * schedule.num_stages
    for stages in stages_of.values():
        for place, stage in enumerate(stages):
            shades[stage] = 0.55 * place / max(1, len(stages) - 1)
    return shades


def _mixed(colour: tuple[float, float, float], white: float) -> tuple[float, float, float]:
    red, green, blue = (part + (1 - part) * white for part in colour)
    return red, green, blue


def _legend(figure: Any, timelines: Mapping[str, Timeline], total: float) -> None:
    """The kinds that occur, and bubbles; of several virtual stages the lightest shade beside the darkest."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    schedules = [line.schedule for line in timelines.values()]
    kinds = {action.kind for schedule in schedules for row in schedule.ranks for action in row}
    several = any(schedule.num_stages > schedule.num_ranks for schedule in schedules)
    handles: list[tuple[Patch, ...]] = []
    labels = []
    for kind, meaning in _MEANING.items():
        if kind in kinds:
            shades = (0.0, 0.55) if several else (0.0,)
            handles.append(tuple(Patch(facecolor=_mixed(COLOURS[kind], shade)) for shade in shades))
            labels.append(f"{meaning}: first, last stage" if several else meaning)
    handles.append((Patch(facecolor="0.94"),))
    labels.append("bubble")
    figure.legend(
        handles, labels, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)}, loc="lower center", ncols=len(labels),
        fontsize=9, frameon=False, bbox_to_anchor=(0.5, 0.02 / total), handlelength=2.2,
    )  # fmt: skip
