"""Dense decoders that leave Llama's kind somewhere: layer norms, a plain or fused MLP, attention and MLP side by side.

Facts: transformers 5.23, `models/*/{modeling,configuration}_*.py`.
"""

from __future__ import annotations

from partita.core.model.families.config import Config, sizes
from partita.core.model.families.family import decoder_family
from partita.core.model.families.parts import (
    Parts,
    attention,
    decoder,
    fused_mlp,
    gated_mlp,
    linear,
    norm,
    norms,
    plain_mlp,
    within,
)

BEFORE = ("input_layernorm", "post_attention_layernorm")


def phi(c: Config) -> Parts:
    """Phi 1 and 2: attention and MLP side by side behind one norm, a bias everywhere."""
    extra = norms(c.head_share, "q_layernorm", "k_layernorm", bias=True) if c.flag("qk_layernorm") else []
    layer = (
        attention(c, qkv_bias=True, out_bias=True, out="dense", extra=extra)
        + plain_mlp(c, c.inner, "fc1", "fc2", bias=True)
        + norm("input_layernorm", c.hidden, bias=True)
    )
    return decoder(c, layer, norm("final_layernorm", c.hidden, bias=True))


def phi3(c: Config) -> Parts:
    """Phi 3 and 4: query, key and value in one [(N + 2 K) D, H]."""
    fused = within(
        "self_attn",
        linear("o_proj", c.heads * c.head_dim, c.hidden),
        linear("qkv_proj", c.hidden, (c.heads + 2 * c.kv_heads) * c.head_dim),
    )
    return decoder(c, fused + fused_mlp(c) + norms(c.hidden, *BEFORE))


def stablelm(c: Config) -> Parts:
    """StableLM: layer norms, one of them missing where attention and MLP are side by side."""
    dim = c.head_share
    extra: Parts = []
    if c.flag("qk_layernorm"):
        for path, heads in ("q_layernorm", c.heads), ("k_layernorm", c.kv_heads):
            extra += norms(dim, *(f"{path}.norms.{head}" for head in range(heads)))
    before = BEFORE[:1] if c.flag("use_parallel_residual") else BEFORE
    layer = (
        attention(c, qkv_bias=c.flag("use_qkv_bias"), head_dim=dim, extra=extra)
        + gated_mlp(c)
        + norms(c.hidden, *before, bias=True)
    )
    return decoder(c, layer, norm("norm", c.hidden, bias=True))


def cohere(c: Config) -> Parts:
    """Command R: attention and MLP side by side behind one norm; where asked a norm for each head apart [N, D]."""
    bias = c.flag("attention_bias")
    extra: Parts = []
    if c.flag("use_qk_norm"):
        extra = norm("q_norm", c.heads, c.head_dim) + norm("k_norm", c.kv_heads, c.head_dim)
    return decoder(c, attention(c, bias, bias, extra=extra) + gated_mlp(c) + norm("input_layernorm", c.hidden))


def cohere2(c: Config) -> Parts:
    """Command A and R7B: no norms of heads."""
    bias = c.flag("attention_bias")
    return decoder(c, attention(c, bias, bias) + gated_mlp(c) + norm("input_layernorm", c.hidden))


def starcoder2(c: Config) -> Parts:
    """StarCoder 2: layer norms and a plain MLP."""
    bias = c.flag("use_bias")
    layer = (
        attention(c, bias, bias) + plain_mlp(c, c.inner, "c_fc", "c_proj", bias) + norms(c.hidden, *BEFORE, bias=True)
    )
    return decoder(c, layer, norm("norm", c.hidden, bias=True))


def nemotron(c: Config) -> Parts:
    """Nemotron and Minitron: layer norms and a plain MLP; its config class has no working default for the KV heads."""
    c.size("num_key_value_heads")
    bias = c.flag("attention_bias")
    layer = (
        attention(c, bias, bias)
        + plain_mlp(c, c.inner, "up_proj", "down_proj", c.flag("mlp_bias"))
        + norms(c.hidden, *BEFORE, bias=True)
    )
    return decoder(c, layer, norm("norm", c.hidden, bias=True))


def arcee(c: Config) -> Parts:
    """Arcee: Llama with a plain MLP."""
    bias = c.flag("attention_bias")
    mlp = plain_mlp(c, c.inner, "up_proj", "down_proj", c.flag("mlp_bias"))
    return decoder(c, attention(c, bias, bias) + mlp + norms(c.hidden, *BEFORE))


def glm(c: Config) -> Parts:
    """GLM 4 of 2024: gate and up in one."""
    return decoder(c, attention(c, c.flag("attention_bias")) + fused_mlp(c) + norms(c.hidden, *BEFORE))


def glm4(c: Config) -> Parts:
    """GLM 4 of 2025: norms before and after."""
    around = (*BEFORE, "post_self_attn_layernorm", "post_mlp_layernorm")
    return decoder(c, attention(c, c.flag("attention_bias")) + fused_mlp(c) + norms(c.hidden, *around))


TIED = {"tie_word_embeddings": True}

FAMILIES = {
    "phi": decoder_family("Phi", phi, sizes(51200, 2048, 8192, 24, 32), head_bias=lambda c: True),
    "phi3": decoder_family("Phi3", phi3, sizes(32064, 3072, 8192, 32, 32)),
    "stablelm": decoder_family("StableLm", stablelm, sizes(50304, 2560, 6912, 32, 32, 32), even_heads=True),
    "cohere": decoder_family("Cohere", cohere, sizes(256000, 8192, 22528, 40, 64) | TIED, classifier=False),
    "cohere2": decoder_family("Cohere2", cohere2, sizes(256000, 8192, 22528, 40, 64) | TIED, classifier=False),
    "starcoder2": decoder_family("Starcoder2", starcoder2, sizes(49152, 3072, 12288, 30, 24, 2, use_bias=True) | TIED),
    "nemotron": decoder_family("Nemotron", nemotron, sizes(256000, 6144, 24576, 32, 48)),
    "arcee": decoder_family("Arcee", arcee, sizes(32000, 2560, 18432, 32, 32), even_heads=True),
    "glm": decoder_family("Glm", glm, sizes(151552, 4096, 13696, 40, 32, 2, head_dim=128, attention_bias=True)),
    "glm4": decoder_family("Glm4", glm4, sizes(151552, 4096, 13696, 40, 32, 2, head_dim=128, attention_bias=True)),
}
