"""The times of a schedule's actions in some steps as a trace, for engines without a profiler of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from partita.checkpoint.durable import failing_as
from partita.schedule import Timeline, chrome_trace


@contextmanager
def actions_traced(file: Path) -> Iterator[Callable[[int, Timeline], None]]:
    """Write the timelines that the function receives, each with its step, as a trace of one process a step."""
    steps: dict[str, Timeline] = {}
    with failing_as(file, "cannot be written"):
        file.parent.mkdir(parents=True, exist_ok=True)
    yield lambda step, timeline: steps.update({f"step {step}": timeline})
    with failing_as(file, "cannot be written"):
        file.write_text(json.dumps(chrome_trace(steps)), encoding="utf-8")
