"""Decoders with experts. Facts: transformers 5.23, `models/*/{modeling,configuration}_*.py`; its experts are fused."""

from __future__ import annotations

from partita.core.model.families.config import Config, sizes
from partita.core.model.families.family import decoder_family
from partita.core.model.families.parts import (
    Parts,
    attention,
    decoder,
    experts,
    gated_mlp,
    head_norms,
    linear,
    mixed_decoder,
    norm,
    norms,
    parameter,
    router,
    within,
)

BEFORE = ("input_layernorm", "post_attention_layernorm")


def mixtral(c: Config) -> Parts:
    """Mixtral: Mistral with experts."""
    return decoder(c, attention(c) + within("mlp", router(c), experts(c, c.inner)) + norms(c.hidden, *BEFORE))


def qwen_layers(c: Config, attend: Parts, sparse: Parts) -> Parts:
    """Every `decoder_sparse_step`th layer has experts unless `mlp_only_layers` names it; the others a plain MLP."""
    step, dense_layers = c.size("decoder_sparse_step"), c.indices("mlp_only_layers") or []
    has_experts = c.experts > 0

    def layer(index: int) -> Parts:
        is_sparse = has_experts and index not in dense_layers and (index + 1) % step == 0
        return attend + (sparse if is_sparse else gated_mlp(c)) + norms(c.hidden, *BEFORE)

    return mixed_decoder(c, [layer(index) for index in range(c.layers)])


def qwen2_moe(c: Config) -> Parts:
    """Qwen 1.5 and 2 with experts: one more expert that is always used, with a gate of its own."""
    sparse = within(
        "mlp",
        router(c),
        experts(c, c.size("moe_intermediate_size")),
        gated_mlp(c, "shared_expert", c.size("shared_expert_intermediate_size", least=0)),
        linear("shared_expert_gate", c.hidden, 1),
    )
    return qwen_layers(c, attention(c, c.flag("qkv_bias")), sparse)


def qwen3_moe(c: Config) -> Parts:
    """Qwen 3 with experts."""
    bias = c.flag("attention_bias")
    sparse = within("mlp", experts(c, c.size("moe_intermediate_size")), router(c))
    return qwen_layers(c, attention(c, bias, bias, extra=head_norms(c)), sparse)


def olmoe(c: Config) -> Parts:
    """OLMoE: norms over all query and all key heads at once."""
    bias = c.flag("attention_bias")
    extra = norm("q_norm", c.hidden) + norm("k_norm", c.kv_heads * c.head_share)
    sparse = within("mlp", router(c), experts(c, c.inner))
    return decoder(c, attention(c, bias, bias, extra=extra) + sparse + norms(c.hidden, *BEFORE))


def granite_moe(c: Config) -> Parts:
    """Granite with experts."""
    bias = c.flag("attention_bias")
    sparse = within("block_sparse_moe", router(c, "router"), experts(c, c.inner))
    return decoder(c, attention(c, bias, bias) + norms(c.hidden, *BEFORE) + sparse)


def phimoe(c: Config) -> Parts:
    """Phi 3.5 with experts: layer norms, and a router that is a linear layer."""
    bias = c.flag("attention_bias")
    sparse = within("mlp", linear("router", c.hidden, c.experts), experts(c, c.inner))
    layer = attention(c, bias, bias) + sparse + norms(c.hidden, *BEFORE, bias=True)
    return decoder(c, layer, norm("norm", c.hidden, bias=True))


def gpt_oss(c: Config) -> Parts:
    """GPT-OSS: a sink for each head [N]; experts [E, H, 2 I], [E, I, H] with biases."""
    bias, count = c.flag("attention_bias"), c.experts
    sparse = within(
        "mlp",
        parameter("router.weight", count, c.hidden),
        parameter("router.bias", count),
        parameter("experts.gate_up_proj", count, c.hidden, 2 * c.inner),
        parameter("experts.gate_up_proj_bias", count, 2 * c.inner),
        parameter("experts.down_proj", count, c.inner, c.hidden),
        parameter("experts.down_proj_bias", count, c.hidden),
    )
    sinks = parameter("self_attn.sinks", c.heads)
    return decoder(c, sinks + attention(c, bias, bias) + sparse + norms(c.hidden, *BEFORE))


