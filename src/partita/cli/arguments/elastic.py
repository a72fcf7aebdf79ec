"""What torchrun's restarts ask of a run: that it goes on from its last checkpoint by itself, with the ranks that there are.

torchrun starts all ranks anew when one has failed (`--max-restarts`), and when nodes leave or come (`--nnodes 1:4`).
"""

from __future__ import annotations

import os
from pathlib import Path

from partita.checkpoint.run_folder import RunFolder
from partita.cli.arguments.resume import newest_state
from partita.cli.terminal.console import err, plural
from partita.core.mesh import Mesh
from partita.ranks import environment

UNNAMED = "none"
"""What torchrun calls a run that was given no name."""


def run_id() -> str | None:
    """The name of torchrun's run (`--rdzv-id`), by which ranks know that it is they who were started anew; None without."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", UNNAMED)
    return None if name == UNNAMED else name


def goes_on(folder: Path | None) -> bool:
    """Whether torchrun has started this run anew, and it has a checkpoint in `folder` to go on from.

    After a failure torchrun counts; when nodes come or leave it does not, and its name must be that of the checkpoint's run.
    """
    if folder is None or not RunFolder(folder).steps():
        return False
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return True
    return run_id() is not None and newest_state(folder)[1].notes.get("run_id") == run_id()


def fitted(mesh: Mesh) -> Mesh:
    """`mesh` with as many replicas as there are ranks for, where these are whole ones; else as it is, to be refused."""
    ranks, per_replica = environment.world(), mesh.pp * mesh.tp
    if ranks is None or ranks == mesh.size or ranks % per_replica:
        return mesh
    found = Mesh(dp=ranks // per_replica, pp=mesh.pp, tp=mesh.tp)
    if environment.is_first():
        err().print(f"torchrun has started {plural(ranks, 'rank')}: going on with --dp {found.dp}", style="dim")
    return found
