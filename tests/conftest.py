from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ranks import close_all


@pytest.fixture(scope="session", autouse=True)
def _close_ranks() -> Iterator[None]:
    yield
    close_all()
