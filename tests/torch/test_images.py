"""Families that take images or sound, split over tensor and pipeline ranks, against their unsplit selves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partita.core.mesh import Mesh
from partita.torch.apply import apply_plan
from partita.torch.compare import compare
from partita.torch.finish import finish
from partita.torch.float64 import Float64Everywhere
from partita.torch.groups import make_groups
from partita.torch.hub import build_on_meta, read_hf_config
from partita.torch.probe import fill_unsplit, plan_of_model
from partita.torch.towers import MEDIA, sample_media
from tests.support.images import IMAGES
from tests.support.ranks import ranks

FAST = ("llava", "gemma3", "qwen2.5-vl", "qwen3-vl")
"""Families of the default suite; the others are slow tests."""


def families(fast: tuple[str, ...] = FAST) -> list[Any]:
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in IMAGES]


def unsplit_of(data: dict[str, Any]) -> nn.Module:
    return fill_unsplit(build_on_meta(read_hf_config(data), torch.float64))


def with_images(unsplit: nn.Module, medium: str = "image") -> dict[str, Tensor]:
    """Rows with two images, one and none."""
    return sample_media(unsplit, next(m for m in MEDIA if m.name == medium))


def _differences(data: dict[str, Any], mesh: tuple[int, int], medium: str) -> tuple[list[Any], set[str], set[str]]:
    pp, tp = mesh
    unsplit = unsplit_of(data)
    plan = plan_of_model(unsplit, Mesh(pp=pp, tp=tp))
    groups = make_groups(plan.mesh)
    split = finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)
    with Float64Everywhere():
        found = compare(unsplit, split, plan, groups, with_images(unsplit, medium))
    learned = {name for name, p in unsplit.named_parameters() if p.grad is not None}
    tower = {name for name in learned if plan.spec.is_in_tower(name)}
    return [(d.kind, d.name, d.error) for d in found], learned, tower


def assert_equal(data: dict[str, Any], mesh: tuple[int, int], medium: str = "image") -> None:
    for found, learned, tower in ranks(mesh[0] * mesh[1]).run(_differences, data, mesh, medium):
        assert [d for d in found if not d[2] <= _tolerance(d[1])] == []
        # The tower was used, and each parameter that learns was compared.
        assert len(tower) > 10
        assert learned <= {name for kind, name, _ in found if kind == "gradient"}


def _tolerance(name: str) -> float:
    # The same number added to all scores of a query changes no softmax: a key's bias has no gradient but rounding.
    return 1e-10 if name.endswith("k_proj.bias") else 1e-12


@pytest.mark.parametrize("name", families())
def test_tensor_ranks_equal_the_unsplit_model(name: str) -> None:
    assert_equal(IMAGES[name], (1, 2))


@pytest.mark.parametrize("name", families())
def test_stages_equal_the_unsplit_model(name: str) -> None:
    assert_equal(IMAGES[name], (2, 1))
