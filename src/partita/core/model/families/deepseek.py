"""DeepSeek V2 and V3, and GLM 4.5, whose experts are the same. Facts: transformers 5.23, `models/*/modeling_*.py`.

Multi-token-prediction layers are not part of these classes, so they are not counted.
"""

from __future__ import annotations

from partita.core.model.families.config import Config, sizes
from partita.core.model.families.family import decoder_family, one_each
from partita.core.model.families.parts import (
    Parts,
    attention,
    buffer,
    experts,
    gated_mlp,
    head_norms,
    linear,
    mixed_decoder,
    norm,
    norms,
    router,
    within,
)


def latent_attention(c: Config) -> Parts:
    """Latent attention: queries (unless `q_lora_rank` is null), keys and values go through a narrow layer."""
    bias, rope, nope = c.flag("attention_bias"), c.size("qk_rope_head_dim"), c.size("qk_nope_head_dim")
    kv_rank, v_dim = c.size("kv_lora_rank"), c.size("v_head_dim")
    queries = c.heads * (nope + rope)
    if c.find("q_lora_rank")[1] is None:
        query = linear("q_proj", c.hidden, queries)
    else:
        q_rank = c.size("q_lora_rank")
        query = [
            *linear("q_a_proj", c.hidden, q_rank, bias),
            *norm("q_a_layernorm", q_rank),
            *linear("q_b_proj", q_rank, queries),
        ]
    return within(
        "self_attn",
        query,
        linear("kv_a_proj_with_mqa", c.hidden, kv_rank + rope, bias),
        norm("kv_a_layernorm", kv_rank),
        linear("kv_b_proj", kv_rank, c.heads * (nope + v_dim)),
        linear("o_proj", c.heads * v_dim, c.hidden, bias),
    )


def expert_mlp(c: Config, *, corrected: bool, bias: bool = False) -> Parts:
    """Experts, their router (with the correction [E] that balances its choice), and the shared experts."""
    width = c.size("moe_intermediate_size")
    return within(
        "mlp",
        experts(c, width),
        router(c),
        buffer("gate.e_score_correction_bias", c.experts) if corrected else [],
        gated_mlp(c, "shared_experts", width * c.size("n_shared_experts", least=0), bias),
    )


def first_dense(c: Config, attend: Parts, sparse: Parts, bias: bool = False) -> Parts:
    """The first `first_k_dense_replace` layers have a plain MLP, the others experts."""
    first = c.size("first_k_dense_replace", least=0)
    end = norms(c.hidden, "input_layernorm", "post_attention_layernorm")
    dense, mixed = attend + gated_mlp(c, bias=bias) + end, attend + sparse + end
    return mixed_decoder(c, [dense if index < first else mixed for index in range(c.layers)])


def deepseek_v2(c: Config) -> Parts:
    """DeepSeek V2."""
    bias = c.flag("mlp_bias")
    return first_dense(c, latent_attention(c), expert_mlp(c, corrected=False, bias=bias), bias)


def deepseek_v3(c: Config) -> Parts:
    """DeepSeek V3 and R1."""
    return first_dense(c, latent_attention(c), expert_mlp(c, corrected=True))


def glm4_moe(c: Config) -> Parts:
    """GLM 4.5 and 4.6: DeepSeek V3's experts, ordinary attention."""
    extra = head_norms(c) if c.flag("use_qk_norm") else []
    return first_dense(c, attention(c, c.flag("attention_bias"), extra=extra), expert_mlp(c, corrected=True))


FAMILIES = {
    "deepseek_v2": decoder_family(
        "DeepseekV2",
        deepseek_v2,
        sizes(102400, 4096, 11008, 32, 32, num_experts=64, n_shared_experts=2, moe_intermediate_size=1407)
        | {"q_lora_rank": 1536, "kv_lora_rank": 512, "first_k_dense_replace": 0}
        | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        aliases={"num_experts": ("num_experts", "n_routed_experts")},
        kv_heads=one_each,
        even_heads=True,
    ),
    "deepseek_v3": decoder_family(
        "DeepseekV3",
        deepseek_v3,
        sizes(129280, 7168, 18432, 61, 128, num_experts=256, n_shared_experts=1, moe_intermediate_size=2048)
        | {"q_lora_rank": 1536, "kv_lora_rank": 512, "first_k_dense_replace": 3}
        | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        aliases={"num_experts": ("num_local_experts", "n_routed_experts")},
        kv_heads=one_each,
    ),
    "glm4_moe": decoder_family(
        "Glm4Moe",
        glm4_moe,
        sizes(151552, 4096, 10944, 46, 96, 8, num_experts=128, n_shared_experts=1, moe_intermediate_size=1408)
        | {"first_k_dense_replace": 1},
        classifier=False,
        aliases={"num_experts": ("num_local_experts", "n_routed_experts")},
    ),
}
