from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("mlx.core")


@pytest.fixture(scope="session", autouse=True)
def _close_ranks() -> Iterator[None]:
    from tests.support.mlx_ranks import close_mlx_ranks

    yield
    close_mlx_ranks()
