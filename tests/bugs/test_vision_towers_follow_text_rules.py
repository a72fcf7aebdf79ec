"""A vision tower's q, k and v were split by the text model's rules, its output projection was not; its table of positions
was taken for the text model's; and the longest list of its layers for the model's layers."""

from __future__ import annotations

import pytest
import torch

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.errors import ModelError
from partita.torch.model.transformers_models import build_on_meta, read_hf_config, rules_of, spec_of
from tests.support.images import IMAGES


def _plan(name: str, *, tp: int = 1, pp: int = 1, layout: str | None = None) -> Plan:
    model = build_on_meta(read_hf_config(IMAGES[name]), torch.float64)
    spec = spec_of(model)
    return Plan.make(spec, Mesh(pp=pp, tp=tp), layout, rules_of(model, spec))


@pytest.mark.parametrize("name", IMAGES)
def test_a_tower_is_whole_and_on_the_stage_of_the_embedding(name: str) -> None:
    over_tp, over_pp = _plan(name, tp=2), _plan(name, pp=2)
    tower = [n for n in over_tp.spec.tensors if "vis" in n or "connector" in n or "projector" in n or "newline" in n]
    assert len(tower) > 10
    assert all(over_tp.tensor(n).split is None for n in tower)
    assert {over_tp.spec.layer_of(path) for path in over_tp.attention} <= {0, 1, 2, 3}
    assert all(over_pp.is_held(n, 0) and not over_pp.is_held(n, 1) for n in tower)
    # The text model is split, and each of its parameters is on one stage (but for a tied head).
    assert over_tp.rank_parameters(0) < over_tp.spec.parameters
    copies = sum(over_pp.spec.tensors[n].numel * (len(ranks) - 1) for n, ranks in over_pp.copies.items())
    assert over_pp.rank_parameters(0) + over_pp.rank_parameters(1) == over_pp.spec.parameters + copies


@pytest.mark.parametrize("name", IMAGES)
def test_layers_and_positions_are_the_text_model_s(name: str) -> None:
    spec = _plan(name).spec
    assert spec.layers.startswith(("model.language_model.", "model.text_model."))
    assert spec.num_layers == 4
    assert spec.positions == 0
    spec.refuse_beyond_positions(200, "a text")


def test_a_plan_keeps_what_its_towers_are() -> None:
    plan = _plan("llava-next", tp=2)
    assert Plan.from_json(plan.to_json()).spec.towers == plan.spec.towers
    assert "model.image_newline" in plan.spec.towers


def test_layers_that_add_features_of_images_are_on_the_first_stage() -> None:
    from partita.torch.stages.cut import refuse_features_elsewhere

    refuse_features_elsewhere(_plan("qwen3-vl", pp=2))
    refuse_features_elsewhere(_plan("qwen3-vl", pp=2, layout="Ett|ttL"))
    for layout in ("Et|tttL", "E|ttttL"):
        with pytest.raises(
            ModelError, match=r"adds image features \(deepstack\) after each of its first 2 layers.*begins with Ett"
        ):
            refuse_features_elsewhere(_plan("qwen3-vl", pp=2, layout=layout))
