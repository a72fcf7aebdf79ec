"""All decoder layers of a token in one call of C++: the bits of the layers' own calls, or those calls."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from partita.errors import PartitaError
from partita.generation import Sampling
from partita.torch.generate import generate
from partita.torch.layers import decode_matmul
from partita.torch.layers.decode_layers import Sums
from partita.torch.layers.decode_matmul import PAYS_AFTER_TOKENS, decoding
from partita.torch.layers.decode_stacks import Stack
from partita.torch.model.cache_buffers import reserve
from partita.torch.new import fresh
from partita.torch.transformers_internals import cache_argument
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6], [5, 3], [7], [8, 8], [2, 2, 2], [6, 1]]
LONG = Sampling(max_new_tokens=PAYS_AFTER_TOKENS + 40, ignore_eos=True)


def model_of(name: str, dtype: str = "float32", mesh: dict[str, int] | None = None, **more: Any) -> Any:
    config = {**CONFIGS[name], "initializer_range": 0.3, "eos_token_id": None, **more}
    return fresh(config, seed=4, dtype=dtype, **(mesh or {}))  # type: ignore[arg-type]


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each call that computed several."""
    calls: list[int] = []
    computed = Stack._computed

    def counting(stack: Stack, *args: Any) -> Any:
        y = computed(stack, *args)
        calls.extend([] if y is None else [len(stack.layers)])
        return y

    patch.setattr(Stack, "_computed", counting)
    return calls


def both(name: str, dtype: str, mesh: dict[str, int], more: dict[str, Any]) -> tuple[Any, Any, list[int]]:
    """Tokens of one prompt and of eight with stacks and without, and the calls with them."""
    model = model_of(name, dtype, mesh, **more)

    def tokens() -> Any:
        return [[list(g.tokens) for g in generate(model, prompts, LONG)] for prompts in (PROMPTS[:1], PROMPTS)]

    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        found = tokens()
        patch.setattr(decode_matmul, "_stack", lambda *args: None)
        return found, tokens(), calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-biases-tied", "qwen2-14-heads-2-kv", "qwen3", "mistral"])
def test_logits_have_the_bits_of_the_layers_own(name: str, dtype: str) -> None:
    model = model_of(name, dtype)
    ids = torch.tensor([[5, 9, 2, 7], [0, 0, 3, 1]])
    seen = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])

    def logits() -> list[torch.Tensor]:
        found, mask = [], seen
        with torch.inference_mode(), decoding(model, 2, PAYS_AFTER_TOKENS):
            out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
            reserve(out.past_key_values)
            for step in range(100):  # beyond a buffer's first room
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                out = model(
                    torch.tensor([[step % 9], [step % 7]]),
                    attention_mask=mask,
                    position_ids=mask.sum(-1, keepdim=True) - 1,
                    **{cache_argument(model): out.past_key_values},
                )
                found.append(out.logits)
        return found

    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        together = logits()
        assert calls == [len(model.model.layers)] * 99  # the first step proves the layers and sees how they are called
        patch.setattr(decode_matmul, "_stack", lambda *args: None)
        apart = logits()
    assert len(calls) == 99
    assert all(map(torch.equal, together, apart))


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_ranks(mesh: dict[str, int]) -> None:
    for found, usual, calls in ranks(2).run(both, "qwen3", "bfloat16", mesh, {"num_hidden_layers": 4}):
        assert calls
        assert set(calls) == {4 // mesh.get("pp", 1)}
        assert found == usual


@pytest.mark.parametrize("window", [2, 8])
def test_a_cache_that_forgets(window: int) -> None:
    found, usual, calls = both("mistral", "float32", {}, {"sliding_window": window})
    assert calls
    assert found == usual


class BrokenError(PartitaError):
    """What a sum over ranks raises."""


def test_an_error_of_a_sum_is_raised() -> None:
    def broken(part: torch.Tensor) -> torch.Tensor:
        raise BrokenError("a rank is gone")

    model = model_of("qwen3")
    with torch.inference_mode(), decoding(model, 1, PAYS_AFTER_TOKENS):
        for layer in model.model.layers:
            layer.forward.func.__self__.first.sums = Sums(broken)
        layers = model.model.layers[0].forward.func.__self__.layers
        stack = Stack(layers)
        for place, layer in enumerate(model.model.layers):
            layer.forward = functools.partial(stack.forward, place)
        out = step(model, None)
        reserve(out.past_key_values)
        with pytest.raises(BrokenError, match="a rank is gone"):
            step(model, out.past_key_values)


def step(model: Any, cache: Any) -> Any:
    return model(torch.tensor([[3]]), use_cache=True, **{cache_argument(model): cache})


def test_layers_that_are_called_otherwise_raise_an_error() -> None:
    model = model_of("llama-biases-tied")
    layers = model.model.layers
    with torch.inference_mode(), decoding(model, 1, PAYS_AFTER_TOKENS):
        out = step(model, None)
        reserve(out.past_key_values)
        for _ in range(3):
            out = step(model, out.past_key_values)
        between = layers[1].forward
        layers[1].forward = lambda hidden, **kwargs: between(hidden * 2, **kwargs)
        with pytest.raises(RuntimeError, match="in another way than for the token before"):
            step(model, out.past_key_values)


def after_context_parallelism() -> list[int]:
    model_of("qwen3", mesh={"cp": 2})
    return both("qwen3", "float32", {"tp": 2}, {})[2]


def test_attention_is_ours_again_after_a_model_over_context_parallel_ranks() -> None:
    for calls in ranks(2).run(after_context_parallelism):
        assert calls
