"""The serving loop on MLX: answers against each request alone, and what other servers of MLX models got wrong."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("mlx.core")

from partita.core.mesh import Mesh
from partita.errors import ModelError, PlanError
from partita.generation import Sampling, byte_tokenizer
from partita.mlx import serving_loop
from partita.serving import Event, ServeRequest, ServeSettings, Token
from tests.support.mlx_ranks import on_mlx
from tests.support.mlx_serving import alone, compare, split_model, unsplit_model
from tests.support.serving import VOCABULARY, Heard, served

SMALL = ServeSettings(max_sequences=5, prefill_chunk=7, cache_bytes=1 << 20, block_tokens=4)
FREE = {"use_generation_config": False, "ignore_eos": True}
GREEDY = Sampling(6, **FREE)
CHANGES: dict[str, dict[str, Any]] = {"deepseek_v3": {"num_key_value_heads": 4}}

FAMILIES = {
    "llama": True,
    "gemma3_text": True,  # windows of 6 tokens, in which mlx-lm's cache rotates
    "lfm2": False,  # attention beside convolutions
    "qwen3": True,
    "qwen2_moe": True,
    "deepseek_v3": True,
    "mamba": False,
    "recurrent_gemma": False,  # recurrent layers beside windows
    "qwen3_next": False,  # linear attention beside full attention
    "llama4": False,  # attention by chunks, whose cache is trimmed by each call
    "gpt2": True,
}
"""By family, whether the beginnings of earlier prompts are reused."""

FLOAT32 = {"qwen2_moe", "deepseek_v3", "qwen3_next", "llama4"}
"""Families with experts, which MLX computes in float32 at most on CPUs."""


def _dtype(family: str) -> str:
    return "float32" if family in FLOAT32 else "float64"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank(family: str) -> None:
    wrong, cached = compare(family, CHANGES.get(family, {}), {}, SMALL, 16, 1, _dtype(family))
    assert wrong == []
    assert (cached > 0) == FAMILIES[family]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("llama", {"tp": 2}), ("llama", {"pp": 2}), ("llama", {"dp": 2}), ("gemma3_text", {"tp": 2}),
        ("gemma3_text", {"pp": 2}), ("lfm2", {"pp": 2}), ("lfm2", {"tp": 2}), ("llama", {"tp": 2, "pp": 2}),
    ],
)  # fmt: skip
def test_ranks(family: str, where: dict[str, int]) -> None:
    for wrong, _ in on_mlx(Mesh(**where).size, compare, family, {}, where, SMALL, 12, 2):
        assert wrong == []


@pytest.mark.parametrize("where", [{}, pytest.param({"tp": 2}, marks=pytest.mark.slow)])
def test_quantized_weights(where: dict[str, int]) -> None:
    changes = {"intermediate_size": 64, "tie_word_embeddings": False}
    for wrong, _ in on_mlx(Mesh(**where).size, compare, "llama", changes, where, SMALL, 12, 2, "float32", 4):
        assert wrong == []


def _loop(family: str, dtype: str = "float32", **settings: Any) -> Any:
    model = split_model(unsplit_model(family, {}, dtype), {})
    return model, serving_loop(model, ServeSettings(**{"block_tokens": 4, **settings}), tokenizer=byte_tokenizer())


PROMPTS = [tuple((7 * i + 3 * n) % VOCABULARY for i in range(4 + 3 * n)) for n in range(6)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_others_do_not_change_a_bit(dtype: str) -> None:
    """mlx-lm#965 and vllm-mlx#385: text of other clients in an answer."""
    found: list[dict[int, Any]] = []
    for chosen in ([0, 1, 2, 3, 4, 5], [3]):
        _, loop = _loop("llama", dtype, keep_prefixes=False)
        requests = [
            ServeRequest(i, PROMPTS[i], Sampling(6, temperature=1.0, seed=i, **FREE), logprobs=True) for i in chosen
        ]
        heard = served(loop, requests, pause_s=0)
        found.append({i: [(e.token, e.logprob) for e in heard[i].events if isinstance(e, Token)] for i in chosen})
    assert found[0][3] == found[1][3]
    assert len({tuple(tokens) for tokens in found[0].values()}) == 6


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_conversation_that_grows_past_its_windows(family: str) -> None:
    """mlx-lm#983: a reused prefix of layers whose cache rotates."""
    model, loop = _loop(family, "float64", max_sequences=1, prefill_chunk=5)
    text = PROMPTS[5]
    answers = []
    for turn in range(4):
        text = (*text, *((turn + 5 * i) % VOCABULARY for i in range(5)))
        answers.append(ServeRequest(turn, text, GREEDY))
    heard = served(loop, answers, pause_s=0)
    assert [heard[turn].finished.cached_tokens for turn in range(4)] == [0, 24, 28, 32]
    for request in answers:
        assert heard[request.id].tokens == alone(model, request.prompt, GREEDY)[0]


