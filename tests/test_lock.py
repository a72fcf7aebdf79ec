from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("torch", "mlx", "mpi", "lora", "serve", "dev")
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if re.match(r"\w", line)]


def _locked() -> dict[str, str]:
    """The versions that the lock gives this interpreter and platform."""
    here = [row for row in LOCK if row.marker is None or row.marker.evaluate()]
    return {canonicalize_name(row.name): next(iter(row.specifier)).version for row in here}


def _dependencies(name: str, extras: tuple[str, ...], seen: dict[str, str]) -> dict[str, str]:
    """Everything installed that `name` needs, with its version."""
    for row in map(Requirement, metadata.requires(name) or ()):
        needed = row.marker is None or any(row.marker.evaluate({"extra": extra}) for extra in extras)
        key = canonicalize_name(row.name)
        if needed and key not in seen:
            seen[key] = metadata.version(key).partition("+")[0]  # torch's CPU build is the same release
            _dependencies(key, ("", *row.extras), seen)
    return seen


def test_what_is_installed_is_what_is_locked() -> None:
    installed = _dependencies("partita", ("", *EXTRAS), {})
    assert {"torch", "mlx-cpu" if sys.platform == "linux" else "mlx", "transformers", "pip", "uv"} <= installed.keys()
    locked = _locked()
    assert installed == {name: locked.get(name) for name in installed}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(("platform", "system"), [("linux", "Linux"), ("darwin", "Darwin")])
def test_the_lock_has_one_version_of_a_package_for_each_python_and_platform(
    python: str, platform: str, system: str
) -> None:
    there = {
        **default_environment(), "python_version": python, "python_full_version": f"{python}.1",
        "sys_platform": platform, "platform_system": system,
    }  # fmt: skip
    names = [row.name for row in LOCK if row.marker is None or row.marker.evaluate(there)]
    assert len(names) == len(set(names))
    assert {"torch", "transformers", "mlx", "mlx-lm", "peft", "numpy"} <= set(names)


def test_the_lock_allows_what_pyproject_asks_for() -> None:
    locked = _locked()
    for row in map(Requirement, metadata.requires("partita") or ()):
        if row.marker is None or any(row.marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS, "docs", "bench")):
            assert row.specifier.contains(locked[canonicalize_name(row.name)]), f"{row}: run `make lock`"


def test_the_lock_names_no_place_to_download_from() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "--" not in text
