"""`python -m tests.cli.launcher PROGRAM RANKS`: a launcher process that tests can signal."""

from __future__ import annotations

import os
import sys

from partita.cli import launch
from partita.ranks import launcher

PROGRAM = ("-m", "tests.cli.programs")

if __name__ == "__main__":
    assert "torch" not in sys.modules
    launcher.GRACE_S = float(os.environ.get("GRACE_S", launcher.GRACE_S))
    sys.exit(launch.show_outcome(launch.start([sys.argv[1]], int(sys.argv[2]), program=PROGRAM)))
