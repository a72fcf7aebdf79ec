"""Every promised family of mlx-lm, split over 2, 3 and 4 ranks, plain and quantized, against its unsplit self."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import pytest

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.errors import ModelError
from partita.mlx.collectives.groups import make_groups, single_groups
from partita.mlx.collectives.threads import run_as_threads
from partita.mlx.load import shard
from partita.mlx.model.mlx_lm_models import build, quantize, rules_of, spec_of
from partita.mlx.model.parts import parameter_homes
from partita.mlx.proof.compare import compare
from partita.mlx.proof.family import Small, compare_on_threads, fill, plan_of_model, sample_inputs
from partita.mlx.split.apply import apply_plan
from tests.support.mlx_models import tiny_config
from tests.support.mlx_ranks import mlx_ranks

LIMITS = {mx.float64: 1e-12, mx.float32: 1e-5}
"""What is left is the order of sums."""

NARROWED = 1e-6
"""MLX computes some gradients of `rms_norm` in float32, in a float64 model too."""

ODD = {"hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 37, "head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", ODD),
    "llama, 7 heads 1 kv": ("llama", {**ODD, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "llama, 3 heads": ("llama", {**ODD, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "llama, biases, tied": ("llama", {**ODD, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", ODD),
    "qwen2": ("qwen2", ODD),
    "qwen3": ("qwen3", ODD),
    "qwen3_moe": ("qwen3_moe", {**ODD, "moe_intermediate_size": 21}),
    "gemma": ("gemma", ODD),
    "gemma2": ("gemma2", ODD),
    "gemma3": ("gemma3_text", ODD),
    "phi3": ("phi3", ODD),
    "gpt2": ("gpt2", {"n_embd": 56, "n_head": 7}),
    "gpt_neox": ("gpt_neox", {"hidden_size": 56, "num_attention_heads": 7}),
    "mixtral": ("mixtral", ODD),
    "deepseek_v3": ("deepseek_v3", {"num_key_value_heads": 4, "num_attention_heads": 4, "n_group": 2, "topk_group": 1}),
    "deepseek_v3, dense queries": ("deepseek_v3", {"num_key_value_heads": 4, "q_lora_rank": None}),
    "olmo2": ("olmo2", ODD),
    "starcoder2": ("starcoder2", ODD),
    "cohere": ("cohere", ODD),
    "cohere, norms of heads": ("cohere", {**ODD, "use_qk_norm": True}),
    "gpt_oss": ("gpt_oss", ODD),
}
"""By a name for the test's output: mlx-lm's module, and what is changed of its tiny config."""


def _config(name: str, layers: int = 2) -> dict[str, Any]:
    family, changes = MODELS[name]
    config = {**tiny_config(family), **changes}
    return {**config, **{k: layers for k in ("num_hidden_layers", "n_layer") if k in config}}


def _model(config: dict[str, Any], dtype: mx.Dtype) -> Any:
    mx.random.seed(0)
    return fill(build(config), dtype)


def _small(name: str) -> Small:
    """In float64 where the family computes in it, which the grouped matrix products of experts do not."""
    for dtype in LIMITS:
        model = _model(_config(name), dtype)
        try:
            mx.eval(model(sample_inputs(model)))
        except RuntimeError:
            continue
        return Small(model, dtype, backward=True, cached=True)
    raise AssertionError(name)


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_split_equals_unsplit(name: str, tp: int) -> None:
    def measured(_: object) -> list[tuple[str, str, float]]:
        small = _small(name)
        plan = plan_of_model(small.model, Mesh(tp=tp), config=_config(name))
        limit = max(LIMITS[small.dtype], NARROWED if "3" in name else 0.0)
        return [(d.kind, d.name, d.error / limit) for d in compare_on_threads(small, plan)]

    (differences,) = run_as_threads(1, measured)
    assert {kind for kind, _, _ in differences} == {"module", "output", "gradient"}
    assert [d for d in differences if not d[2] <= 1.0] == []


@pytest.mark.parametrize("name", MODELS)
def test_nothing_large_is_whole(name: str) -> None:
    """Of the promised families every rank holds half, but for what is small: norms, routers, latents."""
    config = {**_config(name), "vocab_size": 1000}
    model = build(config)
    plan = plan_of_model(model, Mesh(tp=2), config=config)
    for tensor, cut in plan.cuts.items():
        if cut.split is None and len(cut.shape) >= 2:
            assert any(part in tensor for part in (".gate.", "router", "_a_proj", "wpe", "_norm.", "down_proj.bias")), (
                tensor
            )
    assert plan.rank_parameters(0) < 0.6 * plan.spec.parameters


def _on_ranks(names: list[str], tp: int) -> list[tuple[str, str, str, float]]:
    """The worst difference of each model on real ranks, in float32."""
    worst = []
    for name in names:
        config = _config(name)
        unsplit = _model(config, mx.float32)
        plan = plan_of_model(unsplit, Mesh(tp=tp), config=config)
        groups = make_groups(plan.mesh)
        split = apply_plan(copy.deepcopy(unsplit), plan, groups.tp)
        found = compare(unsplit, split, plan, groups, sample_inputs(unsplit))
        worst.append(max(((name, d.kind, d.name, d.error) for d in found), key=lambda d: d[3]))
    return worst


@pytest.mark.parametrize("tp", [2, 3])
def test_on_real_ranks(tp: int) -> None:
    # Attention beside the MLP (cohere, gpt_neox), gathered between (olmo2), experts (deepseek_v3), copies of heads.
    names = ["llama, 7 heads 1 kv", "cohere", "gpt_neox", "olmo2", "deepseek_v3", "gemma3"]
    for worst in mlx_ranks(tp).run(_on_ranks, names, tp):
        assert [d for d in worst if not d[3] <= LIMITS[mx.float32]] == []


# --- quantized ------------------------------------------------------------------------------------------------------------

QUANTIZED = {
    # Three groups of 32 and an uneven cut of the inner width; two heads of 16 share a group of the output projection.
    "llama": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96},
    "qwen3_moe": {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
                  "intermediate_size": 96, "moe_intermediate_size": 96},
    "phi3": {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 96},
    "gpt2": {"n_embd": 128, "n_head": 4},
    "gpt_neox": {"hidden_size": 128, "num_attention_heads": 4},
    "deepseek_v3": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96,
                    "moe_intermediate_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32,
                    "v_head_dim": 32},
    "gemma3_text": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32,
                    "intermediate_size": 96},
    "mixtral": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
    "cohere": {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96},
}  # fmt: skip


def _quantized(family: str, bits: int) -> tuple[Any, dict[str, Any]]:
    config = {**tiny_config(family), **QUANTIZED[family], "quantization": {"group_size": 32, "bits": bits}}
    model = _model(config, mx.float32)
    quantize(model, config)
    mx.eval(model.parameters())
    return model, config


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", QUANTIZED)
def test_quantized_split_equals_quantized_unsplit(family: str, bits: int) -> None:
    def measured(tp: int) -> list[tuple[str, str, float]]:
        model, config = _quantized(family, bits)
        plan = plan_of_model(model, Mesh(tp=tp), config=config)
        assert plan.modules
        small = Small(model, mx.float32, backward=True, cached=True)
        return [(d.kind, d.name, d.error) for d in compare_on_threads(small, plan)]

    for tp in (2, 3):
        (differences,) = run_as_threads(1, lambda _, tp=tp: measured(tp))
        assert [d for d in differences if not d[2] <= 2e-5] == [], tp


def test_a_quantized_part_is_the_same_numbers_as_in_the_whole() -> None:
    """Cuts lie between quantization groups, so that no weight is quantized anew."""

    def parts(comm: Any) -> list[tuple[str, tuple[int, ...], bool]]:
        model, config = _quantized("llama", 4)
        whole = {name: home[key] for name, (home, key) in parameter_homes(model).items()}
        split = apply_plan(copy.deepcopy(model), plan_of_model(model, Mesh(tp=2), config=config), comm)
        found = []
        for name, (home, key) in parameter_homes(split).items():
            part = home[key]
            axis = next((i for i, (a, b) in enumerate(zip(part.shape, whole[name].shape, strict=True)) if a != b), 0)
            rows, own = mx.moveaxis(whole[name], axis, 0), mx.moveaxis(part, axis, 0)
            start = 0 if comm.rank == 0 else rows.shape[0] - own.shape[0]
            found.append((name, part.shape, mx.array_equal(own, rows[start : start + own.shape[0]]).item()))
        return found

    first, second = run_as_threads(2, parts)
    assert all(same for _, _, same in first + second)
    shapes = {name: (a, b) for (name, a, _), (_, b, _) in zip(first, second, strict=True)}
    # 96 inputs are three groups of 32, of 12 words each at 4 bits: two and one.
    assert shapes["model.layers.0.mlp.down_proj.weight"] == ((96, 8), (96, 4))
    assert shapes["model.layers.0.mlp.down_proj.scales"] == ((96, 2), (96, 1))
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == ((64, 12), (32, 12))
    # Two heads of 16 share a group of the output projection, so that six heads are dealt as four and two.
    assert shapes["model.layers.0.self_attn.o_proj.scales"] == ((96, 2), (96, 1))
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == ((64, 12), (32, 12))


# --- plans ----------------------------------------------------------------------------------------------------------------


def test_a_plan_made_of_another_engines_model_is_fitted() -> None:
    """A tied head is a tensor of transformers' model and none of mlx-lm's."""
    config = {**_config("llama, biases, tied")}
    model = _model(config, mx.float32)
    spec = spec_of(model, config)
    theirs = type(spec)(
        **{
            **{field: getattr(spec, field) for field in spec.__dataclass_fields__},
            "tensors": {**spec.tensors, "lm_head.weight": spec.tensors["model.embed_tokens.weight"]},
        }
    )
    plan = Plan.make(theirs, Mesh(tp=1), None, rules_of(theirs))
    split = shard(model, plan, groups=single_groups())
    assert "lm_head.weight" not in split.partita_plan.spec.tensors


def test_a_plan_of_another_model_is_refused() -> None:
    config = _config("llama")
    plan = plan_of_model(build(config), Mesh(), config=config)
    other = build(_config("qwen2"))
    with pytest.raises(
        ModelError, match="the plan is for another model: its family is llama, but the model's is qwen2"
    ):
        shard(other, plan, groups=single_groups())
