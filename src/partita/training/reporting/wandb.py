"""Weights & Biases. `WANDB_MODE=offline` keeps the run in the folder `wandb` until `wandb sync` sends it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.checkpoint.durable import failing_as
from partita.errors import ModelError
from partita.training.reporting.reporter import metrics_of

if TYPE_CHECKING:
    from partita.training.settings import StepReport

ID_NAME = "wandb-run-id"


class Wandb:
    """Reports to the project and entity that wandb's own environment names (`WANDB_PROJECT`, ...)."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Prepare to report; the identifier of the run is kept in `folder`, so that a resumed run continues it."""
        self.folder = Path(folder)
        self._run: Any = None

    def begin(self, done: int, facts: Mapping[str, Any]) -> None:
        """Start or continue the run.

        wandb ignores a step that it has already: a resumed run sends the steps after its checkpoint again, which are equal.

        Raises:
            ModelError: wandb cannot start, for example without a login.
        """
        import wandb

        file = self.folder / ID_NAME
        with failing_as(file, "cannot be written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            known = file.read_text().strip() if done and file.exists() else None
        try:
            self._run = wandb.init(
                id=known,
                resume="allow" if known else None,
                dir=str(self.folder),
                config=dict(facts),
                name=self.folder.name,
            )
        except (wandb.Error, OSError) as error:
            raise ModelError(
                f"wandb cannot start: {error}. Log in with `wandb login`, set WANDB_MODE=offline, or report to jsonl."
            ) from error
        with failing_as(file, "cannot be written"):
            file.write_text(f"{self._run.id}\n")

    def step(self, report: StepReport) -> None:
        """Send a step."""
        self._run.log(metrics_of(report), step=report.step)

    def close(self) -> None:
        """Wait until everything is sent."""
        if self._run is not None:
            self._run.finish()
