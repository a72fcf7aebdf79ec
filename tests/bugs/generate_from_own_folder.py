"""`python -m tests.bugs.generate_from_own_folder FOLDER ...`: `partita generate FOLDER/rank<N> ...` on rank N."""

from __future__ import annotations

import sys
from pathlib import Path

from partita.cli import rank
from partita.cli.app import app

if __name__ == "__main__":
    rank.attach()
    folder, *options = sys.argv[1:]
    app(["generate", str(Path(folder) / f"rank{rank.number()}"), *options], prog_name="partita")
