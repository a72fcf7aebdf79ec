"""Families that take images or sound, split over tensor and pipeline ranks, against their unsplit selves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.errors import ModelError, PlanError
from partita.torch import Sampling, fresh, generate, load, save
from partita.torch.collectives.groups import make_groups, single_groups
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.model.towers import MEDIA, forbid_media, media_of, sample_media
from partita.torch.model.transformers_models import build_on_meta, read_hf_config, rules_of, spec_of
from partita.torch.proof.compare import compare
from partita.torch.proof.family import fill_unsplit, plan_of_model, small_model
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from tests.support.images import IMAGES, LLAMA4, SOUND
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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)])
def test_llama_4(mesh: tuple[int, int]) -> None:
    try:
        unsplit_of(LLAMA4)(input_ids=torch.ones(1, 4, dtype=torch.long))
    except AttributeError as error:
        # transformers 5.24 asks its text model's output for images. Partita refuses it with this reason.
        with pytest.raises(ModelError, match=r"no small model .* can be built and run"):
            plan_of_model(build_on_meta(read_hf_config(LLAMA4)), Mesh(tp=2))
        pytest.skip(f"transformers' own forward fails: {error}")
    assert_equal(LLAMA4, mesh)


@pytest.mark.slow
def test_three_ranks_and_seven_heads() -> None:
    assert_equal(IMAGES["llava-7-heads-1-kv"], (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_videos(name: str) -> None:
    for mesh in ((1, 2), (2, 1)):
        assert_equal(IMAGES[name], mesh, "video")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)])
@pytest.mark.parametrize("name", SOUND)
def test_sound(name: str, mesh: tuple[int, int]) -> None:
    assert_equal(SOUND[name], mesh, "audio")


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
@pytest.mark.parametrize("name", families(("qwen2.5-vl",)))
def test_generates_what_transformers_does(name: str, mesh: tuple[int, int]) -> None:
    for expected, ours, called_alike in ranks(2).run(_generated, IMAGES[name], mesh):
        assert ours == expected
        assert called_alike == expected


# --- loading, saving, refusing ----------------------------------------------------------------------------------------


def _round_trip(data: dict[str, Any], folder: str, mesh: tuple[int, int]) -> bool:
    """Write what the ranks drew, read it again, and compare it with the same seed's."""
    made = fresh(data, pp=mesh[0], tp=mesh[1], seed=1)
    save(made, folder)
    again = load(folder, pp=mesh[0], tp=mesh[1])
    plan, _ = plan_of(made)
    there, here = local_tensors(made, plan), local_tensors(again, plan)
    return there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)


def test_any_layout_writes_what_transformers_reads(tmp_path: Path) -> None:
    for mesh in ((1, 2), (2, 1)):
        folder = tmp_path / str(mesh)
        assert ranks(2).run(_round_trip, IMAGES["llava-next"], str(folder), mesh) == [True, True]
    files = [tmp_path / str(mesh) / "model.safetensors" for mesh in ((1, 2), (2, 1))]
    assert files[0].read_bytes() == files[1].read_bytes()
    theirs = LlavaNextForConditionalGeneration.from_pretrained(files[0].parent)
    alone = fresh(IMAGES["llava-next"], seed=1, groups=single_groups())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name


def test_images_that_were_not_measured_are_refused_and_text_is_not() -> None:
    unsplit = unsplit_of(IMAGES["llava"])
    inputs = with_images(unsplit)
    forbid_media(unsplit, {"image": "the forward fails."})
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert unsplit(**text).logits.shape[:2] == inputs["input_ids"].shape
    why = r"could not be verified to match the unsplit model on image inputs: the forward fails"
    with pytest.raises(ModelError, match=why):
        unsplit(**inputs)
    with pytest.raises(ModelError, match=why):
        generate(unsplit, [[1, 2]], Sampling(max_new_tokens=1), inputs=[{"pixel_values": inputs["pixel_values"]}])


def test_inputs_that_the_model_does_not_take() -> None:
    unsplit = unsplit_of(IMAGES["llava"])
    with pytest.raises(
        ModelError, match="prompt 1 comes with pixels, which LlavaForConditionalGeneration does not take"
    ):
        generate(unsplit, [[1], [2]], Sampling(), inputs=[None, {"pixels": torch.ones(1)}])
    with pytest.raises(PlanError, match=r"inputs must have one entry per prompt \(2\); got 1"):
        generate(unsplit, [[1], [2]], Sampling(), inputs=[None])


@pytest.mark.parametrize("name", families(("qwen3-vl",)))
def test_the_proof_tries_images(name: str) -> None:
    """The verdicts that a split model's images rest on are those of a small model of the same kinds of towers."""
    built = build_on_meta(read_hf_config(IMAGES[name]))
    small = small_model(built, spec_of(built).num_heads)
    for medium in media_of(small):
        with Float64Everywhere():
            inputs = sample_media(small, medium)
        assert _effect(small, inputs) > 1e-3


def _effect(small: nn.Module, inputs: dict[str, Tensor]) -> float:
    """How far the images move the output: what feeds the tower is replaced by other numbers."""
    changed = {name: -value if value.is_floating_point() else value for name, value in inputs.items()}
    with Float64Everywhere(), torch.no_grad():
        return float((small(**inputs).logits - small(**changed).logits).abs().max())
