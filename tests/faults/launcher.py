"""`python -m tests.faults.launcher BACKEND RANKS ENGINE WORK FOLDER`: our launcher, for ranks that tests break."""

from __future__ import annotations

import sys

from partita.cli import launch

if __name__ == "__main__":
    backend, ranks, *work = sys.argv[1:]
    sys.exit(
        launch.show_outcome(launch.start(work, int(ranks), program=("-m", "tests.faults.programs"), backend=backend))
    )
