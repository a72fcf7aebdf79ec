"""Families written down in pure Python against transformers' own models on the meta device."""

import subprocess
import sys
from contextlib import nullcontext

import pytest

from partita.core.model.families import FAMILIES, known_families, spec_from_config
from partita.errors import ModelError

TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA = {"num_key_value_heads": 2}
WIDE_HEADS = {"num_key_value_heads": 1, "head_dim": 12}
BIAS = {"attention_bias": True}
NO_BIAS = {"attention_bias": False}
MHA = {"num_key_value_heads": None}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 5}
LATENT = {
    "q_lora_rank": 10, "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 9,
    "n_routed_experts": 5, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
SIX = {"num_hidden_layers": 6}
UNTIED = {"tie_word_embeddings": False}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 20}
BERT = {**TINY, "max_position_embeddings": 20, "type_vocab_size": 3}

# The small config of a family whose files use other names than TINY.
BASES = {
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": GPT,
    "opt": {**TINY, "ffn_dim": 40, "max_position_embeddings": 20},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mpt": {"vocab_size": 96, "d_model": 32, "n_layers": 3, "n_heads": 4},
    "bert": BERT,
    "roberta": BERT,
    "distilbert": {"vocab_size": 96, "dim": 32, "hidden_dim": 40, "n_layers": 3, "n_heads": 4},
}

