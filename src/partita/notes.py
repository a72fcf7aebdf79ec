"""Notes to the user that are not errors, such as a checkpoint that disagrees with its config."""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("partita")


def note(text: str) -> None:
    """Log one line to the logger `partita`, which prints to stderr unless configured otherwise. Call it on one rank only."""
    _LOGGER.warning(text)
