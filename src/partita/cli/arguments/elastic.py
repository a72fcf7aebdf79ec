"""After a restart by torchrun, a run resumes its last checkpoint automatically, with the ranks that are left.

torchrun restarts all ranks when one has failed (`--max-restarts`), and when nodes leave or join (`--nnodes 1:4`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from partita.checkpoint.run_folder import RunFolder
from partita.cli.arguments.resume import newest_state
from partita.cli.terminal.console import err, plural
from partita.core.mesh import Mesh
from partita.ranks import environment

UNNAMED = "none"
"""The name that torchrun gives to a run without `--rdzv-id`."""


def run_id() -> str | None:
    """The name of torchrun's run (`--rdzv-id`), by which restarted ranks recognize their run; None if it has none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", UNNAMED)
    return None if name == UNNAMED else name


def resumes(folder: Path | None) -> bool:
    """Whether torchrun or Slurm has restarted this run, and `folder` has a checkpoint to resume from.

    torchrun counts restarts after failures, Slurm those of a requeued job. torchrun does not count when nodes join or leave;
    then its name must be that of the saved run.
    """
    if folder is None or not RunFolder(folder).steps():
        return False
    if any(os.environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")):
        return True
    return run_id() is not None and newest_state(folder)[1].notes.get("run_id") == run_id()


def fitted(mesh: Mesh) -> Mesh:
    """`mesh` with as many replicas as the ranks suffice for; unchanged if ranks would be left over, which is an error later."""
    ranks, per_replica = environment.world(), mesh.pp * mesh.cp * mesh.tp
    if ranks is None or ranks == mesh.size or ranks % per_replica:
        return mesh
    found = replace(mesh, dp=ranks // per_replica)
    if environment.is_first():
        err().print(
            f"{environment.launcher()} has started {plural(ranks, 'rank')}: resuming with --dp {found.dp}", style="dim"
        )
    return found
