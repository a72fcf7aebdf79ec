"""The number of this process's rank, as set by our launcher, torchrun, mpirun or mlx.launch, if any."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

from partita.errors import DistributedError

EngineName = Literal["torch", "mlx"]


def world() -> int | None:
    """The number of ranks of this process's run, or None without a launcher.

    Raises:
        DistributedError: The launcher's environment is incomplete.
    """
    name = next((name for name in _RANKS if name in os.environ), None)
    if name is None:
        return None
    text = os.environ.get(_RANKS[name], "") if name != "MLX_RANK" else _hosts_of_mlx()
    if not text.isdigit() or not os.environ[name].isdigit():
        raise DistributedError(
            f"{name} is set ({os.environ[name]!r}), so a launcher started this process, but {_RANKS[name]} is {text!r}. "
            f"Start it with torchrun, mpirun or mlx.launch, or unset {name}."
        )
    return int(text)


_RANKS = {
    "RANK": "WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "MLX_RANK": "MLX_WORLD_SIZE, or the length of MLX_HOSTFILE or MLX_IBV_DEVICES,",
}
"""The variables with the rank and the number of ranks: of torchrun and our launcher, mpirun, mlx.launch."""


LAUNCHER = "PARTITA_LAUNCHER"
"""The variable with the name of the launcher whose ranks were given torchrun's variables."""


def launcher() -> str:
    """The name of the launcher that started this rank: `torchrun`, `mpirun`, `mlx.launch`, `srun`, ...; else `the launcher`."""
    if LAUNCHER in os.environ:
        return os.environ[LAUNCHER]
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        return "mpirun"
    if "MLX_RANK" in os.environ:
        return "mlx.launch"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "the launcher"


def _hosts_of_mlx() -> str:
    """The number of ranks of mlx.launch, which sets it only with NCCL and otherwise lists the hosts."""
    if "MLX_WORLD_SIZE" in os.environ:
        return os.environ["MLX_WORLD_SIZE"]
    for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):
        with contextlib.suppress(OSError, ValueError):
            return str(len(json.loads(Path(os.environ.get(name, "")).read_text())))
    return ""


def number() -> int:
    """This process's rank; 0 without a launcher."""
    return int(next((os.environ[name] for name in _RANKS if name in os.environ), "0"))


def is_one_of_several() -> bool:
    """Whether a launcher started other ranks too."""
    return any(os.environ.get(name, "1") != "1" for name in _RANKS.values())


def is_first() -> bool:
    """Whether this is rank 0, which reports for the run."""
    return number() == 0


def name() -> str:
    """`rank 3` in a run with several ranks, once they are connected; else an empty text."""
    return f"rank {number()}" if has_met_others() else ""


def speaks() -> bool:
    """Whether this rank prints its failure: before the ranks are connected, only the first of each machine does."""
    local = next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), "0")
    return has_met_others() or local == "0"


_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MLX_RANK")


def has_met_others() -> bool:
    """Whether this process is connected to other ranks."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return True
    groups: Any = sys.modules.get("partita.mlx.collectives.groups")
    return groups is not None and groups.has_met_others()
