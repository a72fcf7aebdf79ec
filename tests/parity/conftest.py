"""Both engines are compared here by hand, so loading need not compare them too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from partita.mlx.proof.reference import unchecked


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    with unchecked():
        yield