def llama4(c: Config) -> Parts:
    """Llama 4's text model: in some layers experts [E, H, 2 I], [E, I, H] beside one that is always used."""
    bias, count, step = c.flag("attention_bias"), c.experts, c.size("interleave_moe_layer_step")
    given = c.indices("moe_layers")
    sparse_layers = range(step - 1, c.layers, step) if given is None else given
    sparse = within(
        "feed_forward",
        parameter("experts.gate_up_proj", count, c.hidden, 2 * c.inner),
        parameter("experts.down_proj", count, c.inner, c.hidden),
        linear("router", c.hidden, count),
        gated_mlp(c, "shared_expert"),
    )
    dense = gated_mlp(c, "feed_forward", c.size("intermediate_size_mlp"))
    around = attention(c, bias, bias), norms(c.hidden, *BEFORE)
    layers = [around[0] + (sparse if index in sparse_layers else dense) + around[1] for index in range(c.layers)]
    return mixed_decoder(c, layers)


def ernie_moe(c: Config) -> Parts:
    """ERNIE 4.5 with experts: in every so many layers of a range, a correction of the router's choice [1, E]."""
    bias, width = c.flag("use_bias"), c.size("moe_intermediate_size")
    start, end = c.size("moe_layer_start_index", least=0), c.size("moe_layer_end_index", least=-1)
    interval, shared = c.size("moe_layer_interval"), c.size("moe_num_shared_experts", least=0)
    last = c.layers - 1 if end == -1 else end
    sparse = within(
        "mlp",
        router(c),
        parameter("gate.moe_statics.e_score_correction_bias", 1, c.experts),
        experts(c, width),
        gated_mlp(c, "shared_experts", width * shared, bias) if shared else [],
    )
    dense = gated_mlp(c, bias=bias)
    around = attention(c, bias, bias), norms(c.hidden, *BEFORE)

    def layer(index: int) -> Parts:
        is_sparse = (index + 1) % interval == 0 and start <= index <= last
        return around[0] + (sparse if is_sparse else dense) + around[1]

    return mixed_decoder(c, [layer(index) for index in range(c.layers)])


TIED = {"tie_word_embeddings": True}
LOCAL = {"num_experts": ("num_local_experts",)}
EITHER = {"num_experts": ("num_experts", "num_local_experts")}

FAMILIES = {
    "mixtral": decoder_family("Mixtral", mixtral, sizes(32000, 4096, 14336, 32, 32, 8, num_experts=8), aliases=EITHER),
    "qwen2_moe": decoder_family(
        "Qwen2Moe",
        qwen2_moe,
        sizes(151936, 2048, 5632, 24, 16, 16, num_experts=60, decoder_sparse_step=1, qkv_bias=True)
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    ),
    "qwen3_moe": decoder_family(
        "Qwen3Moe",
        qwen3_moe,
        sizes(151936, 2048, 6144, 24, 32, 4, num_experts=128, decoder_sparse_step=1, moe_intermediate_size=768),
        aliases={"num_experts": ("num_local_experts", "num_experts")},
    ),
    "olmoe": decoder_family(
        "Olmoe",
        olmoe,
        sizes(50304, 2048, 2048, 16, 16, num_experts=64),
        classifier=False,
        aliases={"num_experts": ("num_local_experts", "num_experts")},
    ),
    "granitemoe": decoder_family(
        "GraniteMoe", granite_moe, sizes(32000, 4096, 11008, 32, 32, num_experts=8), classifier=False, aliases=LOCAL
    ),
    "phimoe": decoder_family(
        "Phimoe",
        phimoe,
        sizes(32064, 4096, 6400, 32, 32, 8, num_experts=16),
        head_bias=lambda c: c.flag("lm_head_bias"),
        aliases=LOCAL,
    ),
    "gpt_oss": decoder_family(
        "GptOss",
        gpt_oss,
        sizes(201088, 2880, 2880, 36, 64, 8, num_experts=128, head_dim=64, attention_bias=True),
        aliases=EITHER,
    ),
    "llama4_text": decoder_family(
        "Llama4Text",
        llama4,
        sizes(202048, 5120, 8192, 48, 40, 8, num_experts=16, head_dim=128)
        | {"intermediate_size_mlp": 16384, "interleave_moe_layer_step": 1},
        causal="Llama4ForCausalLM",
        classifier=False,
        aliases=LOCAL,
    ),
    "ernie4_5_moe": decoder_family(
        "Ernie4_5_Moe",
        ernie_moe,
        sizes(103424, 2560, 12288, 28, 20, 4, num_experts=64, moe_intermediate_size=1536, moe_num_shared_experts=2)
        | {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}
        | TIED,
        classifier=False,
        head_bias=lambda c: c.flag("use_bias"),
        aliases={"num_experts": ("num_experts", "moe_num_experts")},
    ),
}
