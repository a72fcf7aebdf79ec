"""The reporters by name, as `--report-to` takes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from partita.errors import DependencyError, ModelError
from partita.training.reporting.jsonl import JsonLines
from partita.training.reporting.reporter import Reporter
from partita.training.reporting.tensorboard import TensorBoard
from partita.training.reporting.wandb import Wandb

REPORTERS = ("jsonl", "tensorboard", "wandb")

_NEEDS = {"tensorboard": ("tensorboardX", "report"), "wandb": ("wandb", "wandb")}
"""The module of a reporter, and the extra that installs it."""


def open_reporters(kinds: Sequence[str], folder: Path) -> list[Reporter]:
    """The reporters of `kinds`, each of `REPORTERS`, that write into a run's folder.

    Raises:
        ModelError: A kind is unknown.
        DependencyError: A kind needs a package that is not installed.
    """
    made: dict[str, type[JsonLines | TensorBoard | Wandb]] = {
        "jsonl": JsonLines, "tensorboard": TensorBoard, "wandb": Wandb,
    }  # fmt: skip
    for kind in kinds:
        check_reporter(kind)
    return [made[kind](folder) for kind in dict.fromkeys(kinds)]


def check_reporter(kind: str) -> None:
    """Raise an error if `kind` is unknown or its package is not installed."""
    if kind not in REPORTERS:
        raise ModelError(f"a reporter must be one of {', '.join(REPORTERS)}, but is {kind!r}.")
    if kind in _NEEDS:
        module, extra = _NEEDS[kind]
        if importlib.util.find_spec(module) is None:
            raise DependencyError(
                f"reporting to {kind} needs the package {module}, which is not installed. Install it with `pip install "
                f"{module}` or `pip install 'partita[{extra}]'`, or report to jsonl, which needs none."
            )
