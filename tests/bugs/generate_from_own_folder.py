"""`python -m tests.bugs.generate_from_own_folder FOLDER ...`: `partita generate FOLDER/rank<N> ...` on rank N."""

from __future__ import annotations

import sys
from pathlib import Path

from partita.cli.app import app
from partita.ranks import environment, rank_process

if __name__ == "__main__":
    rank_process.attach()
    folder, *options = sys.argv[1:]
    app(["generate", str(Path(folder) / f"rank{environment.number()}"), *options], prog_name="partita")
