"""Caches that append into buffers: the same tensors and tokens as transformers' concatenation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from partita.generation import Sampling
from partita.torch.generate import generate
from partita.torch.model import cache_buffers
from partita.torch.new import fresh
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

WINDOWS = [None, 1, 5, 200]


@pytest.fixture(autouse=True)
def _small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_buffers, "LARGE", 1)


def entries(window: int | None) -> tuple[Any, Any]:
    """An entry as transformers has it and one with buffers, both filled by the same prompt."""
    plain, ours = (DynamicLayer() if window is None else DynamicSlidingWindowLayer(window) for _ in range(2))
    prompt = torch.randn(3, 2, 7, 4), torch.randn(3, 2, 7, 6)
    for entry in (plain, ours):
        entry.update(*prompt)
    cache_buffers.reserve(SimpleNamespace(layers=[ours]))
    return plain, ours


def appended(plain: Any, ours: Any, lengths: list[int]) -> Iterator[torch.Tensor]:
    for length in lengths:
        new = torch.randn(plain.keys.shape[0], 2, length, 4), torch.randn(plain.keys.shape[0], 2, length, 6)
        want, got = plain.update(*new), ours.update(*new)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        assert torch.equal(plain.keys, ours.keys)
        assert torch.equal(plain.values, ours.values)
        assert plain.get_seq_length() == ours.get_seq_length()
        assert plain.get_mask_sizes(1) == ours.get_mask_sizes(1)
        yield got[0]


@pytest.mark.parametrize("window", WINDOWS)
def test_an_entry_returns_what_concatenation_returns(window: int | None) -> None:
    torch.manual_seed(0)
    plain, ours = entries(window)
    returned = [(keys, keys.clone()) for keys in appended(plain, ours, [1] * 150 + [3, 70, 1, 1])]
    assert all(torch.equal(keys, copy) for keys, copy in returned)
    assert len({keys.untyped_storage().data_ptr() for keys, _ in returned}) < len(returned) // 10


@pytest.mark.parametrize("window", WINDOWS)
def test_an_entry_can_be_reordered_selected_and_cropped(window: int | None) -> None:
    torch.manual_seed(0)
    plain, ours = entries(window)
    list(appended(plain, ours, [1, 1]))
    for entry in (plain, ours):
        entry.reorder_cache(torch.tensor([2, 0, 0]))
    list(appended(plain, ours, [1, 1]))
    for entry in (plain, ours):
        entry.batch_select_indices(torch.tensor([1, 2]))
    list(appended(plain, ours, [1, 2]))
    if window is None or window == 200:
        for entry in (plain, ours):
            entry.crop(-3)
        list(appended(plain, ours, [1, 1]))
    if window is not None:
        for entry in (plain, ours):
            entry.activate_past_recording()
        list(appended(plain, ours, [2]))
        for entry in (plain, ours):
            entry.crop(-1)
    list(appended(plain, ours, [1, 1]))


def test_an_entry_is_freed_with_its_last_reference() -> None:
    _, ours = entries(None)
    gone = weakref.ref(ours)
    gc.disable()
    try:
        del ours
        assert gone() is None
    finally:
        gc.enable()


def tokens(name: str, mesh: dict[str, int], prompts: list[list[int]]) -> list[tuple[list[int], ...]]:
    # Larger weights leave no doubt which token is the most likely.
    model = fresh({**CONFIGS[name], "initializer_range": 0.3}, seed=4, dtype="float64", **mesh)  # type: ignore[arg-type]
    found = []
    for large in (1, 1 << 60):
        cache_buffers.LARGE = large
        try:
            texts = generate(model, prompts, Sampling(max_new_tokens=12, ignore_eos=True))
        finally:
            cache_buffers.LARGE = 1 << 14
        found.append(tuple(list(text.tokens) for text in texts))
    return found


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
@pytest.mark.parametrize("name", ["llama-biases-tied", "mistral"])
def test_generate_gives_the_same_tokens(name: str, mesh: dict[str, int]) -> None:
    for prompts in ([[3, 1, 4, 1, 5, 9]], [[3, 1, 4], [1], [5, 9, 2, 6]]):
        for with_buffers, without in ranks(2).run(tokens, name, mesh, prompts):
            assert with_buffers == without
