"""A rank without layers returned no cache, so that a caller's loop that asks the cache for its length failed there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partita.torch.transformers_internals import cache_argument, cache_of
from tests.support.ranks import ranks
from tests.torch.test_requests import EMPTY, IDS, LAST, pair


def _decoded(where: dict[str, Any]) -> tuple[list[list[int]], list[int]]:
    """The most likely ids by both models, each from its own cache, and the lengths of the split model's cache."""
    tokens: list[list[int]] = []
    lengths: list[int] = []
    for model in pair("llama-7-heads-1-kv", where):
        ids, cache, chosen, lengths = IDS[:1, :3], None, [], []
        for _ in range(4):
            with torch.no_grad():
                output = model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
            cache, ids = cache_of(output), output.logits[:, -1:].argmax(-1)
            lengths.append(cache.get_seq_length())
            chosen.append(int(ids))
        tokens.append(chosen)
    return tokens, lengths


@pytest.mark.parametrize("where", [EMPTY, LAST], ids=["between", "last"])
def test_every_rank_returns_a_cache_that_counts(where: dict[str, Any]) -> None:
    for (expected, found), lengths in ranks(where["pp"]).run(_decoded, where):
        assert found == expected
        assert lengths == [3, 4, 5, 6]