# One config a line: what it says beside the small one. Every flag that changes tensors is said both ways.
VARIANTS = {
    "llama": [{}, GQA, WIDE_HEADS, BIAS, {"mlp_bias": True}, {**MHA, "tie_word_embeddings": True}],
    "granite": [GQA, {**BIAS, "mlp_bias": True}],
    "smollm3": [{}, {**BIAS, "mlp_bias": True, **UNTIED}],
    "mistral": [GQA, WIDE_HEADS, {**GQA, "tie_word_embeddings": True}, {**GQA, "attention_bias": True}],
    "qwen2": [GQA, WIDE_HEADS, {**MHA, "tie_word_embeddings": True}],
    "qwen3": [GQA, {**WIDE_HEADS, **BIAS}, {**MHA, "tie_word_embeddings": True}],
    "gemma": [GQA, {**WIDE_HEADS, **BIAS}, {**GQA, **UNTIED}],
    "gemma2": [GQA, {**WIDE_HEADS, **BIAS, **UNTIED}],
    "gemma3_text": [GQA, {**WIDE_HEADS, **BIAS, **UNTIED}],
    "olmo": [{}, {**GQA, **BIAS}, WIDE_HEADS],
    "olmo2": [{}, {**GQA, **BIAS}, WIDE_HEADS],
    "olmo3": [GQA, {**WIDE_HEADS, **BIAS}],
    "exaone4": [GQA, WIDE_HEADS],
    "ernie4_5": [{}, {**WIDE_HEADS, "use_bias": True, **UNTIED}],
    "hunyuan_v1_dense": [{"head_dim": 8}, {**WIDE_HEADS, **BIAS}],
    "seed_oss": [GQA, {**WIDE_HEADS, **NO_BIAS, "attention_out_bias": True, "mlp_bias": True}],
    "phi": [{}, {**GQA, "qk_layernorm": True}, {**WIDE_HEADS, "qk_layernorm": True, "tie_word_embeddings": True}],
    "phi3": [{}, GQA, WIDE_HEADS],
    "stablelm": [
        GQA,
        {**GQA, "use_qkv_bias": True, "qk_layernorm": True},
        {**GQA, "use_parallel_residual": True, "head_dim": 12},
    ],
    "cohere": [{}, {**GQA, **BIAS, "use_qk_norm": True}, {**WIDE_HEADS, **UNTIED}],
    "cohere2": [{}, {**GQA, **BIAS}, WIDE_HEADS],
    "starcoder2": [GQA, {**WIDE_HEADS, "use_bias": False, **UNTIED}],
    "nemotron": [GQA, {**WIDE_HEADS, **BIAS, "mlp_bias": True}],
    "arcee": [{}, {**WIDE_HEADS, **BIAS, "mlp_bias": True}],
    "glm": [GQA, {**WIDE_HEADS, **NO_BIAS}],
    "glm4": [GQA, {**WIDE_HEADS, **NO_BIAS}],
    "gpt2": [{}, {"hidden_size": 16, "num_hidden_layers": 2}, {"n_inner": 40, **UNTIED}],
    "gpt_bigcode": [{}, {"n_inner": 40, "multi_query": False, **UNTIED}],
    "gptj": [{}, {"n_inner": 40, "tie_word_embeddings": True, "rotary_dim": 4}],
    "gpt_neox": [{}, {**NO_BIAS, "tie_word_embeddings": True, "use_parallel_residual": False}],
    "opt": [
        {},
        {"word_embed_proj_dim": 16},
        {"enable_bias": False, "layer_norm_elementwise_affine": False},
        {"do_layer_norm_before": False, **UNTIED},
        {"_remove_final_layer_norm": True},
    ],
    "bloom": [{}, {"n_embed": 16, **UNTIED}, {"num_hidden_layers": 2, "num_attention_heads": 2}],
    "falcon": [
        {},
        {"multi_query": False, "bias": True, "alibi": True},
        {"parallel_attn": False, "ffn_hidden_size": 40},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        {"new_decoder_architecture": True, "parallel_attn": False, **UNTIED},
        {"num_ln_in_parallel_attn": 2, "num_kv_heads": 2},
        {"n_embed": 16},
    ],
    "mpt": [{}, {"expansion_ratio": 2, "no_bias": False, **UNTIED}, {"hidden_size": 16, "num_hidden_layers": 2}],
    "mixtral": [{**GQA, "num_local_experts": 3}, {**WIDE_HEADS, "num_experts": 5, "num_local_experts": 3}],
    "qwen2_moe": [
        {**GQA, **EXPERTS, "shared_expert_intermediate_size": 40},
        {**WIDE_HEADS, **EXPERTS, **SIX, "qkv_bias": False, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ],
    "qwen3_moe": [
        {**GQA, **EXPERTS},
        {**WIDE_HEADS, **EXPERTS, **SIX, **BIAS, "decoder_sparse_step": 2, "mlp_only_layers": [0, 1]},
        {**GQA, **EXPERTS, "num_experts": 0},
        {**GQA, **EXPERTS, "num_local_experts": 3},
    ],
    "olmoe": [{"num_experts": 5}, {**GQA, **BIAS, "num_local_experts": 3}],
    "granitemoe": [{"num_local_experts": 3}, {**GQA, **BIAS, "num_local_experts": 3}],
    "phimoe": [{**GQA, "num_local_experts": 3}, {**WIDE_HEADS, **BIAS, "num_local_experts": 3, "lm_head_bias": True}],
    "gpt_oss": [{**GQA, "num_local_experts": 3}, {**WIDE_HEADS, **NO_BIAS, "num_local_experts": 3}],
    "llama4_text": [
        {**GQA, "num_local_experts": 3, "intermediate_size_mlp": 72},
        {**WIDE_HEADS, **SIX, **BIAS, "num_local_experts": 3, "interleave_moe_layer_step": 2},
        {**GQA, "num_local_experts": 3, "moe_layers": [1]},
        {**GQA, "num_local_experts": 3, "moe_layers": []},
    ],
    "ernie4_5_moe": [
        {**GQA, "moe_num_experts": 3, "moe_intermediate_size": 24},
        {**GQA, **SIX, "moe_num_experts": 3, "moe_layer_start_index": 0, "moe_layer_end_index": 4, "use_bias": True},
        {**GQA, **SIX, "moe_num_experts": 3, "moe_layer_interval": 2, "moe_num_shared_experts": 0},
    ],
    "deepseek_v2": [LATENT, {**LATENT, **BIAS, "q_lora_rank": None, "mlp_bias": True, "n_shared_experts": 1}],
    "deepseek_v3": [
        LATENT,
        {**LATENT, **BIAS, "q_lora_rank": None, "first_k_dense_replace": 0, "num_key_value_heads": 4},
        {**LATENT, "num_local_experts": 3, "n_shared_experts": 2, "tie_word_embeddings": True},
    ],
    "glm4_moe": [
        {**GQA, **EXPERTS, "n_routed_experts": 5},
        {**WIDE_HEADS, **EXPERTS, **BIAS, "use_qk_norm": True, "first_k_dense_replace": 2},
    ],
    "bert": [{}, UNTIED],
    "roberta": [{}, UNTIED],
    "distilbert": [{}, UNTIED],
}  # fmt: skip

# What the defaults of the config class lack for transformers to build the model.
LACKING = {"nemotron": {"num_key_value_heads": 8}, "hunyuan_v1_dense": {"head_dim": 128}}


def small(family, variant):
    return {"model_type": family, "pad_token_id": 0, **BASES.get(family, TINY), **variant}


def built(config, architecture):
    """transformers' own model of a config, without memory."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        return getattr(transformers, architecture)(settings)


def assert_equal(spec, model):
    """Names in order, shapes, ties, buffers, layers and linear layers are the model's."""
    nn = pytest.importorskip("torch").nn
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    first = {}
    expected = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = first.setdefault(id(tensor), name)
        expected.append((name, tuple(tensor.shape), owner if owner != name else None, name in buffers))
    assert [(t.name, t.shape, t.tied_to, t.is_buffer) for t in spec.tensors.values()] == expected
    assert list(spec.tensors) == [tensor.name for tensor in spec.tensors.values()]
    assert {t.name: t.tied_to for t in spec.tensors.values() if t.tied_to} == model.all_tied_weights_keys
    assert spec.parameters == sum(p.numel() for p in model.parameters())

    layers = model.get_submodule(spec.layers)
    assert isinstance(layers, nn.ModuleList)
    assert len(layers) == spec.num_layers == model.config.num_hidden_layers
    assert spec.num_heads == model.config.num_attention_heads
    assert spec.vocab_size == model.config.vocab_size
    assert spec.architecture == type(model).__name__
    assert spec.family == model.config.model_type
    assert spec.linears == {path for path, m in model.named_modules() if isinstance(m, nn.Linear | conv1d)}


def test_every_family_has_variants():
    assert VARIANTS.keys() == known_families() == FAMILIES.keys()


@pytest.mark.parametrize(
    ("family", "variant"),
    [pytest.param(f, v, id=f"{f}-{i}") for f, variants in VARIANTS.items() for i, v in enumerate(variants)],
)
def test_equals_transformers(family, variant):
    config = small(family, variant)
    spec = spec_from_config(config)
    assert_equal(spec, built(config, spec.architecture))


@pytest.mark.parametrize(
    ("family", "architecture"),
    [(family, architecture) for family, known in FAMILIES.items() for architecture in known.architectures],
)
def test_every_class_equals_transformers(family, architecture):
    labels = {} if "QuestionAnswering" in architecture else {"id2label": {"0": "bad", "1": "fair", "2": "good"}}
    config = small(family, {**VARIANTS[family][0], "architectures": [architecture], **labels})
    assert_equal(spec_from_config(config), built(config, architecture))


@pytest.mark.parametrize("family", VARIANTS)
def test_defaults_equal_transformers(family):
    """A config that says nothing is the config class's own; only the model compared has fewer layers."""
    known = pytest.importorskip("transformers").AutoConfig.for_model(family)
    config = {"model_type": family, **LACKING.get(family, {})}
    assert spec_from_config(config).num_layers == known.num_hidden_layers
    config["num_hidden_layers"] = 2
    spec = spec_from_config(config)
    assert_equal(spec, built(config, spec.architecture))


@pytest.mark.parametrize(
    ("config", "heads", "kv_heads"),
    [
        ({"model_type": "llama"}, 32, 32),
        ({"model_type": "mistral"}, 32, 8),
        ({"model_type": "gpt2", "n_head": 6}, 6, 6),
        ({"model_type": "gpt_bigcode"}, 12, 1),
        ({"model_type": "gpt_bigcode", "multi_query": False}, 12, 12),
        ({"model_type": "falcon"}, 71, 1),
        ({"model_type": "falcon", "multi_query": False}, 71, 71),
        ({"model_type": "falcon", "new_decoder_architecture": True}, 71, 71),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 1}, 71, 1),
        ({"model_type": "mpt", "attn_config": {"kv_n_heads": 2}}, 16, 16),
        ({"model_type": "deepseek_v3", "num_key_value_heads": 1}, 128, 128),
        ({"model_type": "distilbert"}, 12, 12),
    ],
)
def test_heads(config, heads, kv_heads):
    spec = spec_from_config(config)
    assert (spec.num_heads, spec.num_kv_heads) == (heads, kv_heads)


