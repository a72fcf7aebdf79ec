"""After an error `generate` left a model in eval mode, `train` in training mode, and `load_adapters` half adapted and frozen.

`train` also changed the random state and kept recomputing activations, with or without an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partita.errors import CheckpointError
from partita.generation import Sampling, byte_tokenizer
from partita.training import TrainSettings
from tests.cli.models import TINY

SETTINGS = TrainSettings(steps=2, batch_size=2, sequence_length=8)
TOKENS = np.arange(200) % 250


class Interrupted(Exception):
    """What a callback raises."""


def interrupt(*args: object) -> None:
    raise Interrupted


class Torch:
    """What the tests ask of the torch engine."""

    def __init__(self) -> None:
        import partita.torch as engine
        from partita.torch.collectives.groups import single_groups

        self.engine: Any = engine
        self.groups = single_groups()

    def flags(self, model: Any) -> list[bool]:
        return [module.training for module in model.modules()]

    def trained(self, model: Any) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def random(self) -> list[int]:
        import torch

        return torch.get_rng_state().tolist()  # type: ignore[no-any-return]

    def gradients(self, model: Any) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


class Mlx:
    """What the tests ask of the MLX engine."""

    def __init__(self) -> None:
        pytest.importorskip("mlx_lm")
        import partita.mlx as engine
        from partita.mlx.collectives.groups import single_groups

        self.engine: Any = engine
        self.groups = single_groups()

    def flags(self, model: Any) -> list[bool]:
        return [module.training for module in model.modules()]

    def trained(self, model: Any) -> set[str]:
        from mlx.utils import tree_flatten

        return {name for name, _ in tree_flatten(model.trainable_parameters())}

    def random(self) -> list[int]:
        import mlx.core as mx

        return mx.random.state[0].tolist()  # type: ignore[no-any-return]

    def gradients(self, model: Any) -> list[str]:
        return []


@pytest.fixture(params=[Torch, Mlx])
def used(request: pytest.FixtureRequest) -> Any:
    return request.param()


def mixed(used: Any, **changed: Any) -> Any:
    """A model in training mode, of which one layer is in eval mode."""
    model = used.engine.fresh({**TINY, **changed}, seed=0, groups=used.groups)
    model.train()
    model.model.layers[1].eval()
    assert len(set(used.flags(model))) == 2
    return model


def test_generate(used: Any) -> None:
    model = mixed(used)
    before = used.flags(model)
    with pytest.raises(Interrupted):
        used.engine.generate(model, [[7, 8]], Sampling(max_new_tokens=4), tokenizer=byte_tokenizer(), on_text=interrupt)
    assert used.flags(model) == before
    used.engine.generate(model, [[7, 8]], Sampling(max_new_tokens=2))
    assert used.flags(model) == before


@pytest.mark.parametrize("on_step", [interrupt, None])
def test_train(used: Any, on_step: Any) -> None:
    model = mixed(used)
    flags, random = used.flags(model), used.random()
    if on_step is None:
        used.engine.train(model, TOKENS, SETTINGS)
    else:
        with pytest.raises(Interrupted):
            used.engine.train(model, TOKENS, SETTINGS, on_step=on_step)
    assert used.flags(model) == flags
    assert used.random() == random
    assert not used.gradients(model)


@pytest.mark.parametrize("on_step", [interrupt, None])
def test_checkpointing_of_activations(on_step: Any) -> None:
    used = Torch()
    model = mixed(used)

    def checkpointing() -> list[bool]:
        return [
            module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")
        ]

    before = checkpointing()
    assert before
    seen: list[list[bool]] = []

    def step(report: Any) -> None:
        seen.append(checkpointing())
        if on_step is not None:
            on_step(report)

    settings = TrainSettings(steps=1, batch_size=2, sequence_length=8, checkpointing=True)
    try:
        used.engine.train(model, TOKENS, settings, on_step=step)
    except Interrupted:
        assert on_step is not None
    assert all(seen[0])
    assert checkpointing() == before


def test_load_adapters(used: Any, tmp_path: Path) -> None:
    """Of a model whose last projection is wider: the adapters before it fit."""
    other = mixed(used, intermediate_size=2 * TINY["intermediate_size"])
    used.engine.add_lora(other, 2)
    used.engine.save_adapters(other, tmp_path / "adapters", base="other")
    model = mixed(used)
    trained, random = used.trained(model), used.random()
    with pytest.raises(CheckpointError):
        used.engine.load_adapters(model, tmp_path / "adapters")
    assert used.trained(model) == trained
    assert used.random() == random
    assert used.engine.add_lora(model, 2)
