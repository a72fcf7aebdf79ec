"""Schedules and timelines as text: one row per rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from partita.schedule.action import Action, Schedule
from partita.schedule.timeline import Timeline

AROUND = 4
"""Ranks and steps that `excerpt` shows on each side of an error."""

MAX_RANKS = 24
"""Ranks that the short form of `grid` shows."""

_WIDEST = 40  # columns that an action of median length may take, so that a tiny action does not widen the grid
_TICK = 15  # least number of columns between ticks


def grid(shown: Timeline | Schedule, width: int | None = None) -> str:
    """A timeline as rank x time, to scale; a schedule as rank x step.

    A cell is ``F0``, or ``2F0`` if a rank has several stages. In a timeline, dashes fill an action until its end, and blanks
    are bubbles; the text of a short action is truncated; sends and receives are left out.

    Args:
        shown: The timeline or schedule.
        width: Largest number of columns; the middle is left out if necessary, and the last line notes it. None for all.
    """
    if isinstance(shown, Timeline):
        return _in_time(shown, width)
    return _in_steps(shown, width)


def excerpt(schedule: Schedule, marks: Sequence[tuple[int, int]]) -> str:
    """The rank x step grid around the first mark, with > < at every visible mark.

    Args:
        schedule: The schedule.
        marks: (rank, step) of each mark, both from 0; a step past a rank's last marks a missing action.
    """
    rank, step = marks[0]
    ranks = range(max(0, rank - AROUND), min(schedule.num_ranks, rank + AROUND + 1))
    steps = range(max(0, step - AROUND), min(max(map(len, schedule.ranks)) + 1, step + AROUND + 1))
    rows = [["step", *map(str, steps)]]
    for r in ranks:
        cells = [str(action) for action in schedule.ranks[r]] + [""] * (steps.stop - len(schedule.ranks[r]))
        rows.append([f"rank {r}", *(f">{cells[s]}<" if (r, s) in marks else f" {cells[s]} " for s in steps)])
    rows[0][1:] = [f" {cell} " for cell in rows[0][1:]]
    return _aligned(rows)


def _in_steps(schedule: Schedule, width: int | None) -> str:
    ranks, steps = _kept(schedule.num_ranks, width and MAX_RANKS), max(map(len, schedule.ranks), default=0)
    label = _labels(schedule)
    cells = {rank: [label(action) for action in schedule.ranks[rank]] for rank in ranks if rank is not None}
    longest = max((len(cell) for row in cells.values() for cell in row), default=0)
    columns = _kept(steps, width and (width - len(f"rank {schedule.num_ranks} ")) // (longest + 1))
    rows = [["step", *("..." if step is None else str(step) for step in columns)]]
    for rank in ranks:
        if rank is None:
            rows.append(["..."] + [""] * len(columns))
            continue
        row = cells[rank]
        shown = ("..." if step is None else row[step] if step < len(row) else "" for step in columns)
        rows.append([f"rank {rank}", *shown])
    return "\n".join([_aligned(rows), *_left_out(schedule.num_ranks, ranks, steps, columns, "steps")])


def _in_time(timeline: Timeline, width: int | None) -> str:
    schedule = timeline.schedule
    label = _labels(schedule)
    rows = [
        [(label(action), start, end) for action, start, end in zip(*row, strict=True) if action.is_compute]
        for row in zip(schedule.ranks, timeline.starts, timeline.ends, strict=True)
    ]
    begin = min((start for row in rows for _, start, _ in row), default=0.0)
    unit = _time_of_a_column(rows)
    total = _column(timeline.makespan, unit)
    head = len(f"rank {schedule.num_ranks} ")
    ranks = _kept(schedule.num_ranks, width and MAX_RANKS)
    half = total if width is None or head + total <= width else max(0, (width - head - len(" ... ")) // 2)
    columns = range(total) if half == total else [*range(half), None, *range(total - half, total)]

    def cut(line: str) -> str:
        line = line.ljust(total)
        return line[:total] if half == total else f"{line[:half]} ... {line[total - half : total]}"

    lines = ["time".ljust(head) + cut(_ticks(begin, unit, total))]
    for rank in ranks:
        if rank is None:
            lines.append("...")
        else:
            lines.append(f"rank {rank}".ljust(head) + cut(_bars(rows[rank], begin, unit)))
    lines = [line.rstrip() for line in lines]
    return "\n".join([*lines, *_left_out(schedule.num_ranks, ranks, total, columns, f"columns of {unit:.4g}")])


def _time_of_a_column(rows: list[list[tuple[str, float, float]]]) -> float:
    """The time of a column: small enough for the text of every action, unless that widens most actions too much."""
    lengths = [(end - start, len(text) + 1) for row in rows for text, start, end in row if end > start]
    if not lengths:
        return 1.0
    least = min(length / columns for length, columns in lengths)
    median = sorted(lengths)[len(lengths) // 2][0]
    return max(least, median / _WIDEST)


def _bars(row: list[tuple[str, float, float]], begin: float, unit: float) -> str:
    line = ""
    for text, start, end in row:
        first, last = _column(start - begin, unit), _column(end - begin, unit)
        room = max(last - first - 1, min(1, last - first))
        line = line.ljust(first) + text[:room].ljust(room, "-")
    return line


def _column(time: float, unit: float) -> int:
    """The nearest column, the right one of two, so that equal times take equal numbers of columns."""
    return math.floor(time / unit + 0.5 + 1e-9)


def _ticks(begin: float, unit: float, total: int) -> str:
    """The times of columns, at round numbers."""
    least = _TICK * unit
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    line = ""
    for number in range(math.ceil(begin / step), math.ceil((begin + total * unit) / step)):
        text, column = f"{number * step:.6g}", _column(number * step - begin, unit)
        if column + len(text) <= total:
            line = line.ljust(column) + text
    return line


def _labels(schedule: Schedule) -> Callable[[Action], str]:
    """The labels of actions: without the stage if it equals the rank."""
    if schedule.rank_of == tuple(range(schedule.num_ranks)):
        return lambda action: f"{action.kind.value}{action.microbatch}"
    return str


def _kept(number: int, most: int | None) -> list[int | None]:
    """The indices of `number` items; if there are more than `most`, None stands for the middle."""
    if most is None or number <= most:
        return list(range(number))
    half = max(1, most // 2)
    return [*range(half), None, *range(max(half, number - half), number)]


def _left_out(
    num_ranks: int, ranks: Sequence[int | None], num_columns: int, columns: Sequence[int | None], noun: str
) -> list[str]:
    counts = [
        (num_ranks - len(ranks) + 1, "ranks", None in ranks),
        (num_columns - len(columns) + 1, noun, None in columns),
    ]
    parts = [f"{count:,} {noun}" for count, noun, cut in counts if cut]
    return [f"(... stands for {' and '.join(parts)})"] if parts else []


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns of their own widths."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
