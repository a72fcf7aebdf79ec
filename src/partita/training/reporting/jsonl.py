"""`metrics.jsonl`: one JSON object a step, each a line that is flushed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from partita.checkpoint.durable import failing_as, write_whole
from partita.training.reporting.reporter import metrics_of

if TYPE_CHECKING:
    from partita.training.settings import StepReport

NAME = "metrics.jsonl"


class JsonLines:
    """Writes `metrics.jsonl` into a folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Prepare to write into `folder`, which is created by `begin`."""
        self.file = Path(folder) / NAME
        self._lines: IO[str] | None = None

    def begin(self, done: int, facts: Mapping[str, Any]) -> None:
        """Open the file, and remove lines of later steps and an incomplete last line. Raises CheckpointError."""
        with failing_as(self.file, "cannot be written"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.exists():
                lines = self.file.read_text("utf-8").splitlines(keepends=True)
                kept = [line for line in lines if done and _step_of(line) <= done]
                if kept != lines:
                    write_whole(self.file, "".join(kept).encode())
            self._lines = self.file.open("a", encoding="utf-8")

    def step(self, report: StepReport) -> None:
        """Append a line. Raises CheckpointError."""
        assert self._lines is not None
        with failing_as(self.file, "cannot be written"):
            self._lines.write(json.dumps({"step": report.step, **metrics_of(report)}) + "\n")
            self._lines.flush()

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()


def _step_of(line: str) -> float:
    """The step of a line; infinite for an incomplete one."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
