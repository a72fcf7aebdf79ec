"""Cuts of a model that MLX quantized lie between its groups; stacked layers are cut as single ones."""

from __future__ import annotations

from math import lcm
from typing import Any

import pytest

from partita.core.mesh import Mesh
from partita.core.model.shrink import shrunk_configs
from partita.core.model.spec import ModelSpec, TensorSpec, spec_from_tensors
from partita.core.plan import Plan
from partita.core.sharding.rules import MLX_TABLES, Rules, partly_isolated_rules, without_vocabulary
from partita.core.sharding.split import Split, kv_positions
from partita.errors import PlanError


def _spec(family: str = "llama", **changes: Any) -> ModelSpec:
    config = {
        "model_type": family, "hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 101, **changes,
    }  # fmt: skip
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim", width // heads)
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (101, width),
        f"{layer}.self_attn.q_proj.weight": (heads * head, width),
        f"{layer}.self_attn.k_proj.weight": (config["num_key_value_heads"] * head, width),
        f"{layer}.self_attn.o_proj.weight": (width, heads * head),
        f"{layer}.mlp.up_proj.weight": (inner, width),
        f"{layer}.mlp.down_proj.weight": (width, inner),
        f"{layer}.mlp.switch_mlp.gate_proj.weight": (4, inner, width),
        f"{layer}.mlp.switch_mlp.gate_proj.bias": (4, inner),
        f"{layer}.mlp.switch_mlp.down_proj.weight": (4, width, inner),
    }
    linears = frozenset(n.rpartition(".")[0] for n, s in shapes.items() if n.endswith("_proj.weight") and len(s) == 2)
    return spec_from_tensors({n: TensorSpec(n, s) for n, s in shapes.items()}, config, linears=linears)


def _plan(tp: int, **changes: Any) -> Plan:
    spec = _spec(**changes)
    return Plan.make(spec, Mesh(tp=tp), None, Rules(MLX_TABLES["llama"]))


def _sizes(plan: Plan, name: str) -> tuple[int, ...] | None:
    split = plan.tensor(f"model.layers.0.{name}.weight").split
    return None if split is None else split.local_sizes


