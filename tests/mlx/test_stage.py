"""Models cut into stages and called as a whole, against their unsplit selves: forward, cached, with gradients."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.errors import ModelError
from partita.mlx.collectives.groups import make_groups, single_groups
from partita.mlx.load import shard
from partita.mlx.model.cache import count_tokens
from partita.mlx.model.mlx_lm_models import build, quantize, spec_of
from partita.mlx.model.parts import main_output, parameter_homes, plan_of
from partita.mlx.proof.family import fill, plan_of_model, sample_inputs
from partita.mlx.proof.stages import prove_stages
from partita.mlx.split.apply import apply_plan
from partita.mlx.stages.cut import stages_of
from partita.mlx.stages.layers import AbsentLayer, AbsentModule, Message
from partita.mlx.stages.run import run_stage
from tests.mlx.compare import EXACT, SINGLE, assert_equal
from tests.support.mlx_models import tiny_config
from tests.support.mlx_ranks import mlx_ranks

FAMILIES = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "mixtral", "deepseek_v3",
    "olmo2", "starcoder2", "cohere", "gpt_oss", "qwen3_next", "mamba2", "rwkv7", "jamba",
]  # fmt: skip


def whole(family: str, dtype: mx.Dtype = mx.float32, **changes: Any) -> nn.Module:
    """A tiny model of a family, the same on every rank."""
    mx.random.seed(0)
    return fill(build({**tiny_config(family), **changes}), dtype)


def cut(model: nn.Module, plan: Plan, rank: int) -> nn.Module:
    """What pipeline rank `rank` keeps of a copy."""
    return apply_plan(copy.deepcopy(model), plan, single_groups().tp, rank)


def call_cut(family: str, mesh: tuple[int, int, int], layout: str | None, bits: int, changes: dict[str, Any]) -> None:
    """Call a model over the ranks of a mesh, at once and token by token, and compare it with the unsplit one."""
    config = {**tiny_config(family), **changes}
    mx.random.seed(0)
    model = fill(build(config), mx.float32)
    if bits:
        quantize(model, {"quantization": {"group_size": 32, "bits": bits}})
    expected = copy.deepcopy(model)
    dp, pp, tp = mesh
    split = shard(model, dp=dp, pp=pp, tp=tp, layout=layout)
    assert type(split).__name__ == type(expected).__name__
    assert isinstance(split, type(expected))
    ids = sample_inputs(expected)
    assert_equal(split(ids), main_output(expected(ids)), 2e-5, "at once")
    caches = make_prompt_cache(split), make_prompt_cache(expected)
    for start, stop in ((0, 5), (5, 7), (7, 8), (8, 9)):
        mine = split(ids[:, start:stop], cache=caches[0])
        whole = main_output(expected(ids[:, start:stop], cache=caches[1]))
        assert_equal(mine, whole, 2e-5, f"tokens {start} to {stop}")


@pytest.mark.parametrize("family", FAMILIES)
def test_two_stages_give_what_the_unsplit_model_gives(family: str) -> None:
    mlx_ranks(2).run(call_cut, family, (1, 2, 1), None, 0, {})


@pytest.mark.parametrize(
    ("size", "mesh", "layout", "bits", "changes"),
    [
        (2, (1, 2, 1), "E|ttttL", 0, {}),
        (2, (1, 2, 1), "Etttt|L", 0, {"tie_word_embeddings": True}),
        (2, (1, 2, 1), "Et||ttt|L", 0, {}),
        (3, (1, 3, 1), None, 4, {}),
        (3, (1, 3, 1), None, 8, {"tie_word_embeddings": True}),
        (4, (1, 2, 2), None, 0, {"tie_word_embeddings": True}),
        (4, (2, 2, 1), None, 0, {}),
        (4, (1, 2, 2), "Ettt|tL", 4, {"hidden_size": 128, "intermediate_size": 128}),
    ],
)
def test_any_layout_over_any_mesh(
    size: int, mesh: tuple[int, int, int], layout: str | None, bits: int, changes: dict[str, Any]
) -> None:
    if layout is not None and layout.count("|") + 1 > mesh[1]:
        mlx_ranks(size).run(call_without_cache, mesh, layout)
    else:
        mlx_ranks(size).run(call_cut, "llama", mesh, layout, bits, changes)


def call_without_cache(mesh: tuple[int, int, int], layout: str) -> None:
    model = whole("llama")
    expected = copy.deepcopy(model)
    split = shard(model, pp=mesh[1], layout=layout)
    ids = sample_inputs(expected)
    assert_equal(split(ids), expected(ids), SINGLE)
    with pytest.raises(ModelError, match="several stages of one rank would share a cache"):
        split(ids, cache=make_prompt_cache(split))


def test_a_gradient_of_the_whole_call_is_refused_not_wrong() -> None:
    mlx_ranks(2).run(ask_and_go_on)


def ask_and_go_on() -> None:
    split = shard(whole("llama"), pp=2)
    ids = sample_inputs(whole("llama"))
    if plan_of(split)[1].pp.rank == 0:
        with pytest.raises(ModelError, match="returns its output only, without gradients across stages"):
            mx.grad(lambda scale: split(ids, input_embeddings=scale * mx.ones((*ids.shape, 64))).sum())(mx.array(1.0))


def test_what_a_rank_keeps() -> None:
    model = whole("llama", tie_word_embeddings=True)
    plan = Plan.make(spec_of(model), Mesh(pp=3), "Et|tt|tL")
    parts = [cut(model, plan, rank) for rank in range(3)]
    kept = [sorted({name.split(".")[1] + "." * (name.count(".") > 3) + name.split(".")[2] for name in parameter_homes(part)})
            for part in parts]  # fmt: skip
    assert kept == [
        ["embed_tokens.weight"[:12] + "weight", "layers.0"],
        ["layers.1", "layers.2"],
        ["embed_tokensweight", "layers.3", "normweight"],
    ]
    assert stages_of(parts[1]).copies == {"model.embed_tokens.weight": (0, 2)}
    assert isinstance(parts[1].model.embed_tokens, AbsentModule)
    assert isinstance(parts[1].model.layers[0], AbsentLayer)
    assert parts[1].model.layers[0].use_sliding is False
    assert len(parts[1].layers) == 4


def test_a_message_says_what_a_layer_would_have_returned() -> None:
    a, b = mx.zeros(1), mx.ones(1)
    assert Message((a,)).value is a
    assert Message((a, b), (True, False, True)).value == (a, None, b)


def test_stages_of_float64_are_exact() -> None:
    model = whole("llama", mx.float64)
    plan = Plan.make(spec_of(model), Mesh(pp=2))
    ids = sample_inputs(model)
    message = run_stage(cut(model, plan, 0), plan, 0, None, ids)
    assert isinstance(message, Message)
    assert_equal(run_stage(cut(model, plan, 1), plan, 1, message, ids), model(ids), 0.0)
    left = run_stage(cut(model, plan, 1), plan, 1, message, ids, output=False)
    assert_equal(left.arrays[0].sum(), left.arrays[0].sum(), EXACT)
    assert left.arrays[0].shape == (*ids.shape, 64)


def test_caches_of_absent_layers_count_tokens() -> None:
    model = whole("gemma3_text")
    plan = Plan.make(spec_of(model), Mesh(pp=2), "Et|tttL")
    part, cache = cut(model, plan, 0), make_prompt_cache(model)
    ids = sample_inputs(model)
    run_stage(part, plan, 0, None, ids, cache)
    run_stage(part, plan, 0, None, ids[:, :1], cache)
    assert [entry.offset for entry in cache] == [10, 10, 10, 10]
    assert [entry.keys.shape[1] for entry in cache] == [2, 1, 1, 1]


def test_counting_needs_no_cache_of_keys() -> None:
    count_tokens([None], [], 3)


class Looping(nn.Module):
    """Goes through its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]

    def __call__(self, ids: mx.array) -> mx.array:
        h = self.embed(ids)
        for layer in self.layers * 2:
            h = layer(h)
        return self.embed.as_linear(h)


