from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.served import Served, save_model, serving


@pytest.fixture(scope="session", autouse=True)
def _close_mlx_ranks() -> Iterator[None]:
    yield
    if find_spec("mlx"):
        from tests.support.mlx_ranks import close_mlx_ranks

        close_mlx_ranks()


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="package")
def served(folder: Path) -> Iterator[Served]:
    with serving(folder) as one:
        yield one
