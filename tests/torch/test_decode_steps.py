"""Norms, rotary positions, attention and sibling products of C++ while decoding: the values of the family's own forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from partita.generation import Sampling
from partita.quantized.array import Encoding, QuantizedArray, Raw
from partita.quantized.bits import pack_bits
from partita.torch.generate import generate
from partita.torch.layers import decode_steps
from partita.torch.layers.decode_matmul import PAYS_AFTER_TOKENS, decoding
from partita.torch.new import fresh
from partita.torch.quantized.kernels import Products
from partita.torch.quantized.part import Part
from partita.torch.quantized.tensor import QuantizedTensor
from tests.support.models import CONFIGS

PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6], [5, 3], [7], [8, 8], [2, 2, 2], [6, 1]]


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "llama-biases-tied", "mistral", "phi3", "gpt-neox"])
def test_tokens_are_those_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh({**CONFIGS[name], "initializer_range": 0.3, "eos_token_id": None}, seed=4)
    settings = Sampling(max_new_tokens=PAYS_AFTER_TOKENS, ignore_eos=True)
    with decoding(model, 1, PAYS_AFTER_TOKENS):
        replaced = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    assert any("Attention" in kind for kind in replaced)
    assert name == "gpt-neox" or any("Norm" in kind for kind in replaced)
    got = [generate(model, PROMPTS[:1], settings), generate(model, PROMPTS, settings)]
    for part in ("faster_step", "plain_weight"):
        monkeypatch.setattr(f"partita.torch.layers.decode_matmul.{part}", lambda module: None)
    assert [[list(g.tokens) for g in one] for one in got] == [
        [list(g.tokens) for g in generate(model, prompts, settings)] for prompts in (PROMPTS[:1], PROMPTS)
    ]


def test_float64_is_left_alone() -> None:
    model = fresh(CONFIGS["qwen3"], dtype="float64")
    with decoding(model, 1, PAYS_AFTER_TOKENS):
        assert not any("forward" in vars(module) for module in model.modules())


class Centered(nn.Module):
    """No norm that the C++ knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 50])
def test_norms(width: int, dtype: torch.dtype) -> None:
    assert decode_steps.faster_step(Centered(width).to(dtype)) is None
    norm = nn.RMSNorm(width, eps=1e-5).to(dtype)
    nn.init.normal_(norm.weight)
    fast = decode_steps.faster_step(norm)
    assert fast is not None
    for x in (torch.randn(3, 1, width), torch.randn(2, 4, width).transpose(0, 1)):
        x = x.to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "groups", "shared", "tokens"), [(64, 3, 3, 40), (7, 1, 5, 1), (20, 2, 1, 33)])
def test_attention(width: int, groups: int, shared: int, tokens: int, dtype: torch.dtype) -> None:
    sdpa = decode_steps.plain_sdpa()
    attend = decode_steps._attention(sdpa)
    module: Any = nn.Module()
    module.num_key_value_groups = shared
    q = torch.randn(2, 1, groups * shared, width).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, groups, tokens + 5, width).to(dtype).narrow(2, 2, tokens) for _ in range(2))
    mask = torch.rand(2, 1, 1, tokens) < 0.5
    mask[..., -1] = True
    for given in (None, mask, mask[:1]):
        got, _ = attend(module, q, k, v, given, dropout=0.0, scaling=0.3)
        want, _ = sdpa(module, q.float(), k.float(), v.float(), given, dropout=0.0, scaling=0.3)
        assert got.dtype == dtype
        assert (got.float() - want).abs().max() <= (1e-5 if dtype == torch.float32 else 2.0**-7) * want.abs().max()
    v[0, 0, -1] = torch.nan
    assert attend(module, q, k, v, None)[0][0].isnan().any()


class Four(nn.Module):
    """Three layers of one input and one of their sum, with as many inputs; `change` is what happens after the first."""

    def __init__(self, change: str, kind: str) -> None:
        super().__init__()
        self.change, inputs = change, 64 if kind == "quantized" else 35
        random, noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
        for name, outputs in (("q", 13), ("k", 5), ("o", inputs), ("v", 6)):
            layer = nn.Linear(inputs, outputs, bias=name != "k")
            if kind == "quantized":
                codes = pack_bits(random.integers(0, 16, (outputs, inputs)).astype(np.uint8), 4)
                scales = Raw(random.standard_normal((outputs, 2)).astype(np.float32), "F32")
                columns = np.arange(inputs, dtype=np.int32) // 32
                rows = np.arange(outputs, dtype=np.int32)
                zeros = Raw(np.full((outputs, 2), 7, np.uint8), "U8")
                encoding, shape = Encoding("ints", bits=4), (outputs, inputs)
                array = QuantizedArray(encoding, shape, codes, scales, zeros, None, rows, columns)
                layer.weight = nn.Parameter(QuantizedTensor([[Part.of(array)]], torch.float32), requires_grad=False)
            else:
                nn.init.normal_(layer.weight, generator=noise)
            setattr(self, name, layer.bfloat16() if kind == "bfloat16" else layer)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = [self.q(x)]
        if self.change == "in place":
            x += 1
        if self.change != "left out":
            found.append(self.k(x + 1 if self.change == "another" else x))
        return [*found, self.v(x), self.o(x * 2)]


@pytest.mark.parametrize("change", ["", "in place", "another", "left out"])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", ["quantized", "float32", "bfloat16"])
def test_siblings(kind: str, rows: int, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Four(change, kind)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    given = [torch.randn(rows, 1, model.q.in_features).to(dtype) for _ in range(4)]
    counts = []
    compute = Products.__call__

    def counted(self: Products, x: torch.Tensor) -> list[torch.Tensor]:
        counts.append(len(self.outputs))
        return compute(self, x)

    with torch.inference_mode():
        want = [model(x.clone()) for x in given]
        with decoding(model, rows, PAYS_AFTER_TOKENS):
            assert all("forward" in vars(layer) for layer in model.children())
            got = [model(x.clone()) for x in given[:-1]]
            monkeypatch.setattr(Products, "__call__", counted)
            got.append(model(given[-1].clone()))
            if kind == "quantized":
                assert model.q(given[0].double()).dtype == torch.float64
    # Queries, keys and values in one call, without the output that depends on them.
    assert counts == {"": [3, 1], "in place": [1] * 4, "another": [1] * 4, "left out": [2, 1]}[change]
    for ours, theirs in zip(got, want, strict=True):
        for y, z in zip(ours, theirs, strict=True):
            assert y.is_contiguous()
            # In bfloat16, sums of another order may round to the next number.
            assert (y - z).abs().max() <= (1e-5 if dtype == torch.float32 else 2.0**-7) * z.abs().max()