@pytest.mark.parametrize(
    ("quantization", "group"),
    [
        (None, 1),
        ({"group_size": 64, "bits": 4}, 64),
        ({"group_size": 32, "bits": 4, "model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 8}}, 64),
        ({"group_size": 32, "bits": 4, "lm_head": False}, 32),
        ("gptq", 1),
    ],
)
def test_the_group_is_the_widest_that_the_config_names(quantization: Any, group: int) -> None:
    assert _spec(quantization=quantization).quantization_group == group


GROUPS_OF_32 = {"quantization": {"group_size": 32, "bits": 4}}


def test_inputs_are_cut_between_groups() -> None:
    plain, quantized = _plan(2), _plan(2, **GROUPS_OF_32)
    assert _sizes(plain, "mlp.down_proj") == (48, 48)
    # Three groups: two and one. The layers before are cut alike.
    for name in ("mlp.up_proj", "mlp.down_proj", "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj"):
        assert _sizes(quantized, name) == (64, 32), name
    # Rows of an embedding are not grouped.
    assert quantized.tensor("model.embed_tokens.weight").split == Split.even(101, 2)


def test_heads_that_share_a_group_stay_together() -> None:
    plan = _plan(2, **GROUPS_OF_32)
    # Heads of 16: two share a group, so that six are dealt as four and two, though three share keys and values.
    assert _sizes(plan, "self_attn.o_proj") == _sizes(plan, "self_attn.q_proj") == (64, 32)
    attention = plan.attention["model.layers.0.self_attn"]
    assert attention.heads.by_rank == (((0, 4),), ((4, 6),))
    # Heads 0 to 2 attend to the first keys, 3 to 5 to the second.
    assert attention.kv_heads.by_rank == (((0, 2),), ((1, 2),))
    assert [attention.local_kv_heads(rank) for rank in range(2)] == [4, 1]
    assert plan.modules["model.layers.0.self_attn.k_proj"].expand == ((0, 0, 0, 1), None)
    assert Plan.from_json(plan.to_json()) == plan


def test_what_has_too_few_groups_is_not_cut() -> None:
    plan = _plan(4, **GROUPS_OF_32)
    assert _sizes(plan, "mlp.down_proj") is None
    # Of the heads there are three pairs for four ranks: each projection is split by itself.
    assert plan.modules["model.layers.0.self_attn.q_proj"].gather_output
    assert not plan.attention


def test_what_is_no_whole_number_of_groups_is_not_quantized() -> None:
    plan = _plan(2, intermediate_size=37, **GROUPS_OF_32)
    assert _sizes(plan, "mlp.down_proj") == (19, 18)


def test_stacked_layers_are_cut_behind_their_stack() -> None:
    plan = _plan(2)
    gate, down = "model.layers.0.mlp.switch_mlp.gate_proj", "model.layers.0.mlp.switch_mlp.down_proj"
    assert plan.local_shape(f"{gate}.weight", 0) == (4, 48, 96)
    assert plan.local_shape(f"{gate}.bias", 0) == (4, 48)
    assert plan.local_shape(f"{down}.weight", 0) == (4, 96, 48)


@pytest.mark.parametrize("parts", range(1, 7))
@pytest.mark.parametrize("unit", [1, 2, 3, 4])
def test_units_of_heads(parts: int, unit: int) -> None:
    for heads in range(1, 25):
        for kv_heads in (n for n in range(1, heads + 1) if heads % n == 0):
            if heads % unit or heads // unit < parts:
                with pytest.raises(PlanError):
                    Split.heads(heads, kv_heads, parts, unit=unit)
                continue
            group = heads // kv_heads
            queries = Split.heads(heads, kv_heads, parts, unit=unit)
            keys = Split.kv_heads(heads, kv_heads, parts, unit=unit)
            assert queries.is_in_order
            assert queries.is_partition
            for rank in range(parts):
                ((start, stop),) = queries.ranges(rank)
                assert start % unit == stop % unit == 0
                ((first, last),) = keys.ranges(rank)
                attended = [first + position for position in kv_positions(group, queries, rank)]
                assert attended == [head // group for head in range(start, stop)]
                assert last == attended[-1] + 1
            if kv_heads >= parts and heads // lcm(group, unit) >= parts and heads % lcm(group, unit) == 0:
                assert keys.is_partition


# --- rules and small configs ----------------------------------------------------------------------------------------------


def test_parts_of_a_model_apart() -> None:
    spec = _spec()
    rules = Rules(MLX_TABLES["llama"])
    apart = Plan.make(spec, Mesh(tp=2), None, partly_isolated_rules(spec, rules, attention=True))
    assert apart.modules["model.layers.0.self_attn.q_proj"].gather_output
    assert not apart.modules["model.layers.0.mlp.up_proj"].gather_output
    other = Plan.make(spec, Mesh(tp=2), None, partly_isolated_rules(spec, rules, attention=False))
    assert not other.modules["model.layers.0.self_attn.q_proj"].gather_output
    assert other.modules["model.layers.0.mlp.up_proj"].gather_output
    assert "model.embed_tokens" in other.modules
    assert "model.embed_tokens" not in Plan.make(spec, Mesh(tp=2), None, without_vocabulary(rules)).modules


def test_small_models_have_every_kind_of_layer() -> None:
    base = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 24, "vocab_size": 500}
    rhythm = next(shrunk_configs({**base, "sliding_window_pattern": 6}, 4))
    assert rhythm["num_hidden_layers"] == 6
    shared = next(shrunk_configs({**base, "num_kv_shared_layers": 10, "layer_types": ["s", "s", "f"] * 8}, 4))
    assert (shared["num_hidden_layers"], shared["num_kv_shared_layers"]) == (6, 3)
    lists = next(shrunk_configs({**base, "is_moe_layer": [False] * 3 + [True] * 21, "widths": [1.5] * 24}, 4))
    assert lists["is_moe_layer"] == [False, False, False, True]
    assert lists["widths"] == [1.5] * 4
    pattern = next(shrunk_configs({**base, "hybrid_override_pattern": "MM*-" * 6}, 4))
    assert pattern["hybrid_override_pattern"] == "MM*-"


def test_of_a_model_of_many_parts_the_text_is_made_small() -> None:
    text = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 24, "vocab_size": 500}
    small = next(shrunk_configs({"model_type": "seen", "text_config": text, "vocab_size": 500}, 4))
    assert small["model_type"] == "seen"
    assert small["vocab_size"] == small["text_config"]["vocab_size"] == 127
    assert small["text_config"]["num_hidden_layers"] == 2
