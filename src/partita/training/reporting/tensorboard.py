"""TensorBoard event files in a run's folder, written by tensorboardX, which needs neither torch nor TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.checkpoint.durable import failing_as
from partita.training.reporting.reporter import metrics_of

if TYPE_CHECKING:
    from partita.training.settings import StepReport

NAME = "tensorboard"


class TensorBoard:
    """Writes event files into the folder `tensorboard` of a run."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Prepare to write into `folder / "tensorboard"`, which `begin` creates."""
        self.folder = Path(folder) / NAME
        self._writer: Any = None

    def begin(self, done: int, facts: Mapping[str, Any]) -> None:
        """Open a new event file. TensorBoard drops what earlier files have of later steps than `done`."""
        from tensorboardX import SummaryWriter

        with failing_as(self.folder, "cannot be written"):
            has_files = self.folder.exists() and any(self.folder.iterdir())
            # Files are named by the second, and a run may resume within one.
            self._writer = SummaryWriter(
                str(self.folder), purge_step=done + 1 if has_files else None, filename_suffix=f".{done}"
            )

    def step(self, report: StepReport) -> None:
        """Write the scalars of a step, and flush them."""
        with failing_as(self.folder, "cannot be written"):
            for name, value in metrics_of(report).items():
                self._writer.add_scalar(name, value, report.step)
            self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
