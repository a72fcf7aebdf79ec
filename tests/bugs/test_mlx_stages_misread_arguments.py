"""An MLX model over stages took its arguments by fixed names and places: a mask before the cache was taken for the cache."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mlx.test_requests import PP, TP, ask
from tests.support.mlx_ranks import mlx_ranks


@pytest.mark.parametrize("where", [TP, PP], ids=["tp", "pp"])
@pytest.mark.parametrize(("family", "request_"), [("minicpm3", "mask"), ("stablelm", "keyword")])
def test_arguments_of_other_names_and_orders(family: str, request_: str, where: dict[str, Any]) -> None:
    mlx_ranks(2).run(ask, family, where, request_)