class Bare(nn.Module):
    """Holds an array itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
        self.scale = mx.ones(4)

    def __call__(self, ids: mx.array) -> mx.array:
        h = self.embed(ids) * self.scale
        for layer in self.layers:
            h = layer(h)
        return self.embed.as_linear(h)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma3n", "the output differs from the unsplit model's by "),
        ("talkie", "the output differs from the unsplit model's by "),
        ("gemma4_text", "its layers pass on values other than arrays"),
        ("hunyuan", "its layers pass on values other than arrays"),
        ("iquestloopcoder", "its forward ends without calling each of its layers"),
    ],
)
def test_families_that_share_between_layers_are_refused_by_name(family: str, why: str) -> None:
    model = whole(family)
    with pytest.raises(ModelError, match=f"{family} cannot be split into stages: {why}"):
        prove_stages(model, plan_of_model(model, Mesh(pp=2)))


def test_a_model_that_goes_through_its_layers_twice_is_refused() -> None:
    made = Looping()
    plan = Plan.make(spec_of(made), Mesh(pp=2))
    with pytest.raises(ModelError, match="runs its layers more than once per forward"):
        cut(made, plan, 1)


def test_an_array_that_no_module_of_its_own_holds_is_on_every_rank() -> None:
    made, ids = Bare(), mx.array([[1, 2, 3]])
    made.scale = mx.array([1.0, 2.0, 3.0, 4.0])
    plan = Plan.make(spec_of(made), Mesh(pp=2))
    parts = [cut(made, plan, rank) for rank in range(2)]
    assert stages_of(parts[0]).copies == {"embed.weight": (0, 1), "scale": (1, 0)}
    message = run_stage(parts[0], plan, 0, None, ids)
    assert_equal(run_stage(parts[1], plan, 1, message, ids), made(ids), 0.0)


def lora_over_stages() -> list[str]:
    split = shard(whole("llama"), make_plan(), groups=make_groups(Mesh(pp=2)))
    split.freeze()
    linear_to_lora_layers(split, 3, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    return [name for name in parameter_homes(split) if "lora" in name]


def make_plan() -> Plan:
    return Plan.make(spec_of(whole("llama")), Mesh(pp=2))


def test_lora_goes_on_the_layers_that_are_here() -> None:
    first, second = mlx_ranks(2).run(lora_over_stages)
    assert {name.split(".")[2] for name in first} == {"1"}
    assert {name.split(".")[2] for name in second} == {"2", "3"}
