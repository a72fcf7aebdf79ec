"""Decoders with ALiBi, and Falcon, whose first version used it.

Facts: transformers 5.23, `models/*/{modeling,configuration}_*.py`.
"""

from __future__ import annotations

from partita.core.model.families.config import Config, sizes
from partita.core.model.families.family import decoder_family, one_each
from partita.core.model.families.parts import Parts, embedding, linear, norm, norms, plain_mlp, stack, within


def fused_attention(c: Config, outputs: int, bias: bool) -> Parts:
    """Query, key and value in one, as BLOOM and Falcon name it."""
    return within(
        "self_attention", linear("query_key_value", c.hidden, outputs, bias), linear("dense", c.hidden, c.hidden, bias)
    )


def bloom(c: Config) -> Parts:
    """BLOOM: ALiBi, and a norm directly after the embedding."""
    layer = [
        *norm("input_layernorm", c.hidden, bias=True),
        *fused_attention(c, 3 * c.hidden, bias=True),
        *norm("post_attention_layernorm", c.hidden, bias=True),
        *plain_mlp(c, 4 * c.hidden, "dense_h_to_4h", "dense_4h_to_h", bias=True),
    ]
    return [
        *embedding("word_embeddings", c.vocab, c.hidden),
        *norm("word_embeddings_layernorm", c.hidden, bias=True),
        *stack("h", [layer] * c.layers),
        *norm("ln_f", c.hidden, bias=True),
    ]


def falcon(c: Config) -> Parts:
    """Falcon in its three forms: of RW (MHA, one after the other), 7B (one KV head), 40B, 180B and 11B (groups)."""
    bias = c.flag("bias")
    if not c.flag("parallel_attn"):
        paths: tuple[str, ...] = ("post_attention_layernorm", "input_layernorm")
    elif c.size_or("num_ln_in_parallel_attn", 1 + c.flag("new_decoder_architecture")) == 2:
        paths = ("ln_attn", "ln_mlp")
    else:
        paths = ("input_layernorm",)
    layer = [
        *fused_attention(c, (c.heads + 2 * falcon_kv_heads(c)) * c.head_share, bias),
        *plain_mlp(c, c.size_or("intermediate_size", 4 * c.hidden), "dense_h_to_4h", "dense_4h_to_h", bias),
        *norms(c.hidden, *paths, bias=True),
    ]
    return [
        *embedding("word_embeddings", c.vocab, c.hidden),
        *stack("h", [layer] * c.layers),
        *norm("ln_f", c.hidden, bias=True),
    ]


def falcon_kv_heads(c: Config) -> int:
    """The new form counts them; the old ones have one for all, or one each."""
    if c.flag("new_decoder_architecture"):
        return c.kv_heads
    return 1 if c.flag("multi_query") else c.heads


def mpt(c: Config) -> Parts:
    """MPT: ALiBi and no bias. transformers ignores its config's KV heads and MLP width."""
    layer = [
        *norm("norm_1", c.hidden),
        *within(
            "attn",
            linear("Wqkv", c.hidden, 3 * c.hidden),
            linear("out_proj", c.hidden, c.hidden),
        ),
        *norm("norm_2", c.hidden),
        *plain_mlp(c, 4 * c.hidden, "up_proj", "down_proj", bias=False, path="ffn"),
    ]
    return [
        *embedding("wte", c.vocab, c.hidden),
        *stack("blocks", [layer] * c.layers),
        *norm("norm_f", c.hidden),
    ]


FAMILIES = {
    "bloom": decoder_family(
        "Bloom",
        bloom,
        sizes(250880, 64, None, 2, 8, tie_word_embeddings=True),
        path="transformer",
        layers="h",
        embedding="word_embeddings",
        aliases={
            "hidden_size": ("n_embed", "hidden_size"),
            "num_hidden_layers": ("num_hidden_layers", "n_layer"),
            "num_attention_heads": ("num_attention_heads", "n_head"),
        },
        kv_heads=one_each,
        even_heads=True,
    ),
    "falcon": decoder_family(
        "Falcon",
        falcon,
        sizes(65024, 4544, None, 32, 71, multi_query=True, parallel_attn=True, tie_word_embeddings=True),
        path="transformer",
        layers="h",
        embedding="word_embeddings",
        aliases={
            "hidden_size": ("n_embed", "hidden_size"),
            "num_key_value_heads": ("num_kv_heads",),
            "intermediate_size": ("ffn_hidden_size",),
        },
        kv_heads=falcon_kv_heads,
        even_heads=True,
    ),
    "mpt": decoder_family(
        "Mpt",
        mpt,
        sizes(50368, 2048, None, 24, 16, tie_word_embeddings=True),
        path="transformer",
        layers="blocks",
        embedding="wte",
        aliases={
            "hidden_size": ("hidden_size", "d_model"),
            "num_hidden_layers": ("num_hidden_layers", "n_layers"),
            "num_attention_heads": ("num_attention_heads", "n_heads"),
        },
        kv_heads=one_each,
    ),
}
