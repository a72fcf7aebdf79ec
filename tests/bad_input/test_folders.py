"""A model's folder of which one file is broken: its config, its tokenizer, how to generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.models import LLAMA, weights, write
from tests.bad_input.table import ENGINES, error_of, holds
from tests.bad_input.test_safetensors import load
from tests.cli.conftest import Run


def but(**changes: Any) -> dict[str, Any]:
    """The config of a good model, changed: None for a key that is left out."""
    return {name: value for name, value in {**LLAMA, **changes}.items() if value is not None}


CONFIGS: dict[str, tuple[Any, str]] = {
    "absent": (None, "config.json does not exist. Give a folder with a config.json"),
    "empty": ("", "config.json is not JSON: Expecting value"),
    "not JSON": ("{model_type: llama}", "config.json is not JSON: Expecting property name"),
    "not text": (b"\xff\xfe\x00".decode("latin-1"), "config.json is not JSON"),
    "a list": ("[]", "config.json is not a model's config: it has no `model_type`."),
    "null": ("null", "config.json is not a model's config: it has no `model_type`."),
    "nested without end": ('{"a":' * 100_000, "config.json is not JSON: maximum recursion depth"),
    "no model_type": (but(model_type=None), "config.json is not a model's config: it has no `model_type`."),
    "model_type a number": (but(model_type=5), "config.json is not a model's config: it has no `model_type`."),
    "a family that nobody knows": (but(model_type="nonsense"), "nonsense"),
    "architectures a number": (but(architectures=5), "architectures must be a list of names of classes, but is 5."),
    "width below zero": (but(hidden_size=-1), "hidden_size must be a whole number of at least 1, but is -1."),
    "no width": (but(hidden_size=0), "hidden_size must be a whole number of at least 1, but is 0."),
    "width in quotes": (but(hidden_size="32"), "hidden_size must be a whole number of at least 1, but is '32'."),
    "width of a half": (but(hidden_size=32.5), "hidden_size must be a whole number of at least 1, but is 32.5."),
    "width that is no number": (
        json.dumps(but(hidden_size=float("nan"))),
        "hidden_size must be a whole number of at least 1, but is nan.",
    ),
    "heads that do not divide": (
        but(num_attention_heads=3),
        "hidden_size must be a multiple of num_attention_heads (3), but is 32.",
    ),
    "no heads": (but(num_attention_heads=0), "num_attention_heads must be a whole number of at least 1, but is 0."),
    "KV heads that do not divide": (
        but(num_key_value_heads=3),
        "num_attention_heads must be a multiple of num_key_value_heads (3)",
    ),
    "no KV heads": (but(num_key_value_heads=0), "num_key_value_heads must be a whole number of at least 1, but is 0."),
    "no layers": (but(num_hidden_layers=0), "num_hidden_layers must be a whole number from 1 to 100,000, but is 0."),
    "layers below zero": (
        but(num_hidden_layers=-1),
        "num_hidden_layers must be a whole number from 1 to 100,000, but is -1.",
    ),
    "a billion layers": (
        but(num_hidden_layers=10**9),
        "num_hidden_layers must be a whole number from 1 to 100,000, but is 1000000000.",
    ),
    "no vocabulary": (but(vocab_size=0), "vocab_size must be a whole number of at least 1, but is 0."),
    "tied, more or less": (but(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false, but is 'yes'."),
}

LOADED_AS_WELL = (
    "absent",
    "empty",
    "not JSON",
    "a list",
    "null",
    "nested without end",
    "no model_type",
    "architectures a number",
    "width below zero",
    "no width",
    "width in quotes",
    "width of a half",
    "no heads",
    "no layers",
    "layers below zero",
    "a billion layers",
)
"""Those that loading from Python refuses too, without weights of another shape to go by; on torch in transformers' words."""


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_broken_config(kind: str, tmp_path: Path, partita: Run) -> None:
    config, says = CONFIGS[kind]
    folder = str(write(tmp_path / "model", config))
    lines = (
        ("plan", folder),
        ("verify", folder, "--tp", "1"),
        ("generate", folder, "hi"),
        ("train", "--config", folder, "--data", "stdlib"),
    )
    for line in lines:
        said = partita(*line)
        assert said.code == 2, said.err
        assert holds(error_of(said), says), said.err


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", LOADED_AS_WELL)
def test_a_broken_config_of_a_loaded_model(kind: str, engine: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CONFIGS[kind][0])
    with pytest.raises(ValueError) as caught:
        load(engine)(folder)
    assert type(caught.value).__module__ == "partita.errors"
    assert "\n" not in str(caught.value)


BESIDE: dict[str, tuple[dict[str, str], str]] = {
    "tokenizer not JSON": ({"tokenizer_json": "{"}, "the tokenizer in ... cannot be read: Expecting property name"),
    "tokenizer a list": ({"tokenizer_json": "[]"}, "the tokenizer in ... cannot be read: "),
    "tokenizer's config not JSON": (
        {"tokenizer_config_json": "{"},
        "the tokenizer in ... cannot be read: Expecting property name",
    ),
    "tokenizer of no class": (
        {"tokenizer_config_json": '{"tokenizer_class": "Nonsense"}'},
        "the tokenizer in ... cannot be read: Couldn't instantiate the backend tokenizer",
    ),
    "vocabulary of nothing": ({"vocab_json": "{}"}, "the tokenizer in ... cannot be read: "),
    "generation config not JSON": (
        {"generation_config_json": "{"},
        "generation_config.json is not JSON: Expecting property name",
    ),
    "generation config a list": (
        {"generation_config_json": "[]"},
        "generation_config.json must be a JSON object, but is [].",
    ),
    "an end in words": (
        {"generation_config_json": '{"eos_token_id": "end"}'},
        "generation_config.json: eos_token_id must be an id or a list of ids, but is 'end'.",
    ),
    "ends in words": (
        {"generation_config_json": '{"eos_token_id": [1, null]}'},
        "generation_config.json: eos_token_id must be an id or a list of ids, but is [1, None].",
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", BESIDE)
def test_a_broken_file_beside_the_weights(kind: str, engine: str, tmp_path: Path, partita: Run) -> None:
    texts, says = BESIDE[kind]
    folder = str(write(tmp_path / "model", LLAMA, **texts))
    said = partita("generate", folder, "hi", "--max-new-tokens", "1", "--engine", engine)
    assert said.code == 2, said.err
    assert folder in said.err
    assert holds(error_of(said), says), said.err


@pytest.mark.parametrize("engine", ENGINES)
def test_both_engines_end_where_the_generation_config_says(engine: str, tmp_path: Path, partita: Run) -> None:
    """Id 7 is the likeliest by far; that it ends a text, `generation_config.json` says alone."""
    tensors = weights()
    tensors["lm_head.weight"][7] = 1.0
    folder = str(write(tmp_path / "model", LLAMA, tensors, generation_config_json='{"eos_token_id": [7, 256]}'))
    said = partita("generate", folder, "hi", "--max-new-tokens", "5", "--engine", engine, "--json")
    [generation] = json.loads(said.out)["generations"]
    assert (generation["tokens"], generation["finish_reason"]) == ([7], "eos")
