"""Plans of every family that Partita knows: who holds what, whether it adds up, and that a plan survives being written."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from partita.core.layout.placement import Placement
from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.core.model.spec import ModelSpec, TensorSpec, spec_from_tensors
from partita.core.plan import Plan, Stage, default_layout
from partita.core.sharding.cuts import AttentionPlan, ModulePlan
from partita.core.sharding.rules import (
    PROVEN,
    TABLES,
    Rule,
    Rules,
    isolate,
    isolated_rules,
    rules_for,
    rules_from_tp_plan,
)
from partita.core.sharding.split import Split
from partita.errors import LayoutError, PlanError
from tests.core.test_families import VARIANTS, small

FAMILY_VARIANTS = [
    pytest.param(f, v, id=f"{f}-{i}") for f, variants in VARIANTS.items() for i, v in enumerate(variants)
]


@cache
def llama(**changes: Any) -> ModelSpec:
    return spec_from_config(
        {
            "model_type": "llama", "vocab_size": 31, "hidden_size": 28, "intermediate_size": 17, "num_hidden_layers": 4,
            "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 4, **changes,
        }
    )  # fmt: skip


def q_o_kv(plan: Plan, layer: str) -> list[Split | None]:
    return [plan.tensor(f"{layer}.self_attn.{name}_proj.weight").split for name in "qokv"]


# --- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "variant"), FAMILY_VARIANTS)
def test_every_element_has_one_owner(family: str, variant: dict[str, Any]) -> None:
    spec = spec_from_config(small(family, variant))
    for tp in range(1, 7):
        plan = Plan.make(spec, Mesh(tp=tp))
        assert list(plan.cuts) == list(spec.tensors)
        owned_parameters = 0
        for name, cut in plan.cuts.items():
            assert cut.shape == spec.tensors[name].shape
            owned = 0
            for rank in range(tp):
                held, own = cut.ranges(rank), cut.owned_ranges(rank)
                local = tuple(sum(b - a for a, b in ranges) for ranges in held)
                assert local == cut.local_shape(rank) == plan.local_shape(name, rank)
                owned += TensorSpec("", tuple(sum(b - a for a, b in ranges) for ranges in own)).numel
            assert owned == spec.tensors[name].numel
            if spec.tensors[name].tied_to is None and not spec.tensors[name].is_buffer:
                owned_parameters += owned
        assert owned_parameters == spec.parameters


def fits(columns: Split, row: Split) -> bool:
    """Whether a column layer's outputs, or each half of them, are what a row layer takes."""
    return columns in (row, Split.concat([row, row]))


