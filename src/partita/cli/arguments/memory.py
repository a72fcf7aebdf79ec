"""The option `--zero`: what replicas share."""

from __future__ import annotations

from partita.errors import ModelError
from partita.training.settings import ZERO_LEVELS


def zero_level(given: str | None) -> bool | int:
    """`TrainSettings.zero` from the option: False for 0 and True for 1, as checkpoints have them."""
    if given not in (None, *map(str, ZERO_LEVELS)):
        raise ModelError(f"--zero must be 0, 1, 2 or 3, but is {given!r}.")
    level = int(given or 0)
    return bool(level) if level < 2 else level
