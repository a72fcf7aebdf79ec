"""`python -m tests.mlx.launcher BACKEND PROGRAM RANKS`: a launcher process that tests can signal."""

from __future__ import annotations

import sys

from partita.cli import launch

PROGRAM = ("-m", "tests.mlx.programs")

if __name__ == "__main__":
    assert not {"torch", "mlx"} & set(sys.modules)
    sys.exit(launch.show_outcome(launch.start([sys.argv[2]], int(sys.argv[3]), program=PROGRAM, backend=sys.argv[1])))
