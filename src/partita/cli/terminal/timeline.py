"""A measured step of a run beside the step simulated from its costs."""

from __future__ import annotations

import json
from pathlib import Path

from partita.cli.terminal.console import out
from partita.errors import ScheduleError
from partita.schedule import Timeline, chrome_trace, measured_costs, picture, simulate


def check_file(option: str, file: Path, *suffixes: str) -> None:
    """Raise an error before a run if a file could not be written after it."""
    if suffixes and file.suffix not in suffixes:
        raise ScheduleError(f"{option} must name a file that ends in {' or '.join(suffixes)}, but is {file}.")
    if file.is_dir():
        raise ScheduleError(f"{option} must name a file, but {file} is a folder.")
    if not file.resolve().parent.is_dir():
        raise ScheduleError(f"{option} {file} cannot be written: there is no folder {file.parent}. Create it first.")


def show_timeline(measured: Timeline, image: Path | None, trace: Path | None) -> None:
    """Print the measured and the simulated bubble, and write the picture and the trace if requested."""
    predicted = simulate(measured.schedule, measured_costs(measured))
    both = {"measured": measured, "predicted": predicted}
    if image is not None:
        picture(both, image, title="The last step")
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(both)), encoding="utf-8")
    for name, timeline in both.items():
        out().print(
            f"last step {name:9}  {timeline.makespan * 1e3:,.1f} ms, bubble {timeline.bubble_makespan:.1%} of the makespan, "
            f"{timeline.bubble_span:.1%} of the longest span",
            soft_wrap=True,
        )
