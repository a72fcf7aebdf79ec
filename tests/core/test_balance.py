"""Layers over stages by bytes: never a larger stage than with even counts, and none smaller is possible."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.core.layout.balance import balance
from partita.core.layout.layout import LayerType
from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.core.plan import Plan, default_layout
from partita.core.sharding.split import deal
from tests.cli.models import DEEPSEEK_V3, LLAMA_8B


def largest(counts: list[int], sizes: list[int], first: int, last: int) -> int:
    edges = [0]
    for count in counts:
        edges.append(edges[-1] + count)
    held = [sum(sizes[start:end]) for start, end in pairwise(edges)]
    held[0] += first
    held[-1] += last
    return max(held)


@st.composite
def models(draw: st.DrawFn, most: int) -> tuple[list[int], int, int, int]:
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=most))
    return sizes, draw(st.integers(1, len(sizes))), draw(st.integers(0, 40)), draw(st.integers(0, 40))


@given(models(most=9))
def test_no_distribution_has_a_smaller_largest_stage(model: tuple[list[int], int, int, int]) -> None:
    sizes, stages, first, last = model
    found = balance(sizes, deal(len(sizes), stages), first, last)
    assert (len(found), sum(found), min(found) >= 1) == (stages, len(sizes), True)
    best = min(
        largest([end - start for start, end in pairwise((0, *edges, len(sizes)))], sizes, first, last)
        for edges in combinations(range(1, len(sizes)), stages - 1)
    )
    assert largest(found, sizes, first, last) == best


@given(models(most=200))
def test_the_largest_stage_is_no_larger_than_with_even_counts(model: tuple[list[int], int, int, int]) -> None:
    sizes, stages, first, last = model
    even = deal(len(sizes), stages)
    found = balance(sizes, even, first, last)
    assert (len(found), sum(found), min(found) >= 1) == (stages, len(sizes), True)
    assert largest(found, sizes, first, last) <= largest(even, sizes, first, last)
    if largest(even, sizes, first, last) == largest(found, sizes, first, last):
        assert found == even


@pytest.mark.parametrize(
    ("config", "pp", "vpp", "counts"),
    [
        (LLAMA_8B, 5, 1, [7, 7, 6, 6, 6]),
        (LLAMA_8B | {"vocab_size": 4_000_000}, 2, 1, [16, 16]),
        (LLAMA_8B, 2, 2, [8, 8, 8, 8]),
    ],
)
def test_equal_layers_are_distributed_evenly(config: dict[str, Any], pp: int, vpp: int, counts: list[int]) -> None:
    made = default_layout(spec_from_config(config), pp, vpp)
    assert [stage.count(LayerType.decoder) for stage in made.stages] == counts


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (3, 1), (4, 1), (8, 1), (16, 1), (61, 1), (4, 2)])
def test_the_first_dense_layers_of_deepseek(pp: int, vpp: int) -> None:
    """58 of 61 layers have experts and 20 times the bytes of the first three."""
    spec = spec_from_config(DEEPSEEK_V3)
    plan = Plan.make(spec, Mesh(pp=pp), vpp=vpp)
    even = [*deal(61, pp * vpp)]
    counts = [len(plan.stage_at(i).layers) for i in range(pp * vpp)]
    outside = spec.bytes_of(spec.tensors["model.embed_tokens.weight"])
    held = (list(spec.layer_bytes), outside, outside + 7168 * 2)
    assert largest(counts, *held) <= largest(even, *held)
    if pp == 4 and vpp == 1:
        assert counts == [17, 15, 15, 14]
        most = max(plan.rank_bytes(rank) for rank in range(4))
        by_count = Plan.make(spec, Mesh(pp=4), "Et*16|t*15|t*15|t*15L")
        assert most < max(by_count.rank_bytes(rank) for rank in range(4))
        assert most == largest(counts, *held)


def test_a_layout_of_the_user_is_kept() -> None:
    spec = spec_from_config(DEEPSEEK_V3)
    assert str(Plan.make(spec, Mesh(pp=2), "Et*31|t*30L").layout) == "Et*31|t*30L"


def test_a_tied_head_counts_on_the_last_stage() -> None:
    """The stage with the loss holds a copy of the embedding."""
    spec = spec_from_config(DEEPSEEK_V3 | {"tie_word_embeddings": True})
    plan = Plan.make(spec, Mesh(pp=2))
    embedding = spec.bytes_of(spec.tensors["model.embed_tokens.weight"])
    assert (plan.bytes_outside_layers(0), plan.bytes_outside_layers(1)) == (embedding, embedding + 7168 * 2)
