"""Plans that distribute complete experts: every expert on one rank, also where they do not divide, or a reason why not."""

from __future__ import annotations

from typing import Any

import pytest

from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.core.model.spec import ModelSpec
from partita.core.plan import Plan
from partita.errors import PlanError
from tests.core.test_plan import llama


def mixtral(experts: int) -> ModelSpec:
    data: dict[str, Any] = {
        "model_type": "mixtral", "vocab_size": 31, "hidden_size": 28, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 4, "num_local_experts": experts,
    }  # fmt: skip
    return spec_from_config(data)


def test_experts_are_distributed_unevenly() -> None:
    plan = Plan.make(mixtral(5), Mesh(tp=3, ep=3))
    cut = plan.tensor("model.layers.0.mlp.experts.down_proj")
    assert (cut.dim, str(cut.split)) == (0, "5 = [0: 0:2, 1: 2:4, 2: 4:5]")
    assert [plan.local_shape(cut.name, rank) for rank in range(3)] == [(2, 28, 20), (2, 28, 20), (1, 28, 20)]
    # Other layers are split as without ep.
    others = Plan.make(mixtral(5), Mesh(tp=3))
    for name, other in others.cuts.items():
        assert ".experts." in name or plan.tensor(name) == other


@pytest.mark.parametrize("mesh", [Mesh(tp=2, ep=2), Mesh(dp=2, pp=2, tp=2, ep=2, etp=1)])
def test_every_element_has_one_owner_and_json_keeps_it(mesh: Mesh) -> None:
    spec = mixtral(5)
    plan = Plan.make(spec, mesh)
    for name, cut in plan.cuts.items():
        owned = 0
        for rank in range(mesh.tp):
            size = 1
            for ranges in cut.owned_ranges(rank):
                size *= sum(stop - start for start, stop in ranges)
            owned += size
        assert owned == spec.tensors[name].numel
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("spec", "mesh", "why"),
    [
        (llama(), {"tp": 2, "ep": 2}, r"no layer of the model \(llama\) has fused experts. Leave ep out"),
        (mixtral(2), {"tp": 3, "ep": 3}, "ep=3 needs at least 3 experts, but there are 2. Use ep=2 or less"),
        (mixtral(5), {"tp": 2, "etp": 1}, "etp=1 differs from tp=2, but ep is 1"),
    ],
)
def test_refuses_with_the_reason(spec: ModelSpec, mesh: dict[str, int], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        Plan.make(spec, Mesh(**mesh))
