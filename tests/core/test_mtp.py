"""Multi-token prediction as tensors: names and shapes of DeepSeek-V3's files, for any decoder."""

from __future__ import annotations

from typing import Any

import pytest

from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.core.model.mtp import final_norm, mtp_count, with_mtp
from partita.core.model.spec import ModelSpec
from partita.core.plan import Plan
from partita.errors import LayoutError, PlanError
from tests.core.test_families import VARIANTS, small
from tests.core.test_plan import llama

ADDED = ["enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"]


def of(family: str, **changes: Any) -> ModelSpec:
    return spec_from_config(small(family, {**VARIANTS[family][0], **changes}))


def added_to(spec: ModelSpec, count: int) -> list[str]:
    return [name for name in with_mtp(spec, count).tensors if name not in spec.tensors]


def test_llama_with_one_prediction_layer() -> None:
    spec = llama()
    names = added_to(spec, 1)
    last = [n.replace("layers.3.", "layers.4.") for n in spec.tensors if n.startswith("model.layers.3.")]
    assert names == [*last, *(f"model.layers.4.{name}" for name in ADDED)]
    tensors = with_mtp(spec, 1).tensors
    assert tensors["model.layers.4.eh_proj.weight"].shape == (28, 56)
    assert {tensors[f"model.layers.4.{n}"].shape for n in ADDED if "norm" in n} == {(28,)}
    assert all(tensors[name].shape == tensors[name.replace("layers.4.", "layers.3.")].shape for name in last)


def test_they_stand_behind_the_last_layer_and_before_the_norm() -> None:
    names = list(with_mtp(llama(), 2).tensors)
    places = [names.index(name) for name in added_to(llama(), 2)]
    assert places == list(range(places[0], places[0] + len(places)))
    assert names[places[0] - 1].startswith("model.layers.3.")
    assert names[places[-1] + 1] == "model.norm.weight"
    layers = [with_mtp(llama(), 2).layer_of(names[place]) for place in places]
    assert layers == sorted(layers)  # type: ignore[type-var]
    assert set(layers) == {4, 5}


def test_nothing_else_changes() -> None:
    spec, more = llama(), with_mtp(llama(), 3)
    assert {name: more.tensors[name] for name in spec.tensors} == dict(spec.tensors)
    assert (more.num_layers, more.vocab_size, more.config) == (spec.num_layers, spec.vocab_size, spec.config)
    assert with_mtp(spec, 0) is spec


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_is_there_is_counted_and_not_added_again(count: int) -> None:
    spec = with_mtp(llama(), count)
    assert mtp_count(llama()) == 0
    assert mtp_count(spec) == count
    assert with_mtp(spec, count) is spec


def test_norms_with_a_bias_have_one_here_too() -> None:
    spec = of("gpt_neox")
    assert final_norm(spec) == "gpt_neox.final_layer_norm"
    behind = spec.num_layers
    names = {n.removeprefix(f"gpt_neox.layers.{behind}.") for n in added_to(spec, 1)}
    assert {"enorm.weight", "enorm.bias", "hnorm.bias", "shared_head.norm.bias", "eh_proj.weight"} <= names


def test_linear_layers_are_known_where_the_model_s_are() -> None:
    from dataclasses import replace

    spec = replace(llama(), linears=frozenset({"model.layers.3.mlp.up_proj", "model.layers.0.mlp.up_proj", "lm_head"}))
    added = (with_mtp(spec, 2).linears or frozenset()) - (spec.linears or frozenset())
    assert added == {f"model.layers.{layer}.{path}" for layer in (4, 5) for path in ("mlp.up_proj", "eh_proj")}


@pytest.mark.parametrize("family", sorted(VARIANTS))
def test_every_family_has_them_or_says_why_not(family: str) -> None:
    spec = of(family)
    try:
        more = with_mtp(spec, 1)
    except PlanError as refusal:
        said = str(refusal)
    else:
        said = ""
    if said:
        assert "Leave `m` out" in said
        assert "CausalLM" not in spec.architecture or "no norm after its last layer" in said
        return
    hidden = more.tensors[f"{spec.layers}.{spec.num_layers}.eh_proj.weight"].shape
    assert hidden[1] == 2 * hidden[0]
    # The plan deals the new layer out like any other, and cuts what a layer's is cut.
    plan = Plan.make(spec, Mesh(pp=2, tp=2), f"E{'t' * spec.num_layers}|mL")
    assert plan.spec == more
    there = {cut.name for cut in plan.held_by(2) if spec.layer_of(cut.name) is not None}
    assert there == {n for n in more.tensors if more.layer_of(n) == spec.num_layers}


def test_where_a_prediction_layer_is_the_embedding_and_the_last_norm_are_too() -> None:
    plan = Plan.make(llama(), Mesh(pp=4), "Ett|tt|m|L")
    outside = [[cut.name for cut in plan.held_by(rank) if plan.spec.layer_of(cut.name) is None] for rank in range(4)]
    assert outside == [
        ["model.embed_tokens.weight"],
        [],
        ["model.embed_tokens.weight", "model.norm.weight"],
        ["model.norm.weight", "lm_head.weight"],
    ]
    assert plan.copies == {"model.embed_tokens.weight": (0, 2), "model.norm.weight": (2, 3)}
    assert [stage.mtp_layers for rank in range(4) for stage in plan.stages(rank)] == [(), (), (0,), ()]


def test_refusals() -> None:
    with pytest.raises(PlanError, match="does not predict the next token, so it cannot predict several"):
        with_mtp(of("bert"), 1)
    with pytest.raises(LayoutError, match=r"mtp \(m\): 1 expected, 2 found"):
        Plan.make(llama(num_nextn_predict_layers=1), Mesh(pp=2), "Ett|ttmmL")
    # A model that was trained with them may be run without.
    assert mtp_count(Plan.make(llama(num_nextn_predict_layers=1), Mesh(pp=2), "Ett|ttL").spec) == 0


def test_json_round_trip() -> None:
    for layout in ("Ett|ttmL", "Ett|ttm|m|L"):
        plan = Plan.make(llama(tie_word_embeddings=True), Mesh(pp=2, tp=2), layout)
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert again.copies == plan.copies
