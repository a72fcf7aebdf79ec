"""Look up what Partita needs in its dependencies, and raise an error if the installed version lacks it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import re
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from partita.errors import DependencyError


def find(library: str, module: str, name: str, purpose: str) -> Any:
    """The object `name` of `module`, which the installed version of `library` must have.

    Args:
        library: The name of the distribution: `transformers`, `mlx-lm`.
        module: The module that defines the object.
        name: The name of the object.
        purpose: What Partita does with it, after "needs it to".

    Raises:
        DependencyError: The installed version has no such module or object.
        ModuleNotFoundError: The library is not installed, or lacks a library of its own.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}.") or "." not in error.name:
            raise
        raise lacking(library, f"no module {error.name}", purpose) from error
    except AttributeError as error:
        raise lacking(library, f"no {module}.{name}", purpose) from error


def lacking(library: str, what: str, purpose: str) -> DependencyError:
    """The error to raise if the installed `library` lacks what Partita needs.

    Args:
        library: The name of the distribution.
        what: What is missing, after "has".
        purpose: What Partita does with it, after "needs it to".
    """
    supported = supported_range(library)
    return DependencyError(
        f"the installed {library} ({metadata.version(library)}) has {what}, which Partita needs to {purpose}. Partita "
        f"supports {library}{supported}: install another version with `pip install '{library}{supported}'`, or upgrade Partita."
    )


def supported_range(library: str) -> str:
    """The versions of `library` that Partita's own requirements allow, such as `>=5.0,<5.25`."""
    for requirement in metadata.requires("partita") or ():
        matched = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)", requirement)
        if matched and _normal(matched[1]) == _normal(library):
            return ",".join(sorted(matched[2].strip(" ()").split(","), reverse=True))
    return ""


@contextlib.contextmanager
def reading_code(*, trusted: bool = True) -> Iterator[None]:
    """Lock the loading of a model's own code against this user's other processes; without `trusted`, do nothing.

    transformers copies it before it runs it, and the ranks of a machine would write the same copy at the same time.
    """
    if not trusted:
        yield
        return
    with (Path(tempfile.gettempdir()) / f"partita-code-{os.getuid()}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
