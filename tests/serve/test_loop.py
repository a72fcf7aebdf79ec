"""Answers of a serving loop, in float64, against each request alone: random arrivals, lengths, cancellations, seeds, stops."""

from __future__ import annotations

from typing import Any

import pytest

from partita.core.mesh import Mesh
from partita.serving import ServeSettings
from tests.support.ranks import on
from tests.support.serving import compare

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "gemma3_text": {"sliding_window": 5},
    "mistral": {"sliding_window": 4},
    "mixtral": {},
    "mamba": {},
    "bloom": {},
}
"""By family, what differs from the defaults of its config."""

ALONE = {"mamba", "bloom"}
"""Families with a recurrent state, or without positions among their inputs: each request runs in forwards of its own."""

SMALL = ServeSettings(max_sequences=5, prefill_chunk=7, cache_bytes=1 << 20, block_tokens=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank(family: str) -> None:
    assert compare(family, FAMILIES[family], {}, SMALL, 24, 1, family not in ALONE) == []


@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("llama", {"tp": 2}), ("llama", {"pp": 2}), ("llama", {"dp": 2}), ("gemma3_text", {"tp": 2}),
        ("gemma3_text", {"pp": 2}), ("mixtral", {"tp": 2}), ("gpt2", {"pp": 2}), ("mamba", {"pp": 2}),
        ("qwen2", {"tp": 2, "pp": 2}), ("qwen2", {"tp": 2, "dp": 2}), ("llama", {"cp": 2}), ("gemma3_text", {"cp": 3}),
        ("mistral", {"cp": 2, "tp": 2}), ("gpt2", {"cp": 2, "pp": 2}), ("mixtral", {"cp": 2, "ep": 2}),
    ],
)  # fmt: skip
def test_ranks(family: str, where: dict[str, int]) -> None:
    for wrong in on(Mesh(**where).size, compare, family, FAMILIES[family], where, SMALL, 24, 2, family not in ALONE):
        assert wrong == []


@pytest.mark.slow
def test_prompts_divided_over_stages() -> None:
    settings = ServeSettings(max_sequences=3, prefill_chunk=100, cache_bytes=1 << 21, block_tokens=4)
    for wrong in on(2, compare, "llama", {}, {"pp": 2}, settings, 16, 3, True, 90):
        assert wrong == []
