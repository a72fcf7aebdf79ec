"""What a caller of an MLX model can ask, over tensor ranks and stages: as the unsplit model answers."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from partita.mlx.load import shard
from partita.mlx.model.parts import main_output
from partita.mlx.proof.family import sample_inputs
from tests.mlx.compare import assert_equal
from tests.mlx.test_stage import whole
from tests.support.mlx_ranks import mlx_ranks

TOLERANCE = 2e-5


def _embeddings(split: Any, unsplit: Any, ids: mx.array) -> None:
    """Embeddings beside ids or alone, by name or by place, of another dtype, and with a cache."""
    embedded = unsplit.model.embed_tokens(ids) * 0.5
    expected = main_output(unsplit(ids, input_embeddings=embedded))
    assert_equal(split(ids, input_embeddings=embedded), expected, TOLERANCE, "by name")
    assert_equal(split(ids, None, embedded), expected, TOLERANCE, "by place")
    assert_equal(split(None, input_embeddings=embedded), expected, TOLERANCE, "alone")
    assert_equal(split(ids), main_output(unsplit(ids)), TOLERANCE, "ids again")
    narrow = embedded.astype(mx.float16)
    assert_equal(
        split(ids, input_embeddings=narrow), main_output(unsplit(ids, input_embeddings=narrow)), 2e-3, "narrow"
    )
    caches = make_prompt_cache(split), make_prompt_cache(unsplit)
    first = split(None, caches[0], embedded[:, :5])
    assert_equal(first, main_output(unsplit(ids[:, :5], caches[1], embedded[:, :5])), TOLERANCE, "cached")
    assert_equal(split(ids[:, 5:], caches[0]), main_output(unsplit(ids[:, 5:], caches[1])), TOLERANCE, "more")
    assert caches[0][0].offset == caches[1][0].offset == ids.shape[1]


def _mask(split: Any, unsplit: Any, ids: mx.array) -> None:
    """A mask, which comes before the cache."""
    length = ids.shape[1]
    mask = mx.tril(mx.ones((length, length), mx.bool_)) & (mx.arange(length) != 2)
    mask = mask | mx.eye(length, dtype=mx.bool_)
    expected = main_output(unsplit(ids, mask))
    assert_equal(split(ids, mask), expected, TOLERANCE, "by place")
    assert_equal(split(ids, mask=mask), expected, TOLERANCE, "by name")
    caches = make_prompt_cache(split), make_prompt_cache(unsplit)
    for start, stop in ((0, 5), (5, 6)):
        mine = split(ids[:, start:stop], None, caches[0])
        assert_equal(mine, main_output(unsplit(ids[:, start:stop], None, caches[1])), TOLERANCE, f"{start} to {stop}")


def _keyword(split: Any, unsplit: Any, ids: mx.array) -> None:
    """Ids by the family's own name."""
    assert_equal(split(x=ids), main_output(unsplit(x=ids)), TOLERANCE, "by name")


REQUESTS = {"embeddings": _embeddings, "mask": _mask, "keyword": _keyword}


def ask(family: str, where: dict[str, Any], request: str) -> None:
    unsplit = whole(family)
    split = shard(copy.deepcopy(unsplit), **where)
    REQUESTS[request](split, unsplit, sample_inputs(unsplit))


TP, PP, BEHIND = {"tp": 2}, {"pp": 2}, {"pp": 2, "layout": "EttttL|"}


@pytest.mark.parametrize("where", [TP, PP, BEHIND], ids=["tp", "pp", "behind"])
def test_embeddings_and_caches(where: dict[str, Any]) -> None:
    mlx_ranks(2).run(ask, "llama", where, "embeddings")


@pytest.mark.slow
@pytest.mark.parametrize("where", [TP, PP, {"pp": 2, "tp": 2}], ids=["tp", "pp", "both"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3_text", "gpt_oss"])
def test_embeddings_of_more_families(family: str, where: dict[str, Any]) -> None:
    mlx_ranks(2 if len(where) == 1 else 4).run(ask, family, where, "embeddings")
