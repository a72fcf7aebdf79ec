"""Decoders like GPT-2: layer norms, plain MLPs, a bias nearly everywhere.

Facts: transformers 5.23, `models/*/{modeling,configuration}_*.py`.
"""

from __future__ import annotations

from partita.core.model.families.config import Config, sizes
from partita.core.model.families.family import decoder_family, one_each
from partita.core.model.families.parts import Parts, conv1d, embedding, linear, norm, norms, plain_mlp, stack, within

GPT = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "intermediate_size": ("n_inner",),
}


def gpt2(c: Config) -> Parts:
    """GPT-2: learned positions, and `Conv1D` for every linear layer but the head."""
    inner = c.size_or("intermediate_size", 4 * c.hidden)
    layer = [
        *norm("ln_1", c.hidden, bias=True),
        *within("attn", conv1d("c_attn", c.hidden, 3 * c.hidden), conv1d("c_proj", c.hidden, c.hidden)),
        *norm("ln_2", c.hidden, bias=True),
        *within("mlp", conv1d("c_fc", c.hidden, inner), conv1d("c_proj", inner, c.hidden)),
    ]
    return with_positions(c, layer)


def gpt_bigcode(c: Config) -> Parts:
    """StarCoder 1 and SantaCoder: GPT-2 with `nn.Linear`, and mostly with one KV head for all."""
    layer = [
        *norm("ln_1", c.hidden, bias=True),
        *within(
            "attn",
            linear("c_attn", c.hidden, (c.heads + 2 * bigcode_kv_heads(c)) * c.head_share, bias=True),
            linear("c_proj", c.hidden, c.hidden, bias=True),
        ),
        *norm("ln_2", c.hidden, bias=True),
        *plain_mlp(c, c.size_or("intermediate_size", 4 * c.hidden), "c_fc", "c_proj", bias=True),
    ]
    return with_positions(c, layer)


def bigcode_kv_heads(c: Config) -> int:
    """One for all, or one each."""
    return 1 if c.flag("multi_query") else c.heads


def with_positions(c: Config, layer: Parts) -> Parts:
    """Word and position embeddings, the layers, the last norm."""
    return [
        *embedding("wte", c.vocab, c.hidden),
        *embedding("wpe", c.size("max_position_embeddings"), c.hidden),
        *stack("h", [layer] * c.layers),
        *norm("ln_f", c.hidden, bias=True),
    ]


def gptj(c: Config) -> Parts:
    """GPT-J: attention and MLP side by side behind one norm, rotary positions."""
    paths = ("k_proj", "v_proj", "q_proj", "out_proj")
    layer = [
        *norm("ln_1", c.hidden, bias=True),
        *within("attn", *(linear(path, c.hidden, c.hidden) for path in paths)),
        *plain_mlp(c, c.size_or("intermediate_size", 4 * c.hidden), "fc_in", "fc_out", bias=True),
    ]
    return [
        *embedding("wte", c.vocab, c.hidden),
        *stack("h", [layer] * c.layers),
        *norm("ln_f", c.hidden, bias=True),
    ]


def gpt_neox(c: Config) -> Parts:
    """GPT-NeoX and Pythia: query, key and value in one, each head's three in a row."""
    bias = c.flag("attention_bias")
    layer = [
        *norms(c.hidden, "input_layernorm", "post_attention_layernorm", bias=True),
        *within(
            "attention",
            linear("query_key_value", c.hidden, 3 * c.hidden, bias),
            linear("dense", c.hidden, c.hidden, bias),
        ),
        *plain_mlp(c, c.inner, "dense_h_to_4h", "dense_4h_to_h", bias=True),
    ]
    return [
        *embedding("embed_in", c.vocab, c.hidden),
        *stack("layers", [layer] * c.layers),
        *norm("final_layer_norm", c.hidden, bias=True),
    ]


def opt(c: Config) -> Parts:
    """OPT: learned positions from 2 on; embeddings may be narrower than the hidden states."""
    bias, word = c.flag("enable_bias"), opt_word(c)
    affine = c.flag("layer_norm_elementwise_affine")

    def layer_norm(path: str) -> Parts:
        return norm(path, c.hidden, bias=True) if affine else []

    paths = ("k_proj", "v_proj", "q_proj", "out_proj")
    layer = [
        *within("self_attn", *(linear(path, c.hidden, c.hidden, bias) for path in paths)),
        *layer_norm("self_attn_layer_norm"),
        *linear("fc1", c.hidden, c.inner, bias),
        *linear("fc2", c.inner, c.hidden, bias),
        *layer_norm("final_layer_norm"),
    ]
    projections = linear("project_out", c.hidden, word) + linear("project_in", word, c.hidden)
    last = c.flag("do_layer_norm_before") and not c.flag("_remove_final_layer_norm")
    return within(
        "decoder",
        embedding("embed_tokens", c.vocab, word),
        embedding("embed_positions", c.size("max_position_embeddings") + 2, c.hidden),
        projections if word != c.hidden else [],
        layer_norm("final_layer_norm") if last else [],
        stack("layers", [layer] * c.layers),
    )


def opt_word(c: Config) -> int:
    """Width of OPT's embeddings and of what its head is given."""
    return c.size_or("word_embed_proj_dim", c.hidden)


FAMILIES = {
    "gpt2": decoder_family(
        "GPT2",
        gpt2,
        sizes(50257, 768, None, 12, 12, max_position_embeddings=1024, tie_word_embeddings=True),
        causal="GPT2LMHeadModel",
        path="transformer",
        layers="h",
        embedding="wte",
        aliases=GPT,
        kv_heads=one_each,
        even_heads=True,
    ),
    "gpt_bigcode": decoder_family(
        "GPTBigCode",
        gpt_bigcode,
        sizes(50257, 768, None, 12, 12, max_position_embeddings=1024, multi_query=True, tie_word_embeddings=True),
        path="transformer",
        layers="h",
        embedding="wte",
        aliases=GPT,
        kv_heads=bigcode_kv_heads,
        even_heads=True,
    ),
    "gptj": decoder_family(
        "GPTJ",
        gptj,
        sizes(50400, 4096, None, 28, 16),
        path="transformer",
        layers="h",
        embedding="wte",
        head_bias=lambda c: True,
        aliases=GPT,
        kv_heads=one_each,
        even_heads=True,
    ),
    "gpt_neox": decoder_family(
        "GPTNeoX",
        gpt_neox,
        sizes(50432, 6144, 24576, 44, 64, attention_bias=True),
        path="gpt_neox",
        embedding="embed_in",
        kv_heads=one_each,
        even_heads=True,
    ),
    "opt": decoder_family(
        "OPT",
        opt,
        sizes(
            50272,
            768,
            3072,
            12,
            12,
            max_position_embeddings=2048,
            do_layer_norm_before=True,
            enable_bias=True,
            layer_norm_elementwise_affine=True,
            tie_word_embeddings=True,
        ),
        layers="decoder.layers",
        embedding="decoder.embed_tokens",
        width=opt_word,
        aliases={"intermediate_size": ("ffn_dim",)},
        kv_heads=one_each,
        even_heads=True,
    ),
}
