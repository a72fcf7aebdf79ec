"""Choose the engine of a command, and check that it is installed."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from typing import Annotated

import typer

from partita.errors import ModelError
from partita.ranks.backends import MLX_BACKENDS
from partita.ranks.environment import EngineName

RUN = "Ranks and engine"
"""The panel of these options in `--help`."""


class EngineChoice(StrEnum):
    """The engines."""

    torch = "torch"
    mlx = "mlx"


EngineOption = Annotated[
    EngineChoice | None,
    typer.Option(
        "--engine",
        help="Run on torch or mlx; both use the same plan (default: torch if it is installed).",
        show_default=False,
        rich_help_panel=RUN,
    ),
]


def _known_backend(name: str | None) -> str | None:
    known = sorted({"gloo", *MLX_BACKENDS})
    if name is not None and name not in known:
        raise typer.BadParameter(f"must be one of {', '.join(known)}, but is {name!r}.")
    return name


BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        callback=_known_backend,
        help="Communicate between the ranks of this machine by gloo or mpi (torch), mpi or ring (mlx).",
        show_default=False,
        rich_help_panel=RUN,
    ),
]

_NEEDS: dict[EngineName, tuple[str, ...]] = {"torch": ("torch", "transformers"), "mlx": ("mlx", "mlx_lm")}


def is_installed(name: EngineName) -> bool:
    """Whether the libraries of an engine are installed."""
    return all(find_spec(package) is not None for package in _NEEDS[name])


def choose_engine(wanted: EngineChoice | None) -> EngineName:
    """The engine to run on.

    Raises:
        ModelError: The engine is not installed, or no engine is.
    """
    names: tuple[EngineName, ...] = ("torch", "mlx") if wanted is None else (wanted.value,)
    for name in names:
        if is_installed(name):
            return name
    missing = next(package for package in _NEEDS[names[0]] if find_spec(package) is None)
    raise ModelError(
        f"the {names[0]} engine needs {missing}, which is not installed: pip install 'partita[{names[0]}]'"
        + (", or 'partita[mlx]' for --engine mlx" if wanted is None else "")
    )
