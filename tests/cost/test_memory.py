"""The counts of all ranks come to the unsplit model's, whatever the mesh; and equal those of the plan."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.core.plan import Plan
from partita.cost.alive import alive
from partita.cost.degrees import degrees_of
from partita.cost.kernels import KERNELS
from partita.cost.memory import cache_bytes, held_by, memory
from partita.cost.model import ModelCost
from partita.cost.stages import stages_of
from partita.cost.work import Arrangement, Work
from partita.errors import PlanError
from partita.schedule import Costs, build, simulate

FAMILIES = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {"intermediate_size": 64},
    "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "mixtral": {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 4},
    "deepseek_v3": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip


def _config(family: str, layers: int, heads: int, tied: bool) -> dict:
    sizes = dict(FAMILIES[family])
    if "num_key_value_heads" in sizes and heads % 2:
        sizes["num_key_value_heads"] = 1
    return {
        **sizes, "model_type": family, "hidden_size": 8 * heads, "num_attention_heads": heads, "num_hidden_layers": layers,
        "vocab_size": 50, "tie_word_embeddings": tied, "dtype": "bfloat16",
    }  # fmt: skip


@st.composite
def cases(draw):
    family = draw(st.sampled_from(sorted(FAMILIES)))
    layers = draw(st.integers(2, 6))
    config = _config(family, layers, draw(st.sampled_from([2, 3, 4])), draw(st.booleans()))
    mesh = Mesh(dp=draw(st.integers(1, 3)), pp=draw(st.integers(1, min(3, layers))), tp=draw(st.integers(1, 3)))
    vpp = draw(st.integers(1, 2)) if mesh.pp > 1 else 1
    cuts = sorted(draw(st.lists(st.integers(0, layers), min_size=mesh.pp * vpp - 1, max_size=mesh.pp * vpp - 1)))
    counts = tuple(b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True))
    return config, mesh, counts


@given(cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ranks_hold_what_the_plan_says(case) -> None:
    config, mesh, counts = case
    spec = spec_from_config(config)
    ends = [0, *accumulate(counts)]
    stages = ["t" * n for n in counts]
    stages[0] = "E" + stages[0]
    stages[-1] += "L"
    try:
        plan = Plan.make(spec, mesh, "|".join(stages))
    except PlanError:
        return
    model = ModelCost.of(spec)
    arrangement = Arrangement(mesh=mesh, layers=counts)
    uses = memory(model, Work(purpose="generate"), arrangement, "torch")
    assert len(uses) == mesh.size
    assert sum(stage.layers for rank in stages_of(model, arrangement) for stage in rank) == spec.num_layers == ends[-1]
    owned = 0
    for rank in range(mesh.size):
        place = mesh.coordinate(rank)
        assert uses[rank].weights == plan.rank_bytes(rank)
        held = held_by(model, stages_of(model, arrangement)[place.pp], degrees_of(mesh), place.tp)
        assert held.parameters == plan.rank_parameters(rank)
        if place.dp == 0:
            owned += sum(
                _owned(plan, cut, place.tp) for cut in plan.held_by(rank)
                if not spec.tensors[cut.name].is_buffer and _is_owner(plan, cut.name, place.pp)
            )  # fmt: skip
    assert owned == spec.parameters


def _is_owner(plan: Plan, name: str, pp: int) -> bool:
    return plan.copies.get(plan.spec.tensors[name].tied_to or name, (pp,))[0] == pp


def _owned(plan: Plan, cut, tp: int) -> int:
    count = 1
    for ranges in cut.owned_ranges(tp):
        count *= sum(b - a for a, b in ranges)
    return count


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_caches_of_all_ranks_are_the_unsplit_one(family: str) -> None:
    model = ModelCost.of(spec_from_config(_config(family, 4, 4, tied=False)))
    work = Work(purpose="generate", sequences=6, context=100)

    def total(mesh: Mesh) -> int:
        degrees, arrangement = degrees_of(mesh), Arrangement(mesh=mesh)
        return mesh.dp * sum(
            cache_bytes(model, work, arrangement, degrees, KERNELS["torch"], stages, tp)
            for stages in stages_of(model, arrangement) for tp in range(mesh.tp)
        )  # fmt: skip

    unsplit = total(Mesh())
    assert unsplit > 0
    for mesh in (Mesh(dp=2), Mesh(pp=2), Mesh(tp=2), Mesh(dp=2, pp=4, tp=2)):
        assert total(mesh) == unsplit


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-v"])
@pytest.mark.parametrize(("pp", "m"), [(2, 3), (4, 8), (3, 30)])
def test_as_many_micro_batches_are_alive_as_the_simulator_counts(kind: str, pp: int, m: int) -> None:
    vpp = 2 if kind in ("interleaved-1f1b", "zb-v") else 1
    peaks = simulate(build(kind, pp, m, vpp if vpp > 1 else None), Costs()).peak_activations
    assert tuple(max(map(sum, counts)) for counts in alive(kind, pp, m, vpp)) == peaks


def test_layers_that_are_not_the_models_are_refused() -> None:
    model = ModelCost.of(spec_from_config(_config("llama", 4, 4, tied=False)))
    with pytest.raises(PlanError, match="come to the 4 layers"):
        memory(model, Work(), Arrangement(mesh=Mesh(pp=2), layers=(2, 3)))


@pytest.mark.parametrize(("mesh", "copies"), [
    (Mesh(dp=2, ep=2), 1), (Mesh(dp=4, ep=2), 2), (Mesh(dp=2, tp=2, ep=4), 1), (Mesh(dp=2, tp=2, ep=2), 1),
    (Mesh(cp=2, tp=2, ep=2), 1),
])  # fmt: skip
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_fold_over_the_ranks_of_a_stage(family: str, mesh: Mesh, copies: int) -> None:
    spec = spec_from_config(_config(family, 3, 4, tied=False))
    model, degrees = ModelCost.of(spec), degrees_of(mesh)
    stages = stages_of(model, Arrangement(mesh=mesh))[0]
    held = [held_by(model, stages, degrees, mesh.coordinate(rank).tp) for rank in range(mesh.size)]
    routed = sum(t.numel for name, t in spec.tensors.items() if ".experts." in name)
    assert degrees.expert_replicas == copies
    assert sum(one.experts for one in held) == copies * routed
    whole = ModelCost.of(spec).sliced(mesh.tp)
    dense = [held_by(model, stages, degrees_of(Mesh(tp=mesh.tp)), tp) for tp in range(mesh.tp)]
    assert len(whole.layers) == mesh.tp
    assert [one.parameters - one.experts for one in held[: mesh.tp]] == [one.parameters - one.experts for one in dense]


def test_more_experts_groups_than_experts_are_refused() -> None:
    model = ModelCost.of(spec_from_config(_config("mixtral", 3, 4, tied=False)))
    with pytest.raises(PlanError, match="more than the 4 experts"):
        memory(model, Work(), Arrangement(mesh=Mesh(dp=8, ep=8)))
