"""Lines for the user that are no errors: where a checkpoint and its config disagree, and what follows from it."""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("partita")


def note(text: str) -> None:
    """Write one line to the logger `partita`, which without any setting shows it on stderr; call it on one rank only."""
    _LOGGER.warning(text)
