"""Where mlx-lm leaves out a sliding window, nothing longer is generated, trained or verified, and nothing shorter refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from partita.core.mesh import Mesh
from partita.errors import ModelError
from partita.generation import Sampling
from partita.mlx.collectives.groups import single_groups
from partita.mlx.generate import generate
from partita.mlx.load import shard
from partita.mlx.model.mlx_lm_models import build
from partita.mlx.proof.family import fill, plan_of_model
from partita.mlx.train import train
from partita.training import TrainSettings
from tests.support.mlx_models import tiny_config

WINDOW = 10
LATE = {"use_sliding_window": True, "max_window_layers": 0}


def model_of(family: str, **changes: Any) -> nn.Module:
    """A tiny model that knows its whole config, as a loaded one does."""
    config = {**tiny_config(family), "sliding_window": WINDOW, **changes}
    model = fill(build(config), mx.float32)
    return shard(model, plan_of_model(model, Mesh(), config=config), groups=single_groups())


def sampling(new: int) -> Sampling:
    return Sampling(max_new_tokens=new, ignore_eos=True)


@pytest.mark.parametrize(("family", "changes"), [("mixtral", {}), ("qwen2", LATE), ("gemma2", {})])
def test_generating_ends_at_the_window(family: str, changes: dict[str, Any]) -> None:
    model = model_of(family, **changes)
    (made,) = generate(model, [[1, 2, 3, 4]], sampling(WINDOW - 4))
    assert len(made.tokens) == WINDOW - 4
    with pytest.raises(ModelError) as refused:
        generate(model, [[1], [1, 2, 3, 4]], sampling(WINDOW - 3))
    assert str(refused.value) == (
        f"mlx-lm runs {family} without its sliding window of 10 tokens, so longer texts give wrong results, but "
        "a prompt of 4 with 7 new ones is 11 tokens. Use at most 10 tokens, or use the torch engine (--engine torch)."
    )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen2", {"use_sliding_window": False}),
        ("mixtral", {"sliding_window": None}),
        ("gpt_oss", {}),
        ("gemma3_text", {}),
        ("cohere2", {}),
        ("olmo3", {}),
    ],
)
def test_others_go_on(family: str, changes: dict[str, Any]) -> None:
    model = model_of(family, **changes)
    (made,) = generate(model, [[1, 2, 3, 4]], sampling(WINDOW + 3))
    assert len(made.tokens) == WINDOW + 3


def test_training_ends_at_the_window() -> None:
    model = model_of("starcoder2")
    settings: dict[str, Any] = {"steps": 1, "batch_size": 1}
    text = list(range(60))
    assert len(train(model, text, TrainSettings(sequence_length=WINDOW, **settings))) == 1
    with pytest.raises(ModelError, match=r"without its sliding window of 10 tokens.* a sequence is 11 tokens"):
        train(model, text, TrainSettings(sequence_length=WINDOW + 1, **settings))


def test_verifying_needs_a_window_as_long_as_what_it_compares(tmp_path: Path) -> None:
    from partita.mlx.verify import verify

    file = tmp_path / "config.json"
    file.write_text(json.dumps({**tiny_config("mixtral"), "sliding_window": 20}))
    with pytest.raises(ModelError, match=r"mlx-lm runs mixtral without its sliding window of 20 tokens.* is 21 tokens"):
        verify(file, steps=1)
    file.write_text(json.dumps({**tiny_config("mixtral"), "sliding_window": 21}))
    assert verify(file, steps=1).equal
