"""The folder in which Partita keeps, for this user and machine, what it can compute again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$PARTITA_CACHE`, else `partita` in `$XDG_CACHE_HOME`, else `~/.cache/partita`. It may not exist yet."""
    if own := os.environ.get("PARTITA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "partita"