def test_other_facts():
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "architectures": ["LlamaModel"]}
    spec = spec_from_config(config)
    assert spec.dtype == "bfloat16"
    assert spec.config == config
    assert spec.layers == "layers"
    assert spec.prefix == ""
    assert spec_from_config({"model_type": "bert", "architectures": []}).architecture == "BertForMaskedLM"


def sized(family, vocab, hidden, inner, layers, heads, kv_heads, **others):
    return {
        "model_type": family, "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **others,
    }  # fmt: skip


def gpt(family, hidden, layers, heads, **others):
    return {"model_type": family, "n_embd": hidden, "n_layer": layers, "n_head": heads, **others}


def latent(family, *sizes, dense, shared, experts, inner, q_rank):
    narrow = {"q_lora_rank": q_rank, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    mixed = {"n_shared_experts": shared, "n_routed_experts": experts, "moe_intermediate_size": inner}
    return sized(family, *sizes, **narrow, **mixed, v_head_dim=128, first_k_dense_replace=dense)


OSS = {"head_dim": 64, "attention_bias": True}
QWEN3_MOE = {"head_dim": 128, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts": 128}
TIED = {"tie_word_embeddings": True}

# The parameters of published models; each config is the published one, without what does not matter to shapes.
PUBLISHED = {
    "Llama-2-7B": (6_738_415_616, sized("llama", 32000, 4096, 11008, 32, 32, 32)),
    "Llama-3.1-8B": (8_030_261_248, sized("llama", 128256, 4096, 14336, 32, 32, 8)),
    "Llama-3.1-70B": (70_553_706_496, sized("llama", 128256, 8192, 28672, 80, 64, 8)),
    "Llama-3.1-405B": (405_853_388_800, sized("llama", 128256, 16384, 53248, 126, 128, 8)),
    "Llama-3.2-1B": (1_235_814_400, sized("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, **TIED)),
    "Mistral-7B": (7_241_732_096, sized("mistral", 32000, 4096, 14336, 32, 32, 8)),
    "Mistral-Nemo-12B": (12_247_782_400, sized("mistral", 131072, 5120, 14336, 40, 32, 8, head_dim=128)),
    "Mixtral-8x7B": (46_702_792_704, sized("mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8)),
    "Mixtral-8x22B": (140_620_634_112, sized("mixtral", 32000, 6144, 16384, 56, 48, 8, num_local_experts=8)),
    "Qwen2.5-0.5B": (494_032_768, sized("qwen2", 151936, 896, 4864, 24, 14, 2, **TIED)),
    "Qwen2.5-72B": (72_706_203_648, sized("qwen2", 152064, 8192, 29568, 80, 64, 8)),
    "Qwen3-0.6B": (596_049_920, sized("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128, **TIED)),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        sized("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, moe_intermediate_size=768, **QWEN3_MOE),
    ),
    "Qwen3-235B-A22B": (
        235_093_634_560,
        sized("qwen3_moe", 151936, 4096, 12288, 94, 64, 4, moe_intermediate_size=1536, **QWEN3_MOE),
    ),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, sized("qwen2_moe", 151936, 2048, 5632, 24, 16, 16)),
    "Gemma-7B": (8_537_680_896, sized("gemma", 256000, 3072, 24576, 28, 16, 16, head_dim=256)),
    "Gemma-2-2B": (2_614_341_888, sized("gemma2", 256000, 2304, 9216, 26, 8, 4, head_dim=256)),
    "Gemma-2-27B": (27_227_128_320, sized("gemma2", 256000, 4608, 36864, 46, 32, 16, head_dim=128)),
    "Gemma-3-1B": (999_885_952, sized("gemma3_text", 262144, 1152, 6912, 26, 4, 1, head_dim=256)),
    "Phi-2": (2_779_683_840, sized("phi", 51200, 2560, 10240, 32, 32, 32)),
    "Phi-3-mini": (3_821_079_552, sized("phi3", 32064, 3072, 8192, 32, 32, 32)),
    "Phi-4": (14_659_507_200, sized("phi3", 100352, 5120, 17920, 40, 40, 10)),
    "Phi-3.5-MoE": (
        41_873_153_344,
        sized("phimoe", 32064, 4096, 6400, 32, 32, 8, num_local_experts=16, attention_bias=True, lm_head_bias=True),
    ),
    "GPT-2": (124_439_808, gpt("gpt2", 768, 12, 12, vocab_size=50257, n_positions=1024)),
    "GPT-2-XL": (1_557_611_200, gpt("gpt2", 1600, 48, 25, vocab_size=50257, n_positions=1024)),
    "GPT-J-6B": (6_050_882_784, gpt("gptj", 4096, 28, 16, vocab_size=50400, n_positions=2048, n_inner=None)),
    "GPT-NeoX-20B": (20_554_567_680, sized("gpt_neox", 50432, 6144, 24576, 44, 64, None)),
    "StarCoder": (
        15_517_456_384,
        gpt("gpt_bigcode", 6144, 40, 48, vocab_size=49152, n_positions=8192, n_inner=24576, multi_query=True),
    ),
    "StarCoder2-3B": (3_030_371_328, sized("starcoder2", 49152, 3072, 12288, 30, 24, 2, use_bias=True)),
    "OPT-125M": (125_239_296, sized("opt", 50272, 768, None, 12, 12, None, ffn_dim=3072)),
    "OPT-350M": (
        331_196_416,
        sized(
            "opt", 50272, 1024, None, 24, 16, None, ffn_dim=4096, word_embed_proj_dim=512, do_layer_norm_before=False
        ),
    ),
    "BLOOM": (
        176_247_271_424,
        {"model_type": "bloom", "vocab_size": 250880, "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112},
    ),
    "Falcon-7B": (6_921_720_704, sized("falcon", 65024, 4544, None, 32, 71, None, multi_query=True)),
    "Falcon-40B": (
        41_303_293_952,
        sized("falcon", 65024, 8192, None, 60, 128, None, new_decoder_architecture=True, num_kv_heads=8),
    ),
    "MPT-7B": (
        6_649_286_656,
        {"model_type": "mpt", "vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32},
    ),
    "StableLM-3B-4E1T": (2_795_443_200, sized("stablelm", 50304, 2560, 6912, 32, 32, 32)),
    "OLMo-7B": (6_888_095_744, sized("olmo", 50304, 4096, 11008, 32, 32, 32)),
    "OLMo-2-7B": (7_298_617_344, sized("olmo2", 100352, 4096, 11008, 32, 32, 32)),
    "OLMoE-1B-7B": (6_919_161_856, sized("olmoe", 50304, 2048, 1024, 16, 16, 16, num_experts=64)),
    "Command-R-35B": (34_980_831_232, sized("cohere", 256000, 8192, 22528, 40, 64, 64)),
    "SmolLM3-3B": (3_075_098_624, sized("smollm3", 128256, 2048, 11008, 36, 16, 4)),
    "GLM-4-9B": (9_400_279_040, sized("glm4", 151552, 4096, 13696, 40, 32, 2, head_dim=128, attention_bias=True)),
    "GLM-4.5-Air": (
        106_852_245_504,
        sized("glm4_moe", 151552, 4096, 10944, 46, 96, 8, head_dim=128, attention_bias=True, n_routed_experts=128),
    ),
    "ERNIE-4.5-0.3B": (360_748_032, sized("ernie4_5", 103424, 1024, 3072, 18, 16, 2, head_dim=128)),
    "GPT-OSS-20B": (20_914_757_184, sized("gpt_oss", 201088, 2880, 2880, 24, 64, 8, num_local_experts=32, **OSS)),
    "GPT-OSS-120B": (116_829_156_672, sized("gpt_oss", 201088, 2880, 2880, 36, 64, 8, num_local_experts=128, **OSS)),
    "DeepSeek-V2": (
        235_741_434_880,
        latent(
            "deepseek_v2", 102400, 5120, 12288, 60, 128, 128, dense=1, shared=2, experts=160, inner=1536, q_rank=1536
        ),
    ),
    "DeepSeek-V2-Lite": (
        15_706_484_224,
        latent("deepseek_v2", 102400, 2048, 10944, 27, 16, 16, dense=1, shared=2, experts=64, inner=1408, q_rank=None),
    ),
    "DeepSeek-V3": (
        671_026_404_352,
        latent(
            "deepseek_v3", 129280, 7168, 18432, 61, 128, 128, dense=3, shared=1, experts=256, inner=2048, q_rank=1536
        ),
    ),
    "BERT-base": (
        109_482_240,
        sized("bert", 30522, 768, 3072, 12, 12, None, max_position_embeddings=512, architectures=["BertModel"]),
    ),
    "BERT-large": (
        335_141_888,
        sized("bert", 30522, 1024, 4096, 24, 16, None, max_position_embeddings=512, architectures=["BertModel"]),
    ),
    "RoBERTa-base": (
        124_697_433,
        sized("roberta", 50265, 768, 3072, 12, 12, None, max_position_embeddings=514, type_vocab_size=1),
    ),
    "DistilBERT": (
        66_985_530,
        {"model_type": "distilbert", "vocab_size": 30522, "dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12},
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_parameters(model):
    parameters, config = PUBLISHED[model]
    assert spec_from_config(config).parameters == parameters


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "None is not a family .* Reading it needs transformers"),
        ({"model_type": ["llama"]}, "needs transformers"),
        ({"model_type": "mamba"}, "'mamba' is not a family .* Reading it needs transformers"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "gpt2 with add_cross_attention .* needs transformers"),
        ({"model_type": "llama", "per_layer_config": {"0": {}}}, "llama with per_layer_config .* needs transformers"),
        (
            {"model_type": "llama", "architectures": ["LlamaForQuestionAnswering"]},
            "reading 'LlamaForQuestionAnswering' needs transformers: of llama Partita itself knows LlamaForCausalLM, ",
        ),
        ({"model_type": "llama", "architectures": [["LlamaModel"]]}, "needs transformers"),
        ({"model_type": "llama", "hidden_size": None}, "hidden_size must be a whole number of at least 1, but is None"),
        ({"model_type": "llama", "hidden_size": "4096"}, "hidden_size must be a whole number .* but is '4096'"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers must be .* at least 1, but is 0"),
        ({"model_type": "llama", "vocab_size": True}, "vocab_size must be a whole number .* but is True"),
        ({"model_type": "gpt2", "n_embd": 8.0}, "n_embd must be a whole number .* but is 8.0"),
        ({"model_type": "llama", "attention_bias": 1}, "attention_bias must be true or false, but is 1"),
        ({"model_type": "llama", "tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"model_type": "nemotron"}, "num_key_value_heads is missing from the config"),
        ({"model_type": "hunyuan_v1_dense"}, "head_dim is missing from the config"),
        (
            {"model_type": "llama", "num_attention_heads": 48},
            r"hidden_size must be a multiple of num_attention_heads \(48\)",
        ),
        ({"model_type": "gpt2", "n_head": 7}, r"n_embd must be a multiple of n_head \(7\), but is 768"),
        (
            {"model_type": "qwen2", "hidden_size": 8},
            r"hidden_size must be at least num_attention_heads \(32\), but is 8",
        ),
        (
            {"model_type": "mistral", "num_attention_heads": 4},
            r"num_attention_heads must be a multiple of num_key_value_heads \(8\), but is 4",
        ),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0.5]}, "mlp_only_layers must be a list of layer numbers"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step must be .* at least 1, but is 0"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ModelError, match=message):
        spec_from_config(config)


def test_what_transformers_refuses_is_refused():
    """Heads that do not share the hidden states evenly: the same families refuse them."""
    strict = pytest.importorskip("huggingface_hub.errors").StrictDataclassError
    for family, known in FAMILIES.items():
        config = small(family, VARIANTS[family][0])
        for name, value in ("num_attention_heads", 5), ("hidden_size", 83):
            config[known.aliases.get(name, (name,))[-1]] = value
        refusal = (
            pytest.raises((ValueError, strict), match=r"(?i)multiple|divi[ds]") if known.even_heads else nullcontext()
        )
        with refusal:
            built(config, next(iter(known.architectures)))


def test_no_framework_is_loaded():
    code = "import sys, partita.core.model.families; print(*{'torch', 'transformers', 'numpy', 'mlx'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == ""


def test_reading_takes_few_calls_and_is_linear_in_layers():
    config = PUBLISHED["DeepSeek-V3"][1]
    calls = [calls_of(config | {"num_hidden_layers": layers}) for layers in (61, 122)]
    assert calls[0] < 50_000  # 18,000, for 967 tensors
    assert calls[1] < 2.5 * calls[0]


def calls_of(config):
    """How many calls, of Python's and C's functions, `spec_from_config` makes."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        spec_from_config(config)
    finally:
        sys.setprofile(before)
    return calls
