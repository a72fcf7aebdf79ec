"""`generation_config.json` counted for its end tokens alone, and beside those of `config.json`.

Every setting now counts as in transformers: the same tokens as its `generate`, which is given nothing but the prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from partita.errors import ModelError
from partita.generation import Sampling
from partita.torch import generate, load, save
from tests.support.loaded import random_model, reference
from tests.support.ranks import on

CONFIG: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.5,
}  # fmt: skip
PROMPT = [3, 1, 4, 1, 5]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[26], [21, 28]], "suppress_tokens": [8]},
    {"begin_suppress_tokens": list(range(25))},
    {"max_length": 11},
    {"forced_eos_token_id": 4},
    # Settings of sampling without do_sample, which do not matter, but which transformers itself refuses to save.
    {"temperature": 0.6, "top_p": 0.9},
]


def written(folder: Path, generation: dict[str, Any] | None, **config: Any) -> None:
    """A model on disk with these generation settings, or without the file."""
    random_model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**CONFIG, **config})).save_pretrained(
        folder
    )
    if generation is None:
        (folder / "generation_config.json").unlink()
    else:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def expected_tokens(folder: Path, **options: Any) -> tuple[int, ...]:
    ids = reference(folder).generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, 5), **options)  # type: ignore[operator]
    return tuple(ids[0, 5:].tolist())


def tokens(folder: Path, tp: int, pp: int, sampling: Sampling) -> tuple[int, ...]:
    return generate(load(folder, tp=tp, pp=pp), [PROMPT], sampling)[0].tokens


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_the_same_tokens_as_transformers(tmp_path: Path, tp: int, pp: int) -> None:
    for place, settings in enumerate(SETTINGS):
        folder = tmp_path / str(place)
        written(folder, {"max_new_tokens": 12, **settings} if "max_length" not in settings else settings)
        expected = expected_tokens(folder)
        assert on(tp * pp, tokens, folder, tp, pp, Sampling()) == [expected] * (tp * pp), settings
        assert len(expected) == (6 if "max_length" in settings else 12)


def test_settings_change_what_comes(tmp_path: Path) -> None:
    """The test before compares something: no two settings lead to the same tokens by chance."""
    written(tmp_path, {"max_new_tokens": 12})
    model, plain = load(tmp_path), Sampling(12)
    found = {generate(model, [PROMPT], plain)[0].tokens}
    for changes in (
        {"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}, {"begin_suppress_tokens": tuple(range(25))},
        {"suppress_tokens": (8,), "bad_words_ids": ((26,), (21, 28))},
    ):  # fmt: skip
        found.add(generate(model, [PROMPT], Sampling(12, **changes))[0].tokens)  # type: ignore[arg-type]
    assert len(found) == 5


def test_ends(tmp_path: Path) -> None:
    written(tmp_path / "free", {})
    free = tokens(tmp_path / "free", 1, 1, Sampling(12))
    first, second = free[3], next(t for t in free[4:] if t not in free[:4])
    ends = {
        "file": ({"eos_token_id": [second]}, {"eos_token_id": first}, second),
        "file-without": ({}, {"eos_token_id": first}, None),
        "config": (None, {"eos_token_id": first}, first),
        "nobody": (None, {}, None),
    }
    for name, (generation, config, end) in ends.items():
        written(tmp_path / name, generation, **config)
        found = tokens(tmp_path / name, 1, 1, Sampling(12))
        assert found == free[: free.index(end) + 1 if end is not None else 12] == expected_tokens(
            tmp_path / name, max_new_tokens=12), name  # fmt: skip


def test_sampling_is_the_model_s_wish_and_an_option_overrides_it(tmp_path: Path) -> None:
    written(tmp_path, {"do_sample": True, "temperature": 5.0, "top_k": 0})
    model = load(tmp_path)
    greedy = generate(model, [PROMPT], Sampling(12, temperature=0.0))[0].tokens
    assert greedy == expected_tokens(tmp_path, max_new_tokens=12, do_sample=False)
    drawn = {generate(model, [PROMPT], Sampling(12, seed=seed))[0].tokens for seed in range(4)}
    assert len(drawn) == 4
    assert generate(model, [PROMPT], Sampling(12, top_k=1))[0].tokens == greedy


def test_beams_are_refused(tmp_path: Path) -> None:
    written(tmp_path, {"num_beams": 3})
    with pytest.raises(ModelError, match="has num_beams=3, which is not supported"):
        generate(load(tmp_path), [PROMPT], Sampling(2))


def test_it_is_saved_as_it_was_read(tmp_path: Path) -> None:
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3], "chat_format": "chatml"}
    written(tmp_path / "a", settings)
    save(load(tmp_path / "a"), tmp_path / "b")
    found = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert {name: found.get(name) for name in settings} == settings


def test_on_mlx(tmp_path: Path) -> None:
    mlx_load = pytest.importorskip("partita.mlx.load").load
    from partita.mlx.generate import generate as mlx_generate

    for place, settings in enumerate(SETTINGS):
        folder = tmp_path / str(place)
        settings = {"max_new_tokens": 12, "eos_token_id": 30, **settings}
        written(folder, settings, eos_token_id=7)
        (found,) = mlx_generate(mlx_load(folder), [PROMPT], Sampling())
        assert found.tokens == expected_tokens(folder), settings
    written(tmp_path / "old", None, eos_token_id=found.tokens[2])
    (ended,) = mlx_generate(mlx_load(tmp_path / "old"), [PROMPT], Sampling(12, repetition_penalty=1.0))
    assert ended.finish_reason == "eos"
