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


def test_experts_fold_over_replicas_and_tensor_ranks() -> None:
    mesh = Mesh(dp=2, pp=2, tp=2, ep=4, etp=1)
    plan = Plan.make(mixtral(5), mesh, "Et|tL")
    experts, query = "model.layers.0.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight"
    # dp            0  0  1  1
    # tp            0  1  0  1
    stage = mesh.distinct_ranks(0)
    assert stage == (0, 1, 4, 5)
    assert [plan.part(plan.tensor(experts), rank) for rank in stage] == [0, 1, 2, 3]
    assert [plan.part(plan.tensor(query), rank) for rank in stage] == [0, 1, 0, 1]
    assert [plan.local_shape(experts, rank)[0] for rank in stage] == [2, 1, 1, 1]
    held = [sum(plan.local_shape(experts, rank)[0] for rank in mesh.distinct_ranks(pp)) for pp in range(2)]
    assert held == [5, 5]
    assert plan.rank_bytes(0) - plan.rank_bytes(4) == 4 * 3 * 20 * 28


def test_experts_are_distributed_and_each_is_split() -> None:
    mesh = Mesh(dp=2, tp=2, ep=2)
    plan = Plan.make(mixtral(5), mesh)
    assert (mesh.etp, mesh.expert_groups) == (2, ((0, 1, 2, 3),))
    # experts       0 1 2    3 4
    # inner width   0:10 10:20 on neighbours
    shapes = [plan.local_shape("model.layers.0.mlp.experts.gate_up_proj", rank) for rank in range(4)]
    assert shapes == [(3, 20, 28), (3, 20, 28), (2, 20, 28), (2, 20, 28)]
    down = plan.tensor("model.layers.0.mlp.experts.down_proj")
    assert [down.ranges(plan.part(down, rank)) for rank in range(4)] == [
        (((0, 3),), ((0, 28),), ((0, 10),)), (((0, 3),), ((0, 28),), ((10, 20),)),
        (((3, 5),), ((0, 28),), ((0, 10),)), (((3, 5),), ((0, 28),), ((10, 20),)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "groups"),
    [
        (Mesh(tp=2), ((0,), (1,))),
        (Mesh(tp=4, ep=2), ((0, 1, 2, 3),)),
        (Mesh(dp=2, pp=2, tp=2, ep=2, etp=1), ((0, 1), (2, 3), (4, 5), (6, 7))),
        (Mesh(dp=2, pp=2, tp=2, ep=2), ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
    ids=repr,
)
def test_which_ranks_hold_experts_together(mesh: Mesh, groups: tuple[tuple[int, ...], ...]) -> None:
    assert mesh.expert_groups == groups


MESHES = [
    Mesh(tp=2, ep=2), Mesh(dp=2, pp=2, tp=2, ep=2, etp=1), Mesh(dp=2, ep=2), Mesh(dp=2, tp=2, ep=4, etp=1),
    Mesh(cp=2, dp=2, ep=2), Mesh(dp=3, tp=2, ep=3, etp=1), Mesh(tp=4, ep=2), Mesh(dp=2, tp=3, ep=2, etp=3),
    Mesh(dp=2, pp=2, tp=2, ep=2),
]  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES)
def test_every_element_has_one_owner_and_json_keeps_it(mesh: Mesh) -> None:
    spec = mixtral(5)
    plan = Plan.make(spec, mesh)
    for name, cut in plan.cuts.items():
        owned = 0
        for rank in range(mesh.tp if cut.axis == "tp" else len(mesh.expert_groups[0])):
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
        (mixtral(2), {"tp": 3, "ep": 3}, "ep=3 needs at least 3 experts, but there are 2. Leave ep out"),
        (mixtral(5), {"tp": 2, "etp": 1}, "etp=1 differs from tp=2, but ep is 1"),
        (mixtral(5), {"dp": 48, "ep": 2, "etp": 24}, "cannot each be split over etp=24 ranks, as .* less .* Use etp=1"),
        (mixtral(5), {"dp": 4, "tp": 2, "ep": 8, "etp": 1}, "needs at least 8 experts, but there are 5. Use ep=4"),
    ],
)
def test_refuses_with_the_reason(spec: ModelSpec, mesh: dict[str, int], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        Plan.make(spec, Mesh(**mesh))
