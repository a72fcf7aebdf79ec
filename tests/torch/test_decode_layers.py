"""A decoder layer in four calls of C++ while decoding: the values of the family's own forward, or that forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from partita.generation import Sampling
from partita.torch.generate import generate
from partita.torch.layers import decode_layers, decode_matmul
from partita.torch.layers.decode_matmul import PAYS_AFTER_TOKENS, decoding
from partita.torch.layers.lora import LoraLinear
from partita.torch.new import fresh
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6], [5, 3], [7], [8, 8], [2, 2, 2], [6, 1]]
LONG = Sampling(max_new_tokens=PAYS_AFTER_TOKENS, ignore_eos=True)


def model_of(name: str, dtype: str = "float32", **mesh: int) -> Any:
    config = {**CONFIGS[name], "initializer_range": 0.3, "eos_token_id": None}
    return fresh(config, seed=4, dtype=dtype, **mesh)  # type: ignore[arg-type]


def tokens_of(model: Any) -> list[list[list[int]]]:
    """Of one prompt and of eight."""
    return [[list(g.tokens) for g in generate(model, prompts, LONG)] for prompts in (PROMPTS[:1], PROMPTS)]


def both(model: Any) -> tuple[Any, Any, list[bool | None]]:
    """Tokens with and without our layers, and which of those layers, each time, computed them."""
    layers: list[Any] = []
    made = decode_layers.faster_layer

    def kept(*args: Any) -> Any:
        forward: Any = made(*args)
        layers.extend([] if forward is None else [forward.__self__])
        return forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_matmul, "faster_layer", kept)
        found = tokens_of(model)
        patch.setattr(decode_matmul, "faster_layer", lambda *args: None)
        return found, tokens_of(model), [layer.is_proven for layer in layers]


def both_on_ranks(name: str, dtype: str, mesh: dict[str, int]) -> tuple[Any, Any, list[bool | None]]:
    return both(model_of(name, dtype, **mesh))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-biases-tied", "qwen2-14-heads-2-kv", "qwen3", "mistral"])
def test_tokens_are_those_without_it(name: str, dtype: str) -> None:
    found, usual, verdicts = both(model_of(name, dtype))
    assert verdicts
    assert all(verdicts)
    assert found == usual


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_ranks(mesh: dict[str, int]) -> None:
    for found, usual, verdicts in ranks(2).run(both_on_ranks, "qwen3", "bfloat16", mesh):
        assert verdicts
        assert all(verdicts)
        assert found == usual


class Odd(nn.Module):
    """SiLU for the rows of numbers by which an activation is known, GELU elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) if x.dim() == 1 else F.gelu(x)


def test_a_layer_that_is_not_the_same_keeps_its_forward() -> None:
    model = model_of("qwen3")
    for layer in model.model.layers:
        layer.mlp.act_fn = Odd()
    found, usual, verdicts = both(model)
    assert verdicts
    assert not any(verdicts)
    assert found == usual


def with_hook(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: output * 2)


def with_adapter(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj = LoraLinear(layer.mlp.up_proj, 2)


def with_own_code(model: Any) -> None:
    kind = type(model.model.layers[0].mlp)
    own = type("Own", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})
    for layer in model.model.layers:
        layer.mlp.__class__ = own


def with_other_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()


@pytest.mark.parametrize("change", [with_hook, with_adapter, with_own_code, with_other_activation])
def test_other_layers_are_left_alone(change: Callable[[Any], None]) -> None:
    model = model_of("llama-biases-tied")
    change(model)
    with decoding(model, 1, PAYS_AFTER_TOKENS):
        assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "gpt2"])
def test_other_families_are_left_alone(name: str) -> None:
    model = model_of(name)
    made = [decode_layers.faster_layer(layer, lambda layers: None) for layer in model.modules()]
    assert not any(made)
