"""This process as one rank of a run: of ours, told by `PARTITA_LINE`, of torchrun's, mpirun's or mlx.launch's, or alone.

A rank that our launcher started holds one end of a line (a socket) to it. There the rank tells that it lives, and why it
fails. When the line ends, the launcher is gone, killed perhaps, and the rank ends itself with all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from partita.errors import DistributedError
from partita.ranks import liveness

Engine = Literal["torch", "mlx"]

LINE = "PARTITA_LINE"
MAX_MESSAGE = 16_000
"""Characters of a failure that are sent to the launcher."""

_is_ours = False


def attach() -> None:
    """Take up the line to the launcher, where this process is a rank that it started."""
    global _is_ours
    text = os.environ.pop(LINE, None)
    if text is None:
        return
    _is_ours = True
    os.set_inheritable(int(text), False)
    _wake_with_line()
    liveness.attach(int(text), number())


def _wake_with_line() -> None:
    """On Linux the kernel wakes a rank that is stopped when its launcher dies, so that it can see that its line has ended."""
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGCONT)


def world() -> int | None:
    """Ranks of the run that this process is one of, or None without a launcher.

    Raises:
        DistributedError: The launcher's environment is not whole.
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
"""Where a launcher (torchrun and ours, mpirun, mlx.launch) says which rank this is, and of how many."""


def _hosts_of_mlx() -> str:
    """Ranks of a run of mlx.launch, which tells their number only with NCCL, and else lists the hosts."""
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
    """Whether this is the rank that speaks for the run."""
    return number() == 0


def name() -> str:
    """`rank 3` of several that a launcher started, once they have met; else nothing."""
    return f"rank {number()}" if _has_met_others() else ""


def speaks() -> bool:
    """Whether this rank shows its failure: before the ranks have met, the first of each machine speaks for all."""
    local = next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), "0")
    return _has_met_others() or local == "0"


_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MLX_RANK")


def _has_met_others() -> bool:
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return True
    groups: Any = sys.modules.get("partita.mlx.collectives.groups")
    return groups is not None and groups.has_met_others()


def is_ours() -> bool:
    """Whether our launcher started this rank, and shows what goes wrong with it."""
    return _is_ours


def report(failure: dict[str, Any]) -> None:
    """Tell the launcher, or the other ranks, of a failure."""
    liveness.tell_failure({**failure, "message": failure["message"][:MAX_MESSAGE], "time_s": time.monotonic()})


def leave(code: int) -> None:
    """End a rank that failed at once: closing its groups could wait for ranks that are gone. Does nothing without ranks."""
    if _is_ours or _has_met_others():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def work_together(work: Callable[[], int], engine: Engine = "torch", backend: str | None = None) -> int:
    """Meet the other ranks and do `work`. Its result, the exit code of the run, is returned on the first rank, and 0 on others.

    A non-zero code of another rank would look like that rank's own failure.

    Args:
        work: What each rank does.
        engine: By which it does it.
        backend: Of MLX; by default what the launcher has prepared.

    Raises:
        DistributedError: The launcher is one that MLX does not know.
    """
    if engine == "mlx":
        from partita.mlx.collectives.groups import init

        everyone = init(backend)
        if everyone.size != (world() or 1):
            raise DistributedError(
                f"the launcher started {world()} ranks, but MLX knows of {everyone.size}. Start them with mpirun or "
                "mlx.launch, or let `partita` do it."
            )
        code = _work(work)
        sys.stdout.flush()
        everyone.barrier()
        liveness.farewell()
        return code if is_first() else 0

    import torch.distributed as dist

    from partita.torch.collectives.groups import init_process_group

    init_process_group()
    code = _work(work)
    sys.stdout.flush()
    dist.barrier()
    liveness.farewell()
    dist.destroy_process_group()
    return code if is_first() else 0


def _work(work: Callable[[], int]) -> int:
    from partita.cli.messages import adopt_all

    adopt_all()
    with liveness.doing("working"):
        return work()
