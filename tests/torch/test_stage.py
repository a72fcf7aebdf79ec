"""Stages: every promised family, cut over pipeline ranks in every kind of layout, against its unsplit self."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from partita.core.layout.placement import Placement
from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.errors import DistributedError, ModelError
from partita.torch.collectives.groups import make_groups, single_groups
from partita.torch.load import shard
from partita.torch.model.cache import advance_cache
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.model.transformers_models import build_on_meta, read_hf_config, spec_of
from partita.torch.new import fresh
from partita.torch.proof.compare import compare
from partita.torch.proof.family import fill_unsplit, plan_of_model, sample_inputs
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from partita.torch.stages.cut import cut_stages, stage_layers, wire_stages
from partita.torch.stages.layers import Message, StageLayers
from partita.torch.stages.run import run_stage
from tests.support.models import CONFIGS, UNMEASURED
from tests.support.ranks import ranks

LAYERS = {"gpt2": "n_layer", "bloom": "n_layer", "mpt": "n_layers"}
"""What a family calls its number of layers, where it is not `num_hidden_layers`."""

MIXED = {
    **CONFIGS["gemma3"],
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
}


def deep(name: str, layers: int = 4) -> dict[str, Any]:
    """A config of the tests with so many layers."""
    data = MIXED if name == "gemma3-mixed" else {**CONFIGS, **UNMEASURED}[name]
    return {**data, LAYERS.get(data["model_type"], "num_hidden_layers"): layers}


def unsplit_of(data: dict[str, Any], dtype: str = "float64") -> nn.Module:
    return fill_unsplit(build_on_meta(read_hf_config(data), getattr(torch, dtype)))


def both(data: dict[str, Any], **where: Any) -> tuple[nn.Module, nn.Module]:
    """A model, and its copy that is split over the ranks of the run."""
    unsplit = unsplit_of(data)
    return unsplit, shard(copy.deepcopy(unsplit), **where)


def _differences(
    data: dict[str, Any], mesh: tuple[int, int], layout: str | None = None, placement: Placement = "loop"
) -> tuple[list[tuple[str, str, float]], set[str], set[str]]:
    """What differs, and of what it was told: the modules and parameters of the unsplit model."""
    unsplit = unsplit_of(data)
    pp, tp = mesh
    plan = plan_of_model(unsplit, Mesh(pp=pp, tp=tp), layout, placement=placement)
    groups = make_groups(plan.mesh)
    split = finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)
    with Float64Everywhere():
        found = compare(unsplit, split, plan, groups, sample_inputs(unsplit))
    layers = {path for path in plan.spec.modules if plan.spec.layer_of(path) is not None}
    learned = {name for name, p in unsplit.named_parameters() if p.grad is not None}
    return [(d.kind, d.name, d.error) for d in found], layers, learned


def assert_equal(
    data: dict[str, Any], mesh: tuple[int, int], layout: str | None = None, placement: Placement = "loop"
) -> None:
    for found, layers, learned in ranks(mesh[0] * mesh[1]).run(_differences, data, mesh, layout, placement):
        assert [d for d in found if not d[2] <= 1e-12] == []
        assert ("output", "the model") in {(kind, name) for kind, name, _ in found}
        # Nothing was lost: every layer ran, and every parameter has its gradient, on some rank. Norms of the heads of one
        # tensor rank return another shape than those of all heads, and are not compared.
        if mesh[1] == 1:
            assert layers <= {name for kind, name, _ in found if kind == "module"}
        assert learned <= {name for kind, name, _ in found if kind == "gradient"}


@pytest.mark.parametrize("name", [*CONFIGS, *(name for name in UNMEASURED if "t5" not in name), "gemma3-mixed"])
def test_stages_equal_the_unsplit_model(name: str) -> None:
    assert_equal(deep(name), (2, 1))


# Uneven, empty (first, middle, last), embedding and loss alone, two stages a rank, in a loop and in a V.
LAYOUTS: list[tuple[int, Placement, str]] = [
    (2, "loop", "Et|tttL"),
    (2, "loop", "E|ttttL"),
    (2, "loop", "Etttt|L"),
    (2, "loop", "EttttL|"),
    (2, "loop", "|EttttL"),
    (2, "loop", "Et|t|t|tL"),
    (2, "loop", "E|tt||ttL"),
    (2, "loop", "||Ett|ttL"),
    (2, "loop", "Ettt||tL|"),
    (2, "v", "Et|t|t|tL"),
    (2, "v", "E|tt||ttL"),
    (2, "v", "Ett|t|tL|"),
    (2, "v", "|Ett|ttL|"),
    (3, "loop", "Ett||ttL"),
    (3, "loop", "E|tttt|L"),
    (3, "loop", "E|t|t|t|t|L"),
    (3, "v", "E|t|t|t|t|L"),
]


@pytest.mark.parametrize(("pp", "placement", "layout"), LAYOUTS)
def test_every_layout_of_a_tied_model(pp: int, placement: Placement, layout: str) -> None:
    assert_equal(deep("llama-biases-tied"), (pp, 1), layout, placement)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox", "bert-masked-lm", "gemma3-mixed", "deepseek-v3"])
@pytest.mark.parametrize(("placement", "layout"), [("loop", "E|tt||ttL"), ("v", "Et|t|tt|L")])
def test_layouts_of_other_families(name: str, placement: Placement, layout: str) -> None:
    assert_equal(deep(name), (2, 1), layout, placement)


@pytest.mark.parametrize(
    ("name", "placement", "layout"),
    [
        ("llama-biases-tied", "loop", None),
        ("llama-biases-tied", "v", "E|tt|tt|L"),
        ("gpt2", "loop", "Et|tttL"),
        ("qwen3-moe", "loop", None),
        ("deepseek-v3", "v", "Et|t|t|tL"),
        ("falcon", "loop", None),
    ],
)
def test_tensor_ranks_within_stages(name: str, placement: Placement, layout: str | None) -> None:
    assert_equal(deep(name), (2, 2), layout, placement)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, "gemma3-mixed"])
def test_every_layout_of_every_family(name: str) -> None:
    for pp, placement, layout in LAYOUTS:
        assert_equal(deep(name), (pp, 1), layout, placement)


# --- what a rank holds ------------------------------------------------------------------------------------------------


def _held(data: dict[str, Any], layout: str) -> tuple[int, int, int, int]:
    """Numbers of parameters that this rank has and was to have, and how many tensors are not its own or not there."""
    model = fresh(data, pp=2, layout=layout)
    plan, groups = plan_of(model)
    mine = sum(p.numel() for p in model.parameters())
    wanted = {cut.name for cut in plan.held_by(groups.pp.rank)}
    there = {
        name for name in local_tensors(model, plan) if plan.spec.tensors[name].tied_to not in local_tensors(model, plan)
    }
    meta = sum(t.device.type == "meta" for t in itertools.chain(model.parameters(), model.buffers()))
    return mine, plan.rank_parameters(groups.pp.rank), len(wanted ^ there), meta


@pytest.mark.parametrize("layout", ["Et|tttL", "E|ttttL", "EttttL|", "Et|t|t|tL"])
@pytest.mark.parametrize("name", ["llama-biases-tied", "gpt2", "bert-masked-lm"])
def test_a_rank_holds_what_its_stages_need_and_no_more(name: str, layout: str) -> None:
    for mine, planned, strange, meta in ranks(2).run(_held, deep(name), layout):
        assert mine == planned
        assert (strange, meta) == (0, 0)


def in_one_process(data: dict[str, Any], layout: str, pp: int, pp_rank: int) -> tuple[nn.Module, Plan]:
    """What one pipeline rank keeps of a model, without any other rank."""
    model = unsplit_of(data)
    plan = Plan.make(spec_of(model), Mesh(pp=pp), layout)
    cut_stages(model, plan, pp_rank)
    wire_stages(model, plan, pp_rank)
    return model, plan


def test_the_list_of_layers_keeps_its_length_and_numbers() -> None:
    model, plan = in_one_process(deep("llama-7-heads-1-kv"), "Et|t|t|tL", 2, 1)
    layers = stage_layers(model, plan)
    assert isinstance(layers, StageLayers)
    assert len(layers) == len(list(layers)) == 4
    assert {name.split(".")[0] for name, _ in layers.named_parameters()} == {"1", "3"}
    assert [layers[i].self_attn.layer_idx for i in range(4)] == [0, 1, 2, 3]
    assert layers[-1] is list(layers)[3]
    assert [p.device.type for p in layers[0].parameters()] == ["meta"] * 9


def test_one_stage_is_the_model_itself() -> None:
    model = unsplit_of(deep("llama-7-heads-1-kv"))
    whole = copy.deepcopy(model)
    plan = Plan.make(spec_of(model), Mesh())
    cut_stages(model, plan, 0)
    wire_stages(model, plan, 0)
    assert type(model.model.layers) is nn.ModuleList  # type: ignore[union-attr]
    inputs = sample_inputs(model)
    output, cache = run_stage(model, plan, 0, None, inputs)
    assert torch.equal(output.logits, whole(**inputs).logits)
    assert len(cache.layers) == 4


def test_stages_one_after_the_other_in_one_process() -> None:
    data, layout = deep("gemma3-mixed"), "E|tt||ttL"
    inputs = sample_inputs(unsplit_of(data))
    parts = [in_one_process(data, layout, 2, rank) for rank in range(2)]
    message: Any = None
    for index in range(4):
        model, plan = parts[index % 2]
        message, cache = run_stage(model, plan, index, message, inputs)
        if index < 3:
            assert isinstance(message, Message)
            assert [tuple(t.shape) for t in message.tensors] == [(2, 9, 112)]
        assert (cache is None) == (index == 2), "an empty stage has no cache"
    assert torch.equal(message.logits, unsplit_of(data)(**inputs).logits)


def test_a_message_ends_the_graph_and_keeps_its_ids() -> None:
    weight = torch.ones(2, requires_grad=True)
    leaves = Message((weight * 2, torch.arange(3)), 2).as_leaves()
    assert (leaves.arity, [t.requires_grad for t in leaves.tensors]) == (2, [True, False])
    assert leaves.tensors[0].is_leaf
    (leaves.tensors[0] * 3).sum().backward()
    assert weight.grad is None
    assert leaves.tensors[0].grad is not None


# --- what cannot be cut -----------------------------------------------------------------------------------------------


def test_an_encoder_and_a_decoder_are_refused() -> None:
    config = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 9}
    model = build_on_meta(read_hf_config({**config, "architectures": ["T5ForConditionalGeneration"]}))
    plan = Plan.make(spec_of(model), Mesh(pp=2))
    with pytest.raises(ModelError, match=r"has two lists of layers, an encoder and a decoder.*Use tp and pp=1"):
        cut_stages(model, plan, 0)


class _Odd(nn.Module):
    """Layers that are called, or answer, in a way of their own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            if self.way == "no tensor first":
                x = layer([x])
            else:
                x = layer(x)
        return x