def heads_of(row: Split, attention: AttentionPlan) -> Split | None:
    """Which heads a row layer takes as its inputs, where they are whole heads."""
    width, rest = divmod(row.size, attention.num_heads)
    edges = [edge for ranges in row.by_rank for r in ranges for edge in r]
    if rest or any(edge % width for edge in edges):
        return None
    return Split(attention.num_heads, tuple(tuple((a // width, b // width) for a, b in r) for r in row.by_rank))


@pytest.mark.parametrize(("family", "variant"), FAMILY_VARIANTS)
def test_what_leaves_a_column_layer_enters_a_row_layer(family: str, variant: dict[str, Any]) -> None:
    spec = spec_from_config(small(family, variant))
    for tp in (2, 3, 4, 5):
        plan = Plan.make(spec, Mesh(tp=tp))
        for path, module in plan.modules.items():
            assert path in spec.modules
            if module.style == "column" and not module.gather_output:
                # A row layer of the same layer takes what it puts out: of packed parts, the last one's.
                assert module.split is not None
                layer = f"{spec.layers}.{spec.layer_of(path)}."
                rows = [m.split for p, m in plan.modules.items() if m.style == "row" and p.startswith(layer)]
                attention = plan.attention.get(path.rpartition(".")[0])
                if attention is None:
                    assert any(row and fits(module.split, row) for row in rows), path
                else:
                    assert any(row and heads_of(row, attention) == attention.heads for row in rows), path
            if module.gather_output:
                assert module.split is not None
                assert module.split.is_partition, path
        for path, attention in plan.attention.items():
            group = attention.num_heads // attention.num_kv_heads
            for rank in range(tp):
                held = {head // group for a, b in attention.heads.ranges(rank) for head in range(a, b)}
                ((start, stop),) = attention.kv_heads.ranges(rank)
                assert held == set(range(start, stop)), path
                assert attention.local_heads(rank) % attention.local_kv_heads(rank) == 0


@pytest.mark.parametrize(("family", "variant"), FAMILY_VARIANTS)
def test_stages_hold_every_tensor_once(family: str, variant: dict[str, Any]) -> None:
    spec = spec_from_config(small(family, variant))
    last_stage = spec.num_layers - 1
    plan = Plan.make(spec, Mesh(dp=2, pp=spec.num_layers, tp=2))
    seen: dict[str, list[int]] = {}
    for pp in range(spec.num_layers):
        rank = plan.mesh.rank(dp=1, pp=pp, tp=1)
        assert plan.held_by(rank) == plan.held_by(plan.mesh.rank(pp=pp))
        for cut in plan.held_by(rank):
            seen.setdefault(cut.name, []).append(pp)
            assert (layer := spec.layer_of(cut.name)) is None or layer in plan.rank_layers(rank)
    for name, tensor in spec.tensors.items():
        # What is tied to a tensor of the same stage is held once, and of another stage twice.
        assert len(seen.get(name, ())) == 1 or seen[tensor.tied_to or ""] == [last_stage], name
    outside = {name: stages[0] for name, stages in seen.items() if spec.layer_of(name) is None}
    first = [name for name, stage in outside.items() if stage == 0]
    last = [name for name, stage in outside.items() if stage == last_stage]
    assert {*first, *last} == {*outside}
    start = min(i for i, name in enumerate(spec.tensors) if spec.layer_of(name) == 0)
    # State dicts are in the order of use, but for OPT's, whose last norm stands before its layers.
    before = [name for name in spec.tensors if list(spec.tensors).index(name) < start]
    assert first == [name for name in before if "final_layer_norm" not in name and "project_out" not in name]
    assert any(n.startswith(("lm_head", "cls", "vocab_projector", "embed_out")) for n in last)


@pytest.mark.parametrize(("family", "variant"), FAMILY_VARIANTS)
def test_json_round_trip(family: str, variant: dict[str, Any]) -> None:
    spec = spec_from_config(small(family, variant))
    for mesh in (Mesh(), Mesh(tp=3), Mesh(2, 2, 4), Mesh(tp=5)):
        plan = Plan.make(spec, mesh)
        for indent in (None, 1):
            again = Plan.from_json(plan.to_json(indent=indent))
            assert again == plan
            assert hash(again) == hash(plan)
            assert again.to_json() == plan.to_json()
            assert again.spec == plan.spec
            assert [again.rank_bytes(r) for r in range(mesh.size)] == [plan.rank_bytes(r) for r in range(mesh.size)]


# --- grids ------------------------------------------------------------------------------------------------------------


def test_llama_with_seven_heads_and_one_kv_head() -> None:
    plan = Plan.make(llama(), Mesh(tp=3))
    #   tensor                      rank 0    rank 1    rank 2
    for name, *shapes in (
        ("model.embed_tokens.weight", (11, 28), (10, 28), (10, 28)),
        ("layers.0.self_attn.q_proj", (12, 28), (8, 28), (8, 28)),
        ("layers.0.self_attn.k_proj", (4, 28), (4, 28), (4, 28)),
        ("layers.0.self_attn.v_proj", (4, 28), (4, 28), (4, 28)),
        ("layers.0.self_attn.o_proj", (28, 12), (28, 8), (28, 8)),
        ("layers.0.mlp.gate_proj", (6, 28), (6, 28), (5, 28)),
        ("layers.0.mlp.up_proj", (6, 28), (6, 28), (5, 28)),
        ("layers.0.mlp.down_proj", (28, 6), (28, 6), (28, 5)),
        ("layers.0.input_layernorm", (28,), (28,), (28,)),
        ("lm_head.weight", (11, 28), (10, 28), (10, 28)),
    ):
        full = name if name.endswith(".weight") else f"model.{name}.weight"
        assert [plan.local_shape(full, rank) for rank in range(3)] == shapes, name
    keys = plan.tensor("model.layers.0.self_attn.k_proj.weight")
    assert keys.partial_grad
    assert not plan.tensor("model.layers.0.self_attn.q_proj.weight").partial_grad
    assert not plan.tensor("model.layers.0.input_layernorm.weight").partial_grad
    # 3, 2 and 2 query heads attend to the one KV head: nothing to expand.
    assert plan.modules["model.layers.0.self_attn.k_proj"].expand == ()
    # (31 * 2 rows + 4 layers) of 28, every part counted on the rank that has it
    assert (
        sum(plan.rank_parameters(rank) for rank in range(3))
        == plan.spec.parameters + 2 * 4 * (2 * 4 * 28 + 56) + 2 * 28
    )
    assert plan.rank_bytes(0) == 4 * plan.rank_parameters(0)


def test_kv_heads_are_expanded_where_their_number_of_queries_differs() -> None:
    spec = llama(hidden_size=56, num_attention_heads=14, num_key_value_heads=2)
    plan = Plan.make(spec, Mesh(tp=3))
    keys = plan.modules["model.layers.0.self_attn.k_proj"]
    # Ranks 0 and 2 attend to one KV head; rank 1 has two queries of the first and three of the second.
    assert keys.expand == (None, (0, 0, 1, 1, 1), None)
    assert keys.expand_width == 4
    attention = plan.attention["model.layers.0.self_attn"]
    assert [attention.local_heads(r) for r in range(3)] == [5, 5, 4]
    assert [attention.local_kv_heads(r) for r in range(3)] == [1, 5, 1]
    assert plan.modules["model.layers.0.self_attn.q_proj"].expand == ()


def test_packed_projections_are_cut_in_each_of_their_parts() -> None:
    spec = spec_from_config(
        small("phi3", {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 10})
    )
    plan = Plan.make(spec, Mesh(tp=3))
    packed = plan.tensor("model.layers.0.self_attn.qkv_proj.weight")  # 4 query heads, 2 of keys, 2 of values, 8 wide
    assert packed.split is not None
    assert packed.split.by_rank == (
        ((0, 16), (32, 40), (48, 56)),
        ((16, 24), (40, 48), (56, 64)),
        ((24, 32), (40, 48), (56, 64)),
    )
    gate_up = plan.tensor("model.layers.0.mlp.gate_up_proj.weight")
    assert gate_up.split is not None
    assert gate_up.split.by_rank == (((0, 4), (10, 14)), ((4, 7), (14, 17)), ((7, 10), (17, 20)))
    down = plan.tensor("model.layers.0.mlp.down_proj.weight")
    assert (down.dim, down.split) == (1, Split.even(10, 3))


def test_conv1d_is_cut_the_other_way_round() -> None:
    plan = Plan.make(spec_from_config(small("gpt2", {})), Mesh(tp=2))
    layer = "transformer.h.0"
    assert plan.local_shape(f"{layer}.attn.c_attn.weight", 0) == (32, 48)
    assert plan.tensor(f"{layer}.attn.c_attn.bias").ranges(1) == (((16, 32), (48, 64), (80, 96)),)
    assert plan.local_shape(f"{layer}.attn.c_proj.weight", 0) == (16, 32)
    assert plan.local_shape(f"{layer}.attn.c_proj.bias", 0) == (32,)
    assert plan.local_shape("transformer.wpe.weight", 0) == plan.spec.tensors["transformer.wpe.weight"].shape


def test_experts_are_cut_in_their_inner_width() -> None:
    plan = Plan.make(spec_from_config(small("qwen3_moe", VARIANTS["qwen3_moe"][0])), Mesh(tp=5))
    up, down = (plan.tensor(f"model.layers.0.mlp.experts.{name}") for name in ("gate_up_proj", "down_proj"))
    assert [up.local_shape(r) for r in range(5)] == [(5, 10, 32)] * 4 + [(5, 8, 32)]
    assert [down.local_shape(r) for r in range(5)] == [(5, 32, 5)] * 4 + [(5, 32, 4)]
    assert up.ranges(4)[1] == ((20, 24), (44, 48))
    assert plan.local_shape("model.layers.0.mlp.gate.weight", 3) == (5, 32)


def test_latent_attention_replicates_what_all_heads_share() -> None:
    plan = Plan.make(spec_from_config(small("deepseek_v3", VARIANTS["deepseek_v3"][0])), Mesh(tp=2))
    attention = "model.layers.1.self_attn"
    assert plan.modules[f"{attention}.kv_a_proj_with_mqa"] == ModulePlan(
        f"{attention}.kv_a_proj_with_mqa", "replicate", copy_output=4
    )
    assert plan.local_shape(f"{attention}.q_b_proj.weight", 0) == (2 * 10, 10)
    assert plan.local_shape(f"{attention}.kv_b_proj.weight", 1) == (2 * 15, 14)
    assert plan.local_shape(f"{attention}.o_proj.weight", 1) == (32, 18)
    buffer = plan.tensor("model.layers.1.mlp.gate.e_score_correction_bias")
    assert plan.spec.tensors[buffer.name].is_buffer
    assert plan.rank_bytes(0) == 4 * (
        plan.rank_parameters(0) + sum(t.is_buffer * 5 for t in plan.spec.tensors.values())
    )


def test_norms_of_heads_sum_their_gradients() -> None:
    plan = Plan.make(spec_from_config(small("qwen3", {"num_key_value_heads": 2})), Mesh(tp=2))
    norm = plan.tensor("model.layers.0.self_attn.q_norm.weight")
    assert norm.partial_grad
    assert norm.split is None
    assert norm.owned_ranges(0) == (((0, 128),),)
    assert norm.owned_ranges(1) == ((),)


# --- fewer than ranks -------------------------------------------------------------------------------------------------


def test_fewer_heads_than_ranks_splits_each_projection_by_itself() -> None:
    spec = llama(hidden_size=12, num_attention_heads=3, num_key_value_heads=3)
    plan = Plan.make(spec, Mesh(tp=4))
    assert not plan.attention
    for name in "qkv":
        module = plan.modules[f"model.layers.0.self_attn.{name}_proj"]
        assert (module.style, module.split, module.gather_output) == ("column", Split.even(12, 4), True)
    module = plan.modules["model.layers.0.self_attn.o_proj"]
    assert (module.style, module.split, module.split_input) == ("row", Split.even(12, 4), True)
    # The rest is split as ever.
    assert plan.modules["model.layers.0.mlp.up_proj"].gather_output is False
    assert Plan.make(spec, Mesh(tp=3)).attention


def test_what_is_narrower_than_the_ranks_stays_whole() -> None:
    spec = llama(intermediate_size=3, vocab_size=4)
    plan = Plan.make(spec, Mesh(tp=5))
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert plan.tensor(f"model.layers.0.{name}.weight").split is None
        assert f"model.layers.0.{name}" not in plan.modules
    assert plan.tensor("model.embed_tokens.weight").split is None
    assert "lm_head" not in plan.modules
    assert plan.modules["model.layers.0.self_attn.q_proj"].split == Split.heads(7, 1, 5, width=4)


def test_norms_and_latent_parts_are_not_partial_where_attention_is_not_split() -> None:
    for family in ("qwen3", "deepseek_v3"):
        plan = Plan.make(spec_from_config(small(family, VARIANTS[family][0])), Mesh(tp=5))  # 4 heads
        assert not plan.attention
        assert not any(module.copy_output for module in plan.modules.values())
        assert not any(cut.partial_grad for cut in plan.cuts.values())


# --- ties -------------------------------------------------------------------------------------------------------------


def test_tied_head_is_cut_as_the_embedding() -> None:
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    for tp in (2, 3):
        plan = Plan.make(tied, Mesh(tp=tp))
        head, embedding = plan.tensor("lm_head.weight"), plan.tensor("model.embed_tokens.weight")
        assert (head.dim, head.split) == (embedding.dim, embedding.split) == (0, Split.even(31, tp))
        apart = Plan.make(untied, Mesh(tp=tp))
        for rank in range(tp):
            assert apart.rank_parameters(rank) - plan.rank_parameters(rank) == Split.even(31, tp).local_size(rank) * 28
            names = [cut.name for cut in plan.held_by(rank)]
            assert "lm_head.weight" not in names
    # Over two stages both have it.
    plan = Plan.make(tied, Mesh(pp=2))
    assert plan.held_by(0)[0].name == "model.embed_tokens.weight"
    assert plan.held_by(1)[-1].name == "lm_head.weight"
    assert plan.rank_parameters(0) + plan.rank_parameters(1) == tied.parameters + 31 * 28


def test_a_tied_head_that_no_rule_names_follows_the_embedding() -> None:
    plan = Plan.make(llama(tie_word_embeddings=True), Mesh(tp=2), rules=Rules.parse({"embed_tokens": "vocab"}))
    assert plan.modules["lm_head"].style == "vocab"
    plan = Plan.make(spec_from_config(small("distilbert", {})), Mesh(tp=2))
    assert plan.modules["vocab_projector"].split == plan.modules["distilbert.embeddings.word_embeddings"].split
    assert plan.local_shape("vocab_projector.bias", 0) == (48,)


def test_ties_of_which_one_cannot_be_cut_stay_whole() -> None:
    spec = llama(tie_word_embeddings=True)
    plan = Plan.make(spec, Mesh(tp=2), rules=Rules.parse({"lm_head": "vocab", "up_proj": "column"}))
    assert {path.rpartition(".")[2] for path in plan.modules} == {"up_proj"}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert plan.tensor(name).split is None
        assert plan.local_shape(name, 1) == (31, 28)


def test_ties_that_are_cut_differently_are_refused() -> None:
    rules = Rules.parse({"lm_head": "row", "embed_tokens": "vocab"})
    with pytest.raises(PlanError, match=r"lm_head.weight shares its memory with model.embed_tokens.weight.*same style"):
        Plan.make(llama(tie_word_embeddings=True), Mesh(tp=2), rules=rules)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_layers_are_dealt_out_evenly_by_default() -> None:
    for num_layers in range(1, 12):
        for pp in range(1, num_layers + 1):
            plan = Plan.make(llama(num_hidden_layers=num_layers), Mesh(pp=pp))
            layers = [plan.rank_layers(rank) for rank in range(pp)]
            assert [i for mine in layers for i in mine] == list(range(num_layers))
            assert max(map(len, layers)) - min(map(len, layers)) <= 1
            assert [len(mine) for mine in layers] == sorted(map(len, layers), reverse=True)


def test_stages_of_a_layout() -> None:
    plan = Plan.make(llama(), Mesh(pp=2, tp=2), "Et|t||t|t|L")
    empty = Stage((), (), embedding=False, loss=False)
    assert plan.stages(0) == (Stage((0,), (), True, False), empty, Stage((3,), (), False, False))
    assert plan.stages(1) == (Stage((1,), (), False, False), Stage((2,), (), False, False), Stage((), (), False, True))
    assert plan.stage(1, 1) == plan.stages(1)[1]
    assert [plan.rank_layers(rank) for rank in range(4)] == [(0, 3), (0, 3), (1, 2), (1, 2)]
    assert {plan.spec.layer_of(cut.name) for cut in plan.held_by(2)} == {1, 2, None}
    assert [cut.name for cut in plan.held_by(3) if plan.spec.layer_of(cut.name) is None] == [
        "model.norm.weight",
        "lm_head.weight",
    ]


def test_an_empty_rank_holds_nothing() -> None:
    plan = Plan.make(llama(), Mesh(pp=3), "Ett||ttL")
    assert plan.held_by(1) == ()
    assert plan.rank_parameters(1) == plan.rank_bytes(1) == 0
    assert plan.rank_layers(1) == ()


def test_embedding_and_loss_may_stand_alone() -> None:
    plan = Plan.make(llama(), Mesh(pp=4), ["E", "tt", "tt", "L"])
    assert [cut.name for cut in plan.held_by(0)] == ["model.embed_tokens.weight"]
    assert [cut.name for cut in plan.held_by(3)] == ["model.norm.weight", "lm_head.weight"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_layouts_that_do_not_fit() -> None:
    for layout, match in (
        ("Ettt|L", r"decoder \(t\): 4 expected, 3 found; add 1"),
        ("Ettttt|L", r"decoder \(t\): 4 expected, 5 found; remove 1"),
        ("tttt|L", r"embedding \(E\): 1 expected, 0 found"),
        ("Ett|tt", r"loss \(L\): 1 expected, 0 found"),
        ("Ett|t|tL", "The number of stages must be a multiple"),
    ):
        with pytest.raises(LayoutError, match=match):
            Plan.make(llama(), Mesh(pp=2), layout)
    with pytest.raises(PlanError, match=r"layout was made for pp=2, but the mesh has pp=1. Make it with"):
        Plan.make(llama(), Mesh(), default_layout(llama(), 2))
    with pytest.raises(PlanError, match=r"pp=5 needs at least 5 layers, but the model has 4. Use pp=4 or less"):
        Plan.make(llama(), Mesh(pp=5))


def test_models_without_facts() -> None:
    tensors = {name: TensorSpec(name, shape) for name, shape in {
        "embed_tokens.weight": (10, 8), "self_attn.q_proj.weight": (8, 8), "norm.weight": (8,),
    }.items()}  # fmt: skip
    spec = spec_from_tensors(tensors)
    assert (spec.layers, spec.num_layers, spec.num_heads) == ("", 0, 0)
    assert Plan.make(spec, Mesh()).rank_parameters(0) == 152
    with pytest.raises(PlanError, match=r"unknown: no list of layers was found in the model.*Use pp=1"):
        Plan.make(spec, Mesh(pp=2))
    with pytest.raises(PlanError, match=r"self_attn.q_proj: the config has no number of attention heads"):
        Plan.make(spec, Mesh(tp=2))
    plan = Plan.make(spec, Mesh(tp=2), rules=Rules.parse({"q_proj": "column gather_output"}))
    assert plan.local_shape("self_attn.q_proj.weight", 0) == (4, 8)


def test_rules_that_are_not_right_for_the_model() -> None:
    for table, match in (
        (
            {"self_attn.o_proj": "row qkv"},
            r"o_proj: its 28 inputs are not a multiple of 9, as `qkv` with 7 heads and 1 KV",
        ),
        (
            {"q_proj": "column kv_heads", "mlp.up_proj": "column heads"},
            r"up_proj: its 17 outputs are not a multiple of 7",
        ),
        ({"gate_proj": "column gate_up"}, r"gate_proj: its 17 outputs are not a multiple of 2"),
        (
            {"self_attn.q_proj": "column qkv_by_head"},
            r"qkv_by_head needs as many KV heads as heads, but there are 1 and 7",
        ),
        (
            {"input_layernorm": "column"},
            r"input_layernorm: the style column needs a weight of two dimensions, .* \(28,\)",
        ),
    ):
        with pytest.raises(PlanError, match=match):
            Plan.make(llama(), Mesh(tp=2), rules=Rules.parse(table))


def test_asking_for_what_is_not_there() -> None:
    plan = Plan.make(llama(), Mesh(tp=2))
    with pytest.raises(PlanError, match=r"the plan's model \(llama\) has no tensor 'model.nothing'"):
        plan.tensor("model.nothing")
    with pytest.raises(PlanError, match=r"rank must be in \[0, 2\)"):
        plan.held_by(2)


# --- rules ------------------------------------------------------------------------------------------------------------


def test_patterns_match_the_end_of_a_path() -> None:
    table = {
        ("q_proj", "model.layers.0.self_attn.q_proj"): True,
        ("q_proj", "q_proj"): True,
        ("q_proj", "model.seq_proj"): False,
        ("q_proj", "model.q_proj.linear"): False,
        ("layers.*.q_proj", "model.layers.11.q_proj"): True,
        ("layers.*.q_proj", "model.layers.11.self_attn.q_proj"): False,
        ("self_attn.{q,k}_proj", "a.self_attn.k_proj"): True,
        ("self_attn.{q,k}_proj", "a.self_attn.v_proj"): False,
        ("{lm_head,embed_out}", "embed_out"): True,
        ("a.b", "axb"): False,
        ("w*", "layers.w1"): True,
        ("w*", "layers.w.x"): False,
    }
    for (pattern, path), expected in table.items():
        assert Rule(pattern, "column").matches(path) is expected, (pattern, path)


@pytest.mark.parametrize("pattern", ["{q,k", "q,k}_proj", "a*{q", "{a{b}}", "}{"])
def test_patterns_with_an_open_brace_are_refused(pattern: str) -> None:
    with pytest.raises(PlanError, match="has a brace without its partner"):
        Rule(pattern, "column")


def test_rules_are_parsed() -> None:
    rules = Rules.parse(
        {
            "q_proj": "column heads", "k_proj": "column kv_heads gather_output", "o_proj": "row split_input transposed heads",
            "norm": "replicate partial_grad",
        }
    )  # fmt: skip
    assert tuple(rules) == (
        Rule("q_proj", "column", "heads"),
        Rule("k_proj", "column", "kv_heads", gather_output=True),
        Rule("o_proj", "row", "heads", split_input=True, transposed=True),
        Rule("norm", "replicate", partial_grad=True),
    )
    assert not rules.proven
    assert rules.find("a.k_proj") == Rule("k_proj", "column", "kv_heads", gather_output=True)
    assert rules.find("a.v_proj") is None
    assert Rules.parse({"a": "row", "*": "column"}).find("x.a") == Rule("a", "row")  # the first that matches


@pytest.mark.parametrize("words", ["", "colum", "column heads kv_heads", "column whole", "column column", "heads"])
def test_rules_refuse_words(words: str) -> None:
    with pytest.raises(PlanError, match=r"q_proj.*must be (a style|one of)"):
        Rules.parse({"q_proj": words})
    with pytest.raises(PlanError, match="`over` of rule 'x' must be one of"):
        Rule("x", "column", "rows")  # type: ignore[arg-type]


def test_isolating_a_rule_hides_the_split_from_its_neighbours() -> None:
    assert isolate(Rule("a", "column", "qkv", transposed=True)) == Rule(
        "a", "column", gather_output=True, transposed=True
    )
    assert isolate(Rule("a", "row", "heads")) == Rule("a", "row", split_input=True)
    assert isolate(Rule("a", "replicate", partial_grad=True, copy_output="x")) == Rule("a", "replicate")
    assert isolate(Rule("a", "head")) == Rule("a", "replicate")


def test_isolated_rules_split_every_linear_layer_of_an_unknown_model() -> None:
    spec = spec_from_config(small("falcon", {}))
    plan = Plan.make(spec, Mesh(tp=3), rules=isolated_rules(spec))
    inside = {path for path in spec.linears or () if spec.layer_of(path) is not None}
    assert {path for path, m in plan.modules.items() if m.gather_output} == inside
    assert not plan.attention
    assert not plan.rules.proven


def test_whose_table_is_taken() -> None:
    assert rules_for(llama()) == Rules(TABLES["llama"], proven=True)
    assert set(TABLES) >= PROVEN
    unknown = spec_from_config(small("exaone4", VARIANTS["exaone4"][0]))
    hf = {"layers.*.mlp.up_proj": "colwise"}
    assert rules_for(unknown, hf) == rules_from_tp_plan(hf)
    assert rules_for(llama(), hf) == rules_for(llama())
    assert not rules_for(unknown).proven
    assert not Plan.make(unknown, Mesh(tp=2)).rules.proven
    assert Plan.make(llama(), Mesh(tp=2)).rules.proven


def test_hugging_face_plans_are_translated() -> None:
    rules = rules_from_tp_plan(
        {
            "layers.*.self_attn.q_proj": "colwise",
            "layers.*.self_attn.v_proj": "colwise",
            "layers.*.self_attn.o_proj": "rowwise",
            "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
            "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
            "layers.*.mlp.gate_up_proj": "colwise",
            "layers.*.mlp.up_proj": "colwise_gather_output",
            "layers.*.mlp.down_proj": "rowwise_split_input",
            "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
            "layers.*.mlp.experts.down_proj": "rowwise",
            "layers.*.mlp.experts": "moe_tp_experts",
            "embed_tokens": "embedding_rowwise",
            "layers.*.mlp.gate": "some_style_of_next_year",
        }
    )
    layer = "model.layers.3"
    for path, expected in {
        f"{layer}.self_attn.q_proj": ("column", "heads", False, False),
        f"{layer}.self_attn.v_proj": ("column", "kv_heads", False, False),
        f"{layer}.self_attn.o_proj": ("row", "heads", False, False),
        f"{layer}.mlp.gate_up_proj": ("column", "gate_up", False, False),
        f"{layer}.mlp.up_proj": ("column", "features", True, False),
        f"{layer}.mlp.down_proj": ("row", "features", False, True),
        f"{layer}.mlp.experts": ("experts", "features", False, False),
        "model.embed_tokens": ("vocab", "features", False, False),
        "lm_head": ("vocab", "features", False, False),
    }.items():
        rule = rules.find(path)
        assert rule is not None, path
        assert (rule.style, rule.over, rule.gather_output, rule.split_input) == expected, path
    norm, latent = rules.find(f"{layer}.self_attn.q_norm"), rules.find(f"{layer}.self_attn.kv_a_proj_with_mqa")
    assert norm is not None
    assert latent is not None
    assert norm.partial_grad
    assert latent.copy_output == "qk_rope_head_dim"
    for path in ("mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        assert rules.find(f"{layer}.{path}") is None
    assert not rules.proven


# Of these, Hugging Face's own table says the same as ours: two independent sources.
AGREE = ("llama", "granite", "smollm3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2",
         "olmo3", "seed_oss", "phi", "cohere", "cohere2", "starcoder2", "nemotron", "arcee", "mixtral",
         "qwen3_moe", "olmoe", "deepseek_v2")  # fmt: skip


@pytest.mark.parametrize("family", AGREE)
def test_hugging_face_agrees_with_our_table(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = rules_from_tp_plan(transformers.CONFIG_MAPPING[family].base_model_tp_plan)
    spec = spec_from_config(small(family, VARIANTS[family][0]))
    for tp in (2, 3):
        ours, other = Plan.make(spec, Mesh(tp=tp)), Plan.make(spec, Mesh(tp=tp), rules=theirs)
        assert (ours.modules, ours.cuts, ours.attention) == (other.modules, other.cuts, other.attention)


# --- JSON that is not a plan --------------------------------------------------------------------------------------------


def tiny_plan() -> Plan:
    spec = spec_from_config(
        small("qwen3", {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4})
    )
    return Plan.make(spec, Mesh(1, 2, 4))


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", '"plan"', "[]", "{}", '{"partita_plan": 2}', '{"partita_plan": 1}', "[" * 100_000, "1" * 5000,
     '{"partita_plan": 1, "splits": []}', "\ud800"],
    ids=range(13),
)  # fmt: skip
def test_garbage_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of nested data with each of its keys."""
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from places(data[key])


def use(plan: Plan) -> None:
    """Everything that the rest of Partita asks a plan."""
    for rank in range(min(plan.mesh.size, 8)):
        plan.rank_parameters(rank)
        plan.rank_bytes(rank)
        tp = plan.mesh.coordinate(rank).tp
        for cut in plan.held_by(rank):
            cut.local_shape(tp)
            cut.owned_ranges(tp)
        for attention in plan.attention.values():
            attention.local_kv_heads(tp)
    assert Plan.from_json(plan.to_json()) == plan
    str(plan)


CHANGES = (None, -1, 0, 1, 3, 10**9, 1.5, True, "", "tt", [], {}, [[0, 3]], {"size": 4})


def test_a_changed_plan_is_refused_or_still_a_plan() -> None:
    original = json.loads(tiny_plan().to_json())
    draw = random.Random(0)
    refused = taken = 0
    for index in range(len(list(places(original)))):
        for change in draw.sample([*CHANGES, ...], 5):
            data = copy.deepcopy(original)
            holder, key = list(places(data))[index]
            if change is ...:
                del holder[key]
            else:
                holder[key] = change
            try:
                plan = Plan.from_json(json.dumps(data))
            except PlanError:
                refused += 1
            else:
                taken += 1
                use(plan)
    assert refused > 3 * taken
    assert taken > 0


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("mesh", "tp"), 3, "does not fit"),
        (("mesh", "pp"), 0, "pp must be"),
        (("layout",), "Et|t", "loss"),
        (("layout",), "Ett|tL", "2 expected, 3 found"),
        (("model", "num_layers"), 3, "3 expected, 2 found"),
        (("model", "dtype"), "float3", "dtype must be one of"),
        (("model", "tensors", "lm_head.weight", "tied_to"), "model.norm.weight", "has another shape"),
        (("tensors", "lm_head.weight", "dim"), -1, "dim must be a whole number"),
        (("tensors", "lm_head.weight", "dim"), 1, "does not fit its shape"),
        (("tensors", "lm_head.weight", "dim"), None, "go together"),
        (("tensors", "nothing.weight"), {}, "which is not a tensor of its model"),
        (("modules", "lm_head", "style"), "diagonal", "not a valid split of a module"),
        (("modules", "lm_head", "split"), -1, "an index of `splits`"),
        (("modules", "lm_head", "split"), None, "not a valid split of a module"),
        (("attention", "model.layers.0.self_attn", "num_heads"), 8, "not a valid split of heads"),
        (("proven",), "yes", "proven must be a bool"),
    ],
)
def test_what_was_changed_is_named(path: tuple[str, ...], value: Any, match: str) -> None:
    data = json.loads(tiny_plan().to_json())
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(PlanError, match=match):
        Plan.from_json(json.dumps(data))


def test_a_layout_has_no_more_prediction_layers_than_the_model() -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    added = Plan.make(spec_from_config(config), Mesh(pp=2), "Et|tmmL")
    assert [stage.mtp_layers for pp in range(2) for stage in added.stages(pp)] == [(), (0, 1)]
    named = spec_from_config({**config, "num_nextn_predict_layers": 1})
    with pytest.raises(LayoutError, match="mtp"):
        Plan.make(named, Mesh(pp=2), "Et|tmmL")


# --- pipelines --------------------------------------------------------------------------------------------------------


def test_stages_in_a_v_turn_round_at_the_ends() -> None:
    #          rank 0  rank 1         rank 0  rank 1
    #  loop      Et      t     v        Et      t
    #             t     tL              tL      t
    loop = Plan.make(llama(), Mesh(pp=2), "Et|t|t|tL")
    v = Plan.make(llama(), Mesh(pp=2), "Et|t|t|tL", placement="v")
    assert [plan.rank_layers(rank) for plan in (loop, v) for rank in range(2)] == [(0, 2), (1, 3), (0, 3), (1, 2)]
    assert [v.stage_index(rank, vpp) for rank in range(2) for vpp in range(2)] == [0, 3, 1, 2]
    assert [v.stage_rank(index) for index in range(4)] == [0, 1, 1, 0]
    assert v.stage(0, 1) == v.stage_at(3) == Stage((3,), (), embedding=False, loss=True)
    outside = {cut.name for cut in v.held_by(1) if v.spec.layer_of(cut.name) is None}
    assert outside == set()
    assert [plan.stage_rank(plan.loss_stage) for plan in (loop, v)] == [1, 0]


@pytest.mark.parametrize(
    ("layout", "loss_stage"),
    [("Ett|ttL", 1), ("EttttL|", 0), ("|EttttL", 1), ("Et|t|ttL|", 2), ("Ett|tt|L|", 2), ("||EttttL|", 2)],
)
def test_the_loss_may_be_before_empty_stages(layout: str, loss_stage: int) -> None:
    plan = Plan.make(llama(), Mesh(pp=2), layout)
    assert plan.loss_stage == loss_stage
    assert plan.stage_at(loss_stage).loss
    assert not any(plan.stage_at(index).loss for index in range(plan.num_stages) if index != loss_stage)


@pytest.mark.parametrize("placement", ["loop", "v"])
@pytest.mark.parametrize("vpp", [1, 2, 3])
def test_every_layer_is_on_one_stage(vpp: int, placement: Placement) -> None:
    for pp in range(1, 5):
        plan = Plan.make(llama(num_hidden_layers=12), Mesh(pp=pp), vpp=vpp, placement=placement)
        assert (plan.vpp, plan.num_stages) == (vpp, pp * vpp)
        stages = [plan.stage_at(index) for index in range(plan.num_stages)]
        assert [i for stage in stages for i in stage.layers] == list(range(12))
        assert [stage.embedding for stage in stages] == [True] + [False] * (len(stages) - 1)
        assert [stage.loss for stage in stages] == [False] * (len(stages) - 1) + [True]
        assert max(len(s.layers) for s in stages) - min(len(s.layers) for s in stages) <= 1
        assert sorted(i for rank in range(pp) for i in plan.rank_layers(rank)) == list(range(12))
        for rank in range(pp):
            assert plan.stages(rank) == tuple(stages[plan.stage_index(rank, v)] for v in range(vpp))


def test_default_layouts() -> None:
    assert str(default_layout(llama(), 2)) == "Ett|ttL"
    assert str(default_layout(llama(num_hidden_layers=5), 2)) == "Ettt|ttL"
    assert str(default_layout(llama(), 2, 2)) == "Et|t|t|tL"
    assert str(default_layout(llama(), 1)) == "Et*4L"
    assert Plan.make(llama(), Mesh(pp=2), vpp=2).layout == default_layout(llama(), 2, 2)


def test_what_several_stages_hold() -> None:
    tied = llama(tie_word_embeddings=True)
    for spec, layout, placement, copies in (
        (llama(), "Ett|ttL", "loop", {}),
        (tied, "Ett|ttL", "loop", {"model.embed_tokens.weight": (0, 1)}),
        (tied, "EttttL|", "loop", {}),
        (tied, "E|tt|tt|L", "v", {}),
        (tied, "|Ett|ttL|", "loop", {"model.embed_tokens.weight": (1, 0)}),
        (llama(), "Ett|ttm|L|", "loop", {"model.embed_tokens.weight": (0, 1), "model.norm.weight": (0, 1)}),
    ):
        plan = Plan.make(spec, Mesh(pp=2), layout, placement=placement)
        assert plan.copies == copies, (layout, placement)
    # Tensor ranks cut a copy alike.
    plan = Plan.make(tied, Mesh(pp=2, tp=2), "Ett|ttL")
    assert plan.local_shape("lm_head.weight", 2) == plan.local_shape("model.embed_tokens.weight", 0) == (16, 28)
    assert "lm_head.weight" in {cut.name for cut in plan.held_by(2)}
    assert not plan.is_held("model.embed_tokens.weight", 1)
    assert plan.is_held("lm_head.weight", 1)


@pytest.mark.parametrize(("family", "variant"), FAMILY_VARIANTS)
def test_stages_hold_every_parameter_and_copies_twice(family: str, variant: dict[str, Any]) -> None:
    spec = spec_from_config(small(family, variant))
    layers = "t" * spec.num_layers
    for layout, placement in ((f"E|{layers}|L|", "loop"), (f"E|{layers}||L", "v"), (f"E{layers}L|||", "loop")):
        plan = Plan.make(spec, Mesh(pp=2), layout, placement=placement)
        twice = sum(spec.tensors[name].numel for name in plan.copies)
        assert sum(plan.rank_parameters(rank) for rank in range(2)) == spec.parameters + twice
        for name, holders in plan.copies.items():
            assert len(set(holders)) == 2
            twins = [n for n, t in spec.tensors.items() if name in (n, t.tied_to)]
            assert all(any(plan.is_held(n, pp) for n in twins) for pp in holders)


@pytest.mark.parametrize(
    ("layout", "placement"),
    [("Et|t|t|tL", "v"), ("Et|t|t|tL", "loop"), ("EttttL|", "loop"), ("E|tt||ttL", "v"), ("Ett|ttm|m|L", "loop")],
)
def test_stages_survive_being_written(layout: str, placement: Placement) -> None:
    plan = Plan.make(llama(tie_word_embeddings=True), Mesh(pp=2, tp=2), layout, placement=placement)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (again.placement, str(again.layout), again.loss_stage) == (placement, str(plan.layout), plan.loss_stage)
    assert again.copies == plan.copies
    assert [again.held_by(rank) for rank in range(4)] == [plan.held_by(rank) for rank in range(4)]
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_stages_that_cannot_be() -> None:
    with pytest.raises(PlanError, match=r"placement must be one of loop, v, but is 'w'"):
        Plan.make(llama(), Mesh(pp=2), placement="w")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"vpp=3 needs a layout of 6 stages \(pp x vpp\), but the layout .* has 4"):
        Plan.make(llama(), Mesh(pp=2), "Et|t|t|tL", vpp=3)
    with pytest.raises(PlanError, match=r"pp x vpp=6 needs at least 6 layers, but the model has 4"):
        Plan.make(llama(), Mesh(pp=2), vpp=3)
    data = json.loads(Plan.make(llama(), Mesh(pp=2), vpp=2, placement="v").to_json())
    with pytest.raises(PlanError, match="placement must be one of loop, v, but is 'x'"):
        Plan.from_json(json.dumps({**data, "placement": "x"}))
    del data["placement"]
    assert Plan.from_json(json.dumps(data)).placement == "loop"


def test_layers_that_share_weights_are_not_partitioned_into_stages() -> None:
    """ALBERT applies one layer, or one of each group, again and again, so that no stage could run its own layers alone."""
    layer = "albert.encoder.albert_layer_groups.{}.albert_layers.0.ffn.weight"
    for groups, weights in ((1, "one set"), (2, "2 sets")):
        config = {"model_type": "albert", "num_hidden_layers": 6, "num_hidden_groups": groups, "num_attention_heads": 4}
        tensors = {layer.format(group): TensorSpec(layer.format(group), (64, 32)) for group in range(groups)}
        spec = spec_from_tensors(tensors, config)
        message = rf"its 6 layers share {weights} of weights .* Use pp=1"
        for layout in (None, "Et|L" if groups == 1 else "Et|tL"):
            with pytest.raises(PlanError, match=message):
                Plan.make(spec, Mesh(pp=2), layout)
        ffn = Plan.make(spec, Mesh(tp=2)).tensor(layer.format(0))
        assert ffn.dim == 0