def test_a_running_text_shares_its_prompt() -> None:
    model, loop = _loop("llama", "float64")
    heard = {number: Heard() for number in range(2)}

    def then_submit(event: Event) -> None:
        heard[0](event)
        if len(heard[0].events) == 1:
            loop.inbox.submit(ServeRequest(1, (*PROMPTS[4], 5), GREEDY), heard[1])
            loop.inbox.shutdown()

    loop.inbox.submit(ServeRequest(0, PROMPTS[4], Sampling(12, **FREE)), then_submit)
    loop.run()
    assert heard[1].finished.cached_tokens == 16
    assert heard[0].tokens == alone(model, PROMPTS[4], Sampling(12, **FREE))[0]
    assert heard[1].tokens == alone(model, (*PROMPTS[4], 5), GREEDY)[0]


def _cancelled(where: dict[str, int]) -> list[tuple[int, str, tuple[int, ...]]]:
    unsplit = unsplit_model("llama", {}, "float64")
    loop = serving_loop(split_model(unsplit, where), SMALL, tokenizer=byte_tokenizer())
    requests = [ServeRequest(i, PROMPTS[i], Sampling(30 if i < 3 else 6, **FREE)) for i in range(6)]
    heard = served(loop, requests, pause_s=0, cancelled=(0, 1, 2))
    return [(i, one.finished.reason, one.tokens) for i, one in heard.items()] if loop.rows.decides else []


def test_requests_at_once_and_cancelled_ones() -> None:
    """mlx-lm#1737: two requests at once ended both ranks. exo#1498: one rank cancelled, the other waited in a collective."""
    (found,) = [rows for rows in on_mlx(2, _cancelled, {"tp": 2}) if rows]
    model = split_model(unsplit_model("llama", {}, "float64"), {})
    for number, reason, tokens in found:
        expected = alone(model, PROMPTS[number], Sampling(30, **FREE))[0]
        assert reason == ("cancelled" if number < 3 else "length")
        assert len(tokens) < 30
        assert tokens == expected[: len(tokens)]


def test_a_text_beyond_a_window_that_mlx_lm_ignores_is_refused() -> None:
    model = split_model(unsplit_model("mistral", {"sliding_window": 8}, "float32"), {})
    loop = serving_loop(model, ServeSettings(block_tokens=4), tokenizer=byte_tokenizer())
    with pytest.raises(ModelError, match="without its sliding window of 8 tokens"):
        loop.inbox.submit(ServeRequest(0, PROMPTS[0], Sampling(9, **FREE)), Heard())


def test_a_full_cache_and_requests_that_never_fit() -> None:
    _, loop = _loop("llama", cache_bytes=5 * 4 * 2 * 4 * 2 * 16 * 4)
    assert loop.rows.layout.num_blocks == 5
    with pytest.raises(PlanError, match="needs 6 cache blocks, but the cache has 5 blocks of 4 tokens"):
        loop.inbox.submit(ServeRequest(0, tuple(range(15)), Sampling(9, **FREE)), Heard())
    heard = served(loop, [ServeRequest(i, tuple(range(i, i + 9)), Sampling(4, **FREE)) for i in range(8)], pause_s=0)
    assert all(one.finished.reason == "length" and len(one.tokens) == 4 for one in heard.values())
    assert loop.inbox.stats().blocks_used == 0
