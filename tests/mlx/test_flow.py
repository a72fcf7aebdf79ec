"""Generating over pipeline stages: the tokens of the unsplit model, on every rank, however many prompts are under way."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from partita.core.plan import Plan
from partita.errors import ModelError
from partita.generation import Sampling, byte_tokenizer
from partita.mlx.generate import generate
from partita.mlx.load import shard
from partita.mlx.model.mlx_lm_models import spec_of
from partita.mlx.stages import batches, flow
from tests.mlx.test_stage import whole
from tests.support.mlx_ranks import BACKENDS, mlx_ranks

PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11],
    [1, 2, 3],
    [3, 1, 4, 1, 5, 9, 2],
    [2, 7, 1],
    [9, 9, 9],
    [8, 6, 4],
    [4, 4, 2, 2, 1, 1, 7],
]


def unsplit(family: str, steps: int) -> list[tuple[int, ...]]:
    """Greedy tokens, a prompt at a time."""
    model = whole(family)
    found = []
    for prompt in PROMPTS:
        cache, ids, tokens = make_prompt_cache(model), mx.array([prompt]), []
        for _ in range(steps):
            tokens.append(int(mx.argmax(model(ids, cache=cache)[0, -1]).item()))
            ids = mx.array([tokens[-1:]])
        found.append(tuple(tokens))
    return found


def tokens_of(
    family: str, mesh: tuple[int, int, int], layout: str | None, count: int, sampling: Sampling, chunk: int = 2048
) -> list[Any]:
    batches.PREFILL_TOKENS = flow.PREFILL_TOKENS = chunk
    dp, pp, tp = mesh
    model = shard(whole(family), dp=dp, pp=pp, tp=tp, layout=layout)
    made = generate(model, PROMPTS[:count], sampling)
    return [(one.tokens, one.finish_reason) for one in made]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_two_stages_generate_the_unsplit_tokens(family: str, backend: str) -> None:
    ranks = mlx_ranks(2, backend).run(tokens_of, family, (1, 2, 1), None, 7, Sampling(max_new_tokens=6))
    assert ranks[0] == ranks[1]
    assert [tokens for tokens, _ in ranks[0]] == unsplit(family, 6)


@pytest.mark.parametrize(
    ("size", "mesh", "layout", "count"),
    [
        (2, (1, 2, 1), None, 1),
        (3, (1, 3, 1), None, 7),
        (3, (1, 3, 1), None, 2),
        (3, (1, 3, 1), "E|ttttL|", 7),
        (4, (1, 2, 2), "Et|tttL", 7),
        (4, (2, 2, 1), None, 7),
        (2, (1, 2, 1), "Et|t|t|tL", 7),
    ],
)
def test_any_layout_generates_the_unsplit_tokens(
    size: int, mesh: tuple[int, int, int], layout: str | None, count: int
) -> None:
    ranks = mlx_ranks(size).run(tokens_of, "llama", mesh, layout, count, Sampling(max_new_tokens=5))
    assert all(rank == ranks[0] for rank in ranks)
    assert [tokens for tokens, _ in ranks[0]] == unsplit("llama", 5)[:count]


def test_a_prompt_in_parts() -> None:
    ranks = mlx_ranks(3).run(tokens_of, "gemma3_text", (1, 3, 1), None, 7, Sampling(max_new_tokens=5), 2)
    assert all(rank == ranks[0] for rank in ranks)
    assert [tokens for tokens, _ in ranks[0]] == unsplit("gemma3_text", 5)


def test_drawn_tokens_do_not_depend_on_the_stages() -> None:
    sampling = Sampling(max_new_tokens=6, temperature=0.8, top_k=20, seed=3)
    stages = mlx_ranks(2).run(tokens_of, "llama", (1, 2, 1), None, 7, sampling)
    assert stages[0] == stages[1]
    assert stages[0] == tokens_of("llama", (1, 1, 1), None, 7, sampling)


def ending(pp: int) -> list[Any]:
    """Prompts of one length of which some end early, others later."""
    model = shard(whole("llama", eos_token_id=0), pp=pp)
    prompts = [[1, 2, 3], [2, 7, 1], [9, 9, 9], [8, 6, 4]]
    free = generate(model, prompts, Sampling(max_new_tokens=8))
    end = free[1].tokens[2]
    plan = model.partita_plan
    model.partita_plan = Plan.make(spec_of_ending(end), plan.mesh, plan.layout, plan.rules)
    return [(one.tokens, one.finish_reason) for one in generate(model, prompts, Sampling(max_new_tokens=8))]


def spec_of_ending(end: int) -> Any:
    return spec_of(whole("llama"), {"model_type": "llama", "eos_token_id": end})


def test_sequences_end_at_their_end_token_on_every_rank() -> None:
    first, second = mlx_ranks(2).run(ending, 2)
    assert first == second == ending(1)
    assert "eos" in {reason for _, reason in first}


def streamed() -> dict[int, str]:
    model = shard(whole("llama", vocab_size=257), pp=2)
    told: dict[int, str] = {}
    made = generate(
        model,
        [[72, 105], [72, 111], [33]],
        Sampling(max_new_tokens=6),
        tokenizer=byte_tokenizer(),
        on_text=lambda place, text: told.update({place: told.get(place, "") + text}),
    )
    assert not told or told == {place: one.text for place, one in enumerate(made) if one.text}
    return told


def test_text_streams_on_the_first_rank() -> None:
    first, second = mlx_ranks(2).run(streamed)
    assert first
    assert not second


def undecodable() -> None:
    model = shard(whole("deepseek_v41"), pp=2)
    with pytest.raises(ModelError, match="deepseek_v41 cannot generate with pipeline stages: token 7 differs"):
        generate(model, [[1, 2]], Sampling(max_new_tokens=2))


def test_a_family_whose_cache_does_not_follow_is_refused() -> None:
    mlx_ranks(2).run(undecodable)