def odd(way: str) -> tuple[nn.Module, Plan]:
    model = _Odd(way)
    plan = Plan.make(spec_of(model), Mesh(pp=2), "Et|tL")
    if way == "a dict":
        model.layers[0].register_forward_hook(lambda module, args, output: {"hidden": output})
    cut_stages(model, plan, 0)
    wire_stages(model, plan, 0)
    return model, plan


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ("no tensor first", "its layers do not take the hidden state as first argument"),
        ("a dict", "its layers return dict, so the model cannot be split into stages"),
    ],
)
def test_layers_that_are_not_like_layers(way: str, text: str) -> None:
    model, plan = odd(way)
    with pytest.raises(ModelError, match=text):
        run_stage(model, plan, 0, None, {"x": torch.ones(2, 4)})
    # A stage that failed leaves the list as it was.
    assert stage_layers(model, plan)[0] is model.layers._modules["0"]  # type: ignore[union-attr]


def test_a_model_that_holds_tensors_itself() -> None:
    model = _Odd("")
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ModelError, match="the model itself holds tensors"):
        cut_stages(model, Plan.make(spec_of(model), Mesh(pp=2), "Et|tL"), 1)


def test_groups_of_another_mesh() -> None:
    model = unsplit_of(deep("llama-7-heads-1-kv"))
    with pytest.raises(
        DistributedError, match="the plan has tp=1, pp=2 and ep x etp=1, but the groups have 1, 1 and 1 ranks"
    ):
        apply_plan(model, Plan.make(spec_of(model), Mesh(pp=2)), single_groups())


