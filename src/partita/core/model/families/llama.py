"""Dense decoders of Llama's kind: RMS norms and a gated MLP.

Facts: transformers 5.23, `models/*/{modeling,configuration}_*.py`.
"""

from __future__ import annotations

from partita.core.model.families.config import Config, sizes
from partita.core.model.families.family import decoder_family
from partita.core.model.families.parts import Parts, attention, decoder, gated_mlp, head_norms, norm, norms

BEFORE = ("input_layernorm", "post_attention_layernorm")
AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def llama(c: Config) -> Parts:
    """Llama; Granite and SmolLM3 differ in their defaults only."""
    bias = c.flag("attention_bias")
    layer = attention(c, bias, bias) + gated_mlp(c, bias=c.flag("mlp_bias")) + norms(c.hidden, *BEFORE)
    return decoder(c, layer)


def mistral(c: Config) -> Parts:
    """Mistral: no bias anywhere."""
    return decoder(c, attention(c) + gated_mlp(c) + norms(c.hidden, *BEFORE))


def qwen2(c: Config) -> Parts:
    """Qwen 2 and 2.5: query, key and value have a bias, the output has none."""
    return decoder(c, attention(c, qkv_bias=True) + gated_mlp(c) + norms(c.hidden, *BEFORE))


def qwen3(c: Config) -> Parts:
    """Qwen 3: norms of each head."""
    bias = c.flag("attention_bias")
    layer = attention(c, bias, bias, extra=head_norms(c)) + gated_mlp(c) + norms(c.hidden, *BEFORE)
    return decoder(c, layer)


def gemma(c: Config) -> Parts:
    """Gemma."""
    bias = c.flag("attention_bias")
    return decoder(c, attention(c, bias, bias) + gated_mlp(c) + norms(c.hidden, *BEFORE))


def gemma2(c: Config) -> Parts:
    """Gemma 2: norms before and after."""
    bias = c.flag("attention_bias")
    return decoder(c, attention(c, bias, bias) + gated_mlp(c) + norms(c.hidden, *AROUND))


def gemma3(c: Config) -> Parts:
    """Gemma 3's text model: Gemma 2 with norms of each head."""
    bias = c.flag("attention_bias")
    layer = attention(c, bias, bias, extra=head_norms(c)) + gated_mlp(c) + norms(c.hidden, *AROUND)
    return decoder(c, layer)


def olmo(c: Config) -> Parts:
    """OLMo: its norms hold no tensors."""
    bias = c.flag("attention_bias")
    return decoder(c, attention(c, bias, bias) + gated_mlp(c), last=[])


def olmo2(c: Config) -> Parts:
    """OLMo 2 and 3: norms after, and over all query and all key heads at once [N D], [K D]."""
    bias = c.flag("attention_bias")
    extra = norm("q_norm", c.heads * c.head_dim) + norm("k_norm", c.kv_heads * c.head_dim)
    return decoder(c, attention(c, bias, bias, extra=extra) + gated_mlp(c) + norms(c.hidden, *AFTER))


def exaone4(c: Config) -> Parts:
    """EXAONE 4: norms after, and of each head."""
    return decoder(c, attention(c, extra=head_norms(c)) + gated_mlp(c) + norms(c.hidden, *AFTER))


def ernie(c: Config) -> Parts:
    """ERNIE 4.5: one flag for every bias."""
    bias = c.flag("use_bias")
    return decoder(c, attention(c, bias, bias) + gated_mlp(c, bias=bias) + norms(c.hidden, *BEFORE))


def hunyuan(c: Config) -> Parts:
    """Hunyuan: Qwen 3 with other names; its config class has no working default for the head's width."""
    bias = c.flag("attention_bias")
    extra = norms(c.size("head_dim"), "query_layernorm", "key_layernorm")
    return decoder(c, attention(c, bias, bias, extra=extra) + gated_mlp(c) + norms(c.hidden, *BEFORE))


def seed_oss(c: Config) -> Parts:
    """Seed-OSS: a flag of its own for the output's bias."""
    attend = attention(c, c.flag("attention_bias"), c.flag("attention_out_bias"))
    return decoder(c, attend + gated_mlp(c, bias=c.flag("mlp_bias")) + norms(c.hidden, *BEFORE))


TIED = {"tie_word_embeddings": True}

FAMILIES = {
    "llama": decoder_family("Llama", llama, sizes(32000, 4096, 11008, 32, 32), even_heads=True),
    "granite": decoder_family("Granite", llama, sizes(32000, 4096, 11008, 32, 32), classifier=False),
    "smollm3": decoder_family("SmolLM3", llama, sizes(128256, 2048, 11008, 36, 16, 4) | TIED),
    "mistral": decoder_family("Mistral", mistral, sizes(32000, 4096, 14336, 32, 32, 8)),
    "qwen2": decoder_family("Qwen2", qwen2, sizes(151936, 4096, 22016, 32, 32, 32)),
    "qwen3": decoder_family("Qwen3", qwen3, sizes(151936, 4096, 22016, 32, 32, 32, head_dim=128)),
    "gemma": decoder_family("Gemma", gemma, sizes(256000, 3072, 24576, 28, 16, 16, head_dim=256) | TIED),
    "gemma2": decoder_family(
        "Gemma2", gemma2, sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256) | TIED, even_heads=True
    ),
    "gemma3_text": decoder_family(
        "Gemma3Text",
        gemma3,
        sizes(262208, 2304, 9216, 26, 8, 4, head_dim=256) | TIED,
        causal="Gemma3ForCausalLM",
        even_heads=True,
    ),
    "olmo": decoder_family("Olmo", olmo, sizes(50304, 4096, 11008, 32, 32)),
    "olmo2": decoder_family("Olmo2", olmo2, sizes(50304, 4096, 11008, 32, 32)),
    "olmo3": decoder_family("Olmo3", olmo2, sizes(50304, 4096, 11008, 32, 32)),
    "exaone4": decoder_family("Exaone4", exaone4, sizes(102400, 4096, 16384, 32, 32, 32)),
    "ernie4_5": decoder_family(
        "Ernie4_5", ernie, sizes(103424, 1024, 3072, 18, 16, 2, head_dim=128) | TIED, classifier=False
    ),
    "hunyuan_v1_dense": decoder_family("HunYuanDenseV1", hunyuan, sizes(290943, 4096, 11008, 32, 32)),
    "seed_oss": decoder_family(
        "SeedOss", seed_oss, sizes(155136, 4096, 27648, 64, 80, 8, head_dim=128, attention_bias=True)
    ),
}
