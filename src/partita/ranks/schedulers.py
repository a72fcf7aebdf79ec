"""Runs that srun, an MPI other than Open MPI, or an indexed job of Kubernetes started, told in torchrun's variables."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from partita.errors import DistributedError
from partita.ranks.environment import LAUNCHER

PORT = 29500
"""The port of rank 0 under Kubernetes, unless MASTER_PORT is set; it is torchrun's."""

_PORTS = range(20_000, 40_000)
"""Ports that are derived from a job's number: below the ports that Linux gives to outgoing connections."""

_KNOWN = ("RANK", "OMPI_COMM_WORLD_RANK", "MLX_RANK")


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where such a launcher is recognised.

    Does nothing under torchrun, Open MPI's mpirun and mlx.launch, in a Slurm batch script outside of srun, and for one task.

    Raises:
        DistributedError: The launcher started several processes, but does not tell how they find each other.
    """
    if any(name in environment for name in _KNOWN):
        return
    for launcher, read in (("srun", _of_slurm), ("mpiexec", _of_pmi), ("Kubernetes", _of_kubernetes)):
        found = read(environment)
        if found is not None:
            found[LAUNCHER] = launcher
            environment.update({**found, **{name: environment[name] for name in found if name in environment}})
            return


def _of_slurm(environment: MutableMapping[str, str]) -> dict[str, str] | None:
    """What srun tells each task of a step. A batch script outside of srun has no SLURM_STEP_NUM_TASKS."""
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1" or "SLURM_PROCID" not in environment:
        return None
    nodes = _need(environment, "srun", "SLURM_STEP_NODELIST")
    number, step = int(_need(environment, "srun", "SLURM_JOB_ID")), int(environment.get("SLURM_STEP_ID", "0"))
    per_node = _tasks_per_node(_need(environment, "srun", "SLURM_STEP_TASKS_PER_NODE"))
    return {
        "RANK": environment["SLURM_PROCID"], "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": _need(environment, "srun", "SLURM_LOCALID"),
        "LOCAL_WORLD_SIZE": str(per_node[int(environment.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": "127.0.0.1" if len(per_node) == 1 else first_host(nodes),
        "MASTER_PORT": str(_PORTS[(number * 31 + step) % len(_PORTS)]),
    }  # fmt: skip


def _of_pmi(environment: MutableMapping[str, str]) -> dict[str, str] | None:
    """What MPICH and Intel MPI tell each process."""
    if environment.get("PMI_SIZE", "1") == "1" or "PMI_RANK" not in environment:
        return None
    size, local = environment["PMI_SIZE"], environment.get("MPI_LOCALNRANKS", "")
    if local != size and "MASTER_ADDR" not in environment:
        raise DistributedError(
            f"an MPI started {size} processes on several hosts (PMI_SIZE), but MASTER_ADDR (the host of rank 0) is not set. "
            "Set it and MASTER_PORT, or start the ranks with torchrun or Open MPI's mpirun."
        )
    return {
        "RANK": environment["PMI_RANK"], "WORLD_SIZE": size, "LOCAL_RANK": environment.get("MPI_LOCALRANKID", "0"),
        "LOCAL_WORLD_SIZE": local or "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_PORTS[os.getppid() % len(_PORTS)]),  # the ranks of one host have one parent
    }  # fmt: skip


def _of_kubernetes(environment: MutableMapping[str, str]) -> dict[str, str] | None:
    """One rank for each pod of an indexed job, whose manifest sets WORLD_SIZE and MASTER_ADDR."""
    given = [name for name in ("WORLD_SIZE", "MASTER_ADDR") if name in environment]
    if "JOB_COMPLETION_INDEX" not in environment or not given or environment.get("WORLD_SIZE") == "1":
        return None
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        _need(environment, "an indexed job of Kubernetes", name)
    return {
        "RANK": environment["JOB_COMPLETION_INDEX"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(PORT),
    }  # fmt: skip


def _need(environment: MutableMapping[str, str], launcher: str, name: str) -> str:
    value = environment.get(name)
    if not value:
        raise DistributedError(
            f"{launcher} started this process as one of several, but {name} is not set, so the ranks cannot find each other. "
            f"Set {name}, or start the ranks with torchrun."
        )
    return value


def first_host(nodes: str) -> str:
    """The first host of Slurm's list: `gpu[07-09,12],login` is `gpu07`."""
    match = re.match(r"([^,\[]*)(?:\[([^,\]-]+)[^\]]*\]([^,]*))?", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts
