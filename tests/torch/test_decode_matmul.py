"""Products of few rows while decoding: the same values, parameters, tokens, gradients and files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from partita.core.sharding.split import Split
from partita.generation import Sampling
from partita.torch.collectives.comm import Communicator
from partita.torch.generate import generate
from partita.torch.layers.decode_matmul import MOST_PLAIN_ROWS, PAYS_AFTER_TOKENS, decoding
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.new import fresh
from partita.torch.weights.save import save
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

LONG = Sampling(max_new_tokens=PAYS_AFTER_TOKENS, ignore_eos=True)
SHORT = Sampling(max_new_tokens=PAYS_AFTER_TOKENS - 1, ignore_eos=True)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6], [5, 3]]


def decoded(name: str, mesh: dict[str, int], folder: str) -> tuple[list[int], list[int], list[list[int]], float]:
    # Larger weights leave no doubt which token is the likeliest.
    model = fresh({**CONFIGS[name], "initializer_range": 0.3}, seed=4, **mesh)  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = {name: id(p) for name, p in model.named_parameters()}
    short = generate(model, PROMPTS[:1], SHORT)[0].tokens
    several = [list(g.tokens) for g in generate(model, PROMPTS, LONG)]
    model(input_ids=IDS, labels=IDS).loss.backward()
    rows = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    long = generate(model, PROMPTS[:1], LONG)[0].tokens
    assert all(p.is_contiguous() for p in model.parameters())
    assert {name: id(p) for name, p in model.named_parameters()} == kept
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules() if type(module) is nn.Linear)
    model(input_ids=IDS, labels=IDS).loss.backward()
    worst = 0.0
    for name, parameter in model.named_parameters():
        wanted = rows[name]
        assert (wanted is None) == (parameter.grad is None)
        if wanted is not None and parameter.grad is not None:
            worst = max(worst, ((parameter.grad - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item())
    save(model, folder)
    return list(short), list(long), several, worst


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
@pytest.mark.parametrize("name", ["llama-biases-tied", "qwen3", "gpt2", "mixtral"])
def test_all_stays_the_same(name: str, mesh: dict[str, int], tmp_path: Path) -> None:
    for short, long, several, worst in ranks(2).run(decoded, name, mesh, str(tmp_path / "turned")):
        assert long[: len(short)] == short
        assert several[0] == long
        assert worst <= 1e-4
    ranks(1).run(_save_unsplit, name, str(tmp_path / "unsplit"))
    turned, unsplit = (load_file(tmp_path / folder / "model.safetensors") for folder in ("turned", "unsplit"))
    assert turned.keys() == unsplit.keys()
    assert all(torch.equal(turned[name], unsplit[name]) for name in turned)


def _save_unsplit(name: str, folder: str) -> None:
    save(fresh({**CONFIGS[name], "initializer_range": 0.3}, seed=4), folder)


ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Largest error relative to the largest magnitude: 1,024 terms in float32; in bfloat16 a product and a bias are rounded."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "bias"), [(40, 24, True), (1, 1, True), (33, 7, False), (2501, 360, True)]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 16, 30, 49])
def test_a_layer_gives_the_same(rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, outputs, bias=bias, dtype=dtype), torch.randn(rows, 1, inputs).to(dtype)
    twin = copy.deepcopy(layer).double()

    def check(x: torch.Tensor) -> None:
        y, want = layer(x), twin(x.double())
        assert y.dtype == dtype
        assert y.shape == want.shape
        assert (y - want).abs().max() <= ROUNDING[dtype] * want.abs().max()

    for count in (1, 3):
        with torch.no_grad(), threads(count), decoding(layer, rows, PAYS_AFTER_TOKENS):
            assert ("forward" in vars(layer)) == (rows <= MOST_PLAIN_ROWS[dtype])
            check(x)
            check(x[:1])
            # A row of a batch has the bits that it has alone.
            assert rows > MOST_PLAIN_ROWS[dtype] or all(torch.equal(layer(x)[i], layer(x[i])) for i in range(rows))
            check(torch.randn(rows, 7, inputs).to(dtype))
    with torch.no_grad(), decoding(layer, 1, PAYS_AFTER_TOKENS), decoding(layer, rows, PAYS_AFTER_TOKENS):
        check(x)
    check(x)


def test_other_dtypes_and_layers_with_hooks_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4).double(), nn.Linear(4, 6), nn.Linear(6, 4).half())
    model[2].register_forward_hook(lambda *_: None)
    with decoding(model, 1, PAYS_AFTER_TOKENS):
        assert ["forward" in vars(layer) for layer in model] == [True, False, False, False]
    with decoding(model, 1, PAYS_AFTER_TOKENS - 1):
        assert not any("forward" in vars(layer) for layer in model)
    with torch.autocast("cpu"), decoding(model, 1, PAYS_AFTER_TOKENS):
        assert not any("forward" in vars(layer) for layer in model)


def split_layers(dtype: torch.dtype, rows: int, bias: bool) -> list[tuple[float, float]]:
    """Errors of a column, a gathering column and a row layer for `rows` rows, while decoding and without."""
    torch.manual_seed(0)
    comm, unsplit, x = Communicator(), nn.Linear(48, 40, bias=bias).to(dtype), torch.randn(rows, 1, 48).to(dtype)
    layers = [ColumnParallelLinear.from_linear(unsplit, comm, gather_output=gather) for gather in (False, True)]
    columns, split = Split.even(48, 2), Split.even(40, 2)
    begin = columns.ranges(comm.rank)[0][0]
    own = split.ranges(comm.rank)[0][0]
    want = unsplit.double()(x.double()).detach()
    pairs: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = [
        (layers[0], x, want[..., own : own + 20]),
        (layers[1], x, want),
        (RowParallelLinear.from_linear(unsplit.to(dtype), comm), x[..., begin : begin + 24].contiguous(), want),
    ]
    errors = []
    for layer, given, target in pairs:
        usual = (layer(given) - target).abs().max()
        with torch.no_grad(), decoding(layer, rows, PAYS_AFTER_TOKENS):
            assert "forward" in vars(layer)
            errors.append((float((layer(given) - target).abs().max()), float(usual)))
        assert "forward" not in vars(layer)
    return errors


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_split_layers_give_the_same(dtype: torch.dtype, rows: int, bias: bool) -> None:
    for errors in ranks(2).run(split_layers, dtype, rows, bias):
        for error, usual in errors:
            assert error <= 2 * usual + ROUNDING[dtype]