def test_tensors_of_the_plan_s_model_alone() -> None:
    model = unsplit_of(deep("llama-7-heads-1-kv"))
    plan = Plan.make(spec_of(unsplit_of(deep("llama-7-heads-1-kv", 3))), Mesh(pp=1))
    with pytest.raises(ModelError, match=r"the model does not match the plan \(llama\): model.layers.3"):
        apply_plan(model, plan, single_groups())


# --- caches -----------------------------------------------------------------------------------------------------------


def test_a_cache_counts_the_tokens_of_layers_that_are_elsewhere() -> None:
    from transformers import DynamicCache

    config = read_hf_config(deep("gemma3-mixed"))
    for own in ((), (0,), (1,), (2, 3), (0, 1, 2, 3)):
        cache = DynamicCache(config=config)
        for length in (5, 1, 1):
            keys = torch.ones(2, 2, length, 8)
            for layer in own:
                cache.update(keys, keys, layer)
            advance_cache(cache, own, {"input_ids": torch.zeros(2, length, dtype=torch.long)})
        # The first entry of each kind is what the model asks.
        assert [cache.get_seq_length(i) for i in (0, 1)] == [7, 7], own


def test_a_cache_of_embeddings() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    advance_cache(cache, (), {"inputs_embeds": torch.zeros(2, 3, 8)})
    assert cache.get_seq_length() == 3


def test_a_cache_of_another_kind_is_refused() -> None:
    from transformers import StaticCache

    cache = StaticCache(config=read_hf_config(deep("llama-7-heads-1-kv")), max_cache_len=8)
    with pytest.raises(ModelError, match=r"a cache of StaticLayer cannot be kept consistent.*dynamic cache, or pp=1"):
        advance_cache(cache, (2, 3), {"input_ids": torch.zeros(1, 3, dtype=torch.long)})
