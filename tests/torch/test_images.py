"""Families that take images or sound, split over tensor and pipeline ranks, against their unsplit selves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.torch import Sampling, generate
from partita.torch.apply import apply_plan, plan_of
from partita.torch.compare import compare
from partita.torch.finish import finish
from partita.torch.float64 import Float64Everywhere
from partita.torch.groups import make_groups
from partita.torch.hub import build_on_meta, read_hf_config, rules_of, spec_of
from partita.torch.probe import fill_unsplit
from partita.torch.towers import MEDIA, sample_media
from tests.support.images import IMAGES
from tests.support.ranks import ranks

FAST = ("llava", "gemma3", "qwen2.5-vl", "qwen3-vl")
"""Families of the default suite; the others are slow tests."""


def families(fast: tuple[str, ...] = FAST) -> list[Any]:
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in IMAGES]


def unsplit_of(data: dict[str, Any]) -> nn.Module:
    return fill_unsplit(build_on_meta(read_hf_config(data), torch.float64))


def unmeasured_split(unsplit: nn.Module, mesh: tuple[int, int]) -> nn.Module:
    """A split copy over (pp, tp) ranks, as the rules say, without the proof on a small model that `shard` begins with."""
    spec = spec_of(unsplit)
    plan = Plan.make(spec, Mesh(pp=mesh[0], tp=mesh[1]), None, rules_of(unsplit, spec))
    groups = make_groups(plan.mesh)
    return finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)


def with_images(unsplit: nn.Module, medium: str = "image") -> dict[str, Tensor]:
    """Rows with two images, one and none."""
    return sample_media(unsplit, next(m for m in MEDIA if m.name == medium))


def _differences(data: dict[str, Any], mesh: tuple[int, int], medium: str) -> tuple[list[Any], set[str], set[str]]:
    unsplit = unsplit_of(data)
    split = unmeasured_split(unsplit, mesh)
    plan, groups = plan_of(split)
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


# --- generating -------------------------------------------------------------------------------------------------------


def _prompts(unsplit: nn.Module) -> tuple[list[list[int]], list[dict[str, Tensor] | None]]:
    """A prompt with an image, one of text alone, and one with an image of another size where that may be."""
    prompts: list[list[int]] = []
    inputs: list[dict[str, Tensor] | None] = []
    for images in ((1, 0, 0), (0, 0, 0), (0, 1, 0)):
        given = sample_media(unsplit, MEDIA[0], images)
        row = images.index(1) if any(images) else 0
        ids, mask = given.pop("input_ids")[row], given.pop("attention_mask")[row].bool()
        prompts.append(ids[mask].tolist())
        rows = ("mm_token_type_ids", "token_type_ids")
        one = {k: v[row : row + 1, mask] if k in rows else v for k, v in given.items()}
        if "pixel_attention_mask" in one:
            one = {k: v[row : row + 1] if k.startswith("pixel") else v for k, v in one.items()}
        inputs.append(one if any(images) else None)
    return prompts, inputs


def _theirs(
    model: nn.Module, prompts: list[list[int]], inputs: list[dict[str, Tensor] | None], sampling: Sampling
) -> list[list[int]]:
    """What transformers' own `generate` continues each prompt with."""
    return [
        model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), **(more or {}), do_sample=False, max_new_tokens=sampling.max_new_tokens,
            eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt, more in zip(prompts, inputs, strict=True)
    ]  # fmt: skip


def _generated(data: dict[str, Any], mesh: tuple[int, int]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    sampling = Sampling(max_new_tokens=6, ignore_eos=True)
    unsplit = unsplit_of(data)
    prompts, inputs = _prompts(unsplit)
    expected = _theirs(unsplit, prompts, inputs, sampling)
    split = unmeasured_split(unsplit, mesh)
    ours = generate(split, prompts, sampling, inputs=inputs)
    return expected, [list(g.tokens) for g in ours], _theirs(split, prompts, inputs, sampling)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)])
@pytest.mark.parametrize("name", families(("gemma3", "qwen2.5-vl")))
def test_generates_what_transformers_does(name: str, mesh: tuple[int, int]) -> None:
    for expected, ours, called_alike in ranks(2).run(_generated, IMAGES[name], mesh):
        assert ours == expected
        assert called_alike == expected
