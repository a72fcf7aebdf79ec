"""Generating on MLX: the same tokens on every rank and every layout, and those of transformers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from partita.core.mesh import Mesh
from partita.core.sharding.split import Split
from partita.errors import ModelError, PlanError
from partita.generation import Sampling, Sequence, byte_tokenizer
from partita.generation.choice import Choice
from partita.mlx.collectives.groups import single_groups
from partita.mlx.collectives.threads import run_as_threads
from partita.mlx.generate import generate
from partita.mlx.load import shard
from partita.mlx.model.head import local_logits, most_likely
from partita.mlx.model.mlx_lm_models import build
from partita.mlx.proof.family import fill, plan_of_model
from partita.mlx.split.apply import apply_plan, finish
from partita.mlx.stages.batches import PREFILL_TOKENS
from tests.support.mlx_models import tiny_config
from tests.support.mlx_ranks import mlx_ranks

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12]]
GREEDY = Sampling(max_new_tokens=8, ignore_eos=True)
DRAWN = Sampling(
    max_new_tokens=8, temperature=1.0, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=5, ignore_eos=True
)
FAMILIES = {
    "llama": {"hidden_size": 112, "num_attention_heads": 14},
    # Attention and MLP side by side: two sums that do not wait for each other.
    "cohere": {"hidden_size": 112, "num_attention_heads": 14},
    "gpt_neox": {"hidden_size": 56, "num_attention_heads": 7},
    "gemma3_text": {},
    "gpt2": {},
    "deepseek_v3": {"num_key_value_heads": 4},
    "qwen3_next": {},
    "mamba2": {},
}


def _model(family: str, tp: int, dtype: mx.Dtype = mx.float32, **changes: Any) -> Any:
    mx.random.seed(2)
    config = {**tiny_config(family), **FAMILIES.get(family, {}), **changes}
    model = fill(build(config), dtype)
    return shard(model, tp=tp, **({"groups": single_groups()} if tp == 1 else {}))


def _tokens(families: list[str], tp: int, sampling: Sampling) -> list[list[list[int]]]:
    return [[list(g.tokens) for g in generate(_model(f, tp), PROMPTS, sampling)] for f in families]


@pytest.mark.parametrize("sampling", [GREEDY, replace(GREEDY, repetition_penalty=1.3), DRAWN])
def test_every_rank_and_layout_generates_the_same_tokens(sampling: Sampling) -> None:
    families = list(FAMILIES)
    # A rank of a pool, since one thread more or less in the sums may change a last bit.
    expected = mlx_ranks(2).run(_tokens, families, 1, sampling)[0]
    for tp in (2, 3):
        for found in mlx_ranks(tp).run(_tokens, families, tp, sampling):
            assert dict(zip(families, found, strict=True)) == dict(zip(families, expected, strict=True))
    assert len({tuple(tokens) for model in expected for tokens in model}) > len(families)


def test_prompts_do_not_change_each_other() -> None:
    model = _model("llama", 1)
    together = generate(model, PROMPTS, DRAWN)
    assert together[0] == generate(model, PROMPTS[:1], DRAWN)[0]
    assert [len(g.tokens) for g in together] == [8] * 4
    assert {g.finish_reason for g in together} == {"length"}
    # Same prompt, another place: other numbers are drawn.
    twice = generate(model, [PROMPTS[0], PROMPTS[0]], DRAWN)
    assert twice[0] != twice[1]
    assert generate(model, PROMPTS, replace(DRAWN, seed=6)) != together


def test_greedy_tokens_are_the_largest_logits() -> None:
    model = _model("qwen3", 1, mx.float64)
    (found,) = generate(model, [[5, 6, 7]], GREEDY)
    ids = [5, 6, 7]
    for token in found.tokens:
        assert token == mx.argmax(model(mx.array([ids]))[0, -1]).item()
        ids.append(token)


def test_long_prompts_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("gemma3_text", 1, mx.float64)
    prompt = [i % 101 for i in range(23)]
    whole = generate(model, [prompt], GREEDY)
    monkeypatch.setattr("partita.mlx.stages.batches.PREFILL_TOKENS", 5)
    assert generate(model, [prompt], GREEDY) == whole
    assert PREFILL_TOKENS > 1000


def test_ends() -> None:
    model = _model("llama", 1)
    (free,) = generate(model, [[1, 2, 3]], DRAWN)
    last = next(i for i in range(2, 8) if free.tokens[i] not in free.tokens[:i])
    plan, groups = model.partita_plan, model.partita_groups
    config = {**plan.spec.config, "eos_token_id": [free.tokens[last], 100]}
    finish(model, replace(plan, spec=replace(plan.spec, config=config)), groups)
    (found,) = generate(model, [[1, 2, 3]], replace(DRAWN, ignore_eos=False))
    assert (found.tokens, found.finish_reason) == (free.tokens[: last + 1], "eos")
    assert generate(model, [[1, 2, 3]], DRAWN) == [free]


# --- text -----------------------------------------------------------------------------------------------------------------


def _said(sampling: Sampling) -> tuple[str, str, list[tuple[int, str]]]:
    tokenizer = byte_tokenizer()
    model = _model("llama", 1, vocab_size=len(tokenizer.inner))
    heard: list[tuple[int, str]] = []
    prompt = tokenizer.encode("Ein Lied")
    (found,) = generate(model, [prompt], sampling, tokenizer=tokenizer, on_text=lambda *args: heard.append(args))
    assert "".join(text for _, text in heard) == found.text
    return found.text, found.finish_reason, heard


def test_text_is_streamed_and_stops() -> None:
    text, reason, heard = _said(replace(DRAWN, max_new_tokens=24, repetition_penalty=1.0, temperature=2.0))
    assert reason == "length"
    assert len(heard) > 1
    stop = text[4:7]
    begun = text[2:4] + "never"
    cut, why, pieces = _said(
        replace(DRAWN, max_new_tokens=24, repetition_penalty=1.0, temperature=2.0, stop=(stop, begun))
    )
    assert (cut, why) == (text[: text.index(stop)], "stop")
    assert all(stop not in piece for _, piece in pieces)


def test_a_character_is_shown_when_it_is_whole() -> None:
    tokenizer = byte_tokenizer()
    shown: list[str] = []
    sequence = Sequence(0, [1], 99)
    for token in tokenizer.encode("aé!"):
        sequence.accept(token, Choice(), tokenizer)
        sequence.show(lambda place, text: shown.append(text))
    assert shown == ["a", "é", "!"]


def test_the_beginning_of_a_stop_text_is_held_back() -> None:
    tokenizer = byte_tokenizer()
    shown: list[str] = []
    choice = Choice(stop=("END",))
    sequence = Sequence(0, [1], 5)
    for token in tokenizer.encode("xENxE"):
        sequence.accept(token, choice, tokenizer)
        sequence.show(lambda place, text: shown.append(text), choice.stop)
    assert shown == ["x", "ENx", "E"]
    assert sequence.finish_reason == "length"


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "sampling", "reason"),
    [
        ([], GREEDY, "at least one prompt"),
        ([[1], []], GREEDY, "prompt 1 is empty"),
        ([[1, 101]], GREEDY, "prompt 0 contains the id 101, but the model has ids 0 to 100"),
        ([[1]], replace(GREEDY, stop=("x",)), "stop needs a tokenizer"),
    ],
)
def test_mistakes(prompts: list[list[int]], sampling: Sampling, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        generate(_model("llama", 1), prompts, sampling)


def test_a_model_of_its_own_is_refused() -> None:
    with pytest.raises(ModelError, match="was not split by Partita"):
        generate(build(tiny_config("llama")), PROMPTS, GREEDY)


# --- parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_most_likely_of_parts_is_most_likely_of_all(parts: int) -> None:
    rows = np.random.default_rng(0).standard_normal((6, 23)).astype(np.float32)
    rows[0, [3, 17]] = 9.0  # the first of two equal ones counts, over ranks too
    rows[1, [2, 3]] = 9.0
    split = Split.even(23, parts)

    def one(comm: Any) -> tuple[list[int], list[int]]:
        ((start, stop),) = split.ranges(comm.rank)
        whole = mx.array(rows)
        return most_likely(whole[:, start:stop], split, comm).tolist(), most_likely(whole, None, comm).tolist()

    for mine, alone in run_as_threads(parts, one):
        assert mine == alone == rows.argmax(1).tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_local_logits_are_the_own_columns(tied: bool) -> None:
    config = {**tiny_config("llama"), "tie_word_embeddings": tied}
    mx.random.seed(0)
    whole = fill(build(config), mx.float64)
    plan = plan_of_model(whole, Mesh(tp=2), config=config)
    expected = whole(mx.array([[1, 2, 3]]))
    mx.eval(expected)

    def one(comm: Any) -> tuple[bool, tuple[int, ...]]:
        split = apply_plan(copy.deepcopy(whole), plan, comm)
        with local_logits(split, plan) as columns:
            mine = split(mx.array([[1, 2, 3]]))
        assert columns is not None
        ((start, stop),) = columns.ranges(comm.rank)
        near = mx.abs(mine - expected[..., start:stop]).max() < 1e-12
        return bool(near.item()), split(mx.array([[1, 2, 3]])).shape

    assert run_as_threads(2, one) == [(True, expected.shape)] * 2


def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    base = {"vocab_size": 101, "hidden_size": 112, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 14,
            "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    for family in ("llama", "qwen2"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **base)).eval()
        model.save_pretrained(tmp_path / family)
        expected = [
            model.generate(torch.tensor([p]), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)[
                0, len(p) :
            ].tolist()
            for p in PROMPTS
        ]
        assert json.loads((tmp_path / family / "config.json").read_text())["model_type"] == family
        for found in mlx_ranks(2).run(_from_disk, str(tmp_path / family), 2):
            assert found == expected


def _from_disk(folder: str, tp: int) -> list[list[int]]:
    from partita.mlx.load import load

    return [list(g.tokens) for g in generate(load(folder, tp=tp), PROMPTS, GREEDY)]
