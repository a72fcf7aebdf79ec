"""What the caller leaves open is taken from the model's generation config, and what that leaves open from transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from partita.errors import ModelError, PlanError
from partita.generation import Sampling
from partita.generation.choice import DEFAULT_NEW_TOKENS, Choice, settle
from partita.generation.generation_config import generation_of_config
from partita.generation.sample import choose, generator_of
from partita.generation.settings import Sequence


@pytest.mark.parametrize(
    ("sampling", "generation", "expected"),
    [
        (Sampling(), {}, Choice(DEFAULT_NEW_TOKENS)),
        (Sampling(), {"temperature": 0.6, "top_p": 0.9, "top_k": 20}, Choice()),  # without do_sample they do not matter
        (Sampling(), {"do_sample": True}, Choice(temperature=1.0, top_k=50)),
        (
            Sampling(),
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
            Choice(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1),
        ),
        (Sampling(top_k=0), {"do_sample": True, "top_k": 20}, Choice(temperature=1.0)),
        (Sampling(temperature=0.0), {"do_sample": True, "temperature": 0.6}, Choice()),
        (Sampling(temperature=0.7), {"top_p": 0.5}, Choice(temperature=0.7, top_k=50, top_p=0.5)),
        (Sampling(use_generation_config=False), {"do_sample": True, "eos_token_id": 3}, Choice(eos_ids=frozenset([3]))),
        (Sampling(ignore_eos=True), {"eos_token_id": [3, 4]}, Choice()),
        (Sampling(), {"repetition_penalty": 2, "max_new_tokens": 9}, Choice(9, repetition_penalty=2.0)),
        (Sampling(repetition_penalty=1.0, max_new_tokens=5), {"repetition_penalty": 2, "max_length": 9}, Choice(5)),
        (Sampling(), {"max_length": 30}, Choice(None, 30)),
        (Sampling(), {"min_length": 4, "min_new_tokens": 3}, Choice(min_new_tokens=3)),
        (Sampling(), {"stop_strings": "END"}, Choice(stop=("END",))),
        (Sampling(), {"bad_words_ids": [[3], [1, 2]], "eos_token_id": 3},
         Choice(bad_words_ids=((1, 2),), eos_ids=frozenset([3]))),
        (Sampling(), {"num_beams": 1, "typical_p": 0.5, "chat_format": "chatml"}, Choice()),
    ],
)  # fmt: skip
def test_settled(sampling: Sampling, generation: dict[str, Any], expected: Choice) -> None:
    assert settle(sampling, generation) == expected


def test_the_tokenizer_s_end_counts_where_the_model_names_none() -> None:
    assert settle(Sampling(), {}, frozenset([7])).eos_ids == {7}
    assert settle(Sampling(), {"eos_token_id": [2, 3]}, frozenset([7])).eos_ids == {2, 3}


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"num_beams": 4}, "has num_beams=4, which is not supported"),
        ({"do_sample": True, "typical_p": 0.5}, "has typical_p=0.5"),
        ({"guidance_scale": 1.5}, "--no-generation-config"),
        ({"repetition_penalty": "high"}, "repetition_penalty must be a finite number of more than 0"),
        ({"do_sample": True, "temperature": 0.0}, "samples \\(do_sample\\) at temperature 0"),
    ],
)
def test_what_is_not_supported_is_refused(generation: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        settle(Sampling(), generation)
    assert settle(Sampling(use_generation_config=False), generation) == Choice()


def test_a_limit_of_prompt_and_text_together() -> None:
    choice = settle(Sampling(), {"max_length": 10})
    assert choice.limit(4) == 6
    with pytest.raises(PlanError, match="max_length=10, and a prompt of 10 tokens leaves no room"):
        choice.limit(10)


def test_a_config_s_own_settings() -> None:
    config = {"eos_token_id": 2, "hidden_size": 8, "text_config": {"eos_token_id": 5, "max_length": 9}}
    assert generation_of_config(config) == {"eos_token_id": 2, "max_length": 9}


SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[4], [5, 6], [9, 5, 7], [1, 2, 3, 4, 5, 6, 7, 8]], "eos_token_id": 4},
    {"suppress_tokens": [3, 11]},
    {"begin_suppress_tokens": [3, 11]},
    {"min_length": 8, "eos_token_id": [2, 3]},
    {"min_new_tokens": 2, "eos_token_id": 2},
    {"forced_eos_token_id": [2, 7], "max_length": 9},
    {"do_sample": True},
    {"do_sample": True, "top_k": 4, "temperature": 0.5, "repetition_penalty": 1.3, "suppress_tokens": [1]},
    {"do_sample": True, "top_p": 0.7, "min_p": 0.1, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("generation", SETTINGS, ids=str)
def test_as_transformers_processes_logits(generation: dict[str, Any], count: int) -> None:
    """The probabilities that transformers' own processors leave, after a prompt of 5 tokens and `count` others."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    prompt, tokens = [9, 5, 6, 9, 5], [6, 9, 5][:count]
    logits = np.random.default_rng(3).standard_normal(12) * 2
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
    model.generation_config = GenerationConfig(**generation)
    config, _ = model._prepare_generation_config(None)
    model._prepare_special_tokens(config)
    if config.min_new_tokens is not None:
        config.min_length = 5 + config.min_new_tokens
    scores = torch.tensor(logits)[None]
    for processor in model._get_logits_processor(config, 5, device="cpu"):
        scores = processor(torch.tensor([prompt + tokens]), scores)
    expected = scores.softmax(-1)[0].numpy()
    choice = settle(Sampling(), generation)
    if not choice.temperature:
        expected = (np.arange(12) == expected.argmax()).astype(float)
    sequence, generator = Sequence(0, prompt, choice.limit(5), tokens), generator_of(choice, 0)
    times = 4000 if choice.temperature else 1
    found = np.bincount([choose(logits[None], [sequence], choice, [generator])[0] for _ in range(times)], minlength=12)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    assert np.abs(found / times - expected).max() < 0.03
