"""The tensors of a GGUF file under the names that Hugging Face's checkpoints have, and how their values differ from those.

llama.cpp renames tensors, reorders the rows of some, stores others transposed or plus one, and stacks experts.
Source: convert_hf_to_gguf.py and gguf-py's tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from partita.checkpoint.gguf.facts import Facts
from partita.checkpoint.gguf.file import PLAIN
from partita.checkpoint.header import TensorInfo, brief
from partita.errors import CheckpointError


@dataclass(frozen=True)
class Order:
    """An order of rows: row i on disk is number i of an array of `dims` whose axes are then permuted as numpy's transpose does.

    Attributes:
        dims: Sizes whose product is the number of rows.
        axes: The axes in the order of the model.
    """

    dims: tuple[int, ...]
    axes: tuple[int, ...]


@dataclass(frozen=True)
class GgufInfo(TensorInfo):
    """A tensor of a GGUF file: `shape` is the model's, and rows on disk are outputs.

    Attributes:
        order: The order of its rows in the model, if it is another than on disk.
        transposed: Whether the model stores it as (inputs, outputs).
    """

    order: Order | None = None
    transposed: bool = False

    @property
    def is_as_stored(self) -> bool:
        """Whether its bytes are those of a tensor of safetensors."""
        return self.dtype in PLAIN and self.order is None and not self.transposed


@dataclass(frozen=True)
class Changed:
    """A small tensor whose values are computed from those in the file.

    Attributes:
        info: The tensor in the file.
        shape: Its shape in the model.
        offset: Added to its values.
        order: The order of its elements.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    offset: float = 0.0
    order: Order | None = None


@dataclass(frozen=True)
class _Names:
    """How one architecture names its tensors.

    Attributes:
        top: Modules outside of layers: llama.cpp's name -> Hugging Face's.
        layers: The path of the list of layers.
        leaves: Modules of a layer, relative to it; `{}` is the number of an expert, which the file stacks.
        minus_one: Whether its norms are stored plus one.
        transposed: Leaves whose weights the model stores as (inputs, outputs).
        head_pairs: Leaves whose rows alternate between the halves of each head.
        fused_heads: Leaves whose rows hold first all queries, then all keys, then all values, which the model has head by head.
    """

    top: dict[str, str]
    layers: str
    leaves: dict[str, str]
    minus_one: bool = False
    transposed: frozenset[str] = frozenset()
    head_pairs: frozenset[str] = frozenset()
    fused_heads: frozenset[str] = frozenset()


_COMPUTED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|.*\.attn_rot_embd\.weight")
"""Tensors that the config makes up for."""

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PLAIN_MLP = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE = _Names(_TOP, "model.layers", _ATTENTION | _NORMS | _GATED)
_LLAMA = replace(_DENSE, head_pairs=frozenset({"attn_q", "attn_k"}))
_MIXTRAL = replace(
    _LLAMA,
    leaves=_ATTENTION | _NORMS | {
        "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
)  # fmt: skip
_MOE = replace(
    _DENSE,
    leaves=_DENSE.leaves | {
        "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        **{f"{leaf}_exps": path.replace("mlp.", "mlp.experts.{}.") for leaf, path in _GATED.items()},
        **{f"{leaf}_shexp": path.replace("mlp.", "mlp.shared_expert.") for leaf, path in _GATED.items()},
    },
)  # fmt: skip
_GEMMA = replace(_DENSE, minus_one=True)
_GEMMA2 = replace(
    _GEMMA,
    leaves=_ATTENTION | _GATED | {
        "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    },
)  # fmt: skip
_PHI3 = replace(
    _DENSE,
    leaves=_NORMS | {
        "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
)  # fmt: skip
_GPT2 = _Names(
    {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
     "output": "lm_head"},
    "transformer.h",
    {"attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc",
     "ffn_down": "mlp.c_proj"},
    transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
)  # fmt: skip
_BLOOM = _Names(
    {"token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
     "output_norm": "transformer.ln_f", "output": "lm_head"},
    "transformer.h",
    {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_qkv": "self_attention.query_key_value",
     "attn_output": "self_attention.dense", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"},
    fused_heads=frozenset({"attn_qkv"}),
)  # fmt: skip

_NAMES: Mapping[str, _Names] = {
    "llama": _LLAMA, "mistral": _LLAMA, "mixtral": _MIXTRAL, "qwen2": _DENSE, "qwen3": _DENSE, "qwen2_moe": _MOE,
    "qwen3_moe": _MOE, "gemma": _GEMMA, "gemma2": _GEMMA2, "gemma3_text": _GEMMA2, "phi3": _PHI3, "gpt2": _GPT2,
    "stablelm": _DENSE,
    "starcoder2": replace(_DENSE, leaves=_ATTENTION | _NORMS | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "nemotron": replace(_DENSE, leaves=_ATTENTION | _NORMS | _PLAIN_MLP, minus_one=True), "bloom": _BLOOM,
}  # fmt: skip
"""By `model_type`."""

_SPLIT = re.compile(r"(?:blk\.(\d+)\.)?([a-z0-9_]+?)(?:\.(\d+))?\.(weight|bias)")


def named(facts: Facts, config: Mapping[str, object]) -> Iterator[tuple[str, TensorInfo | Changed]]:
    """Each tensor under its name in Hugging Face's checkpoints: where it is stored, or what its values are computed from.

    Raises:
        CheckpointError: A tensor is not known, so that a model without it would be another.
    """
    names = _NAMES[str(config["model_type"])]
    for name, info in facts.tensors.items():
        if _COMPUTED.fullmatch(name):
            continue
        match = _SPLIT.fullmatch(name)
        layer, leaf, expert, attribute = match.groups() if match else (None, "", None, "")
        if expert is not None:  # older files have one tensor an expert
            leaf += "_exps"
        path = names.top.get(leaf) if layer is None else names.leaves.get(leaf)
        if path is None:
            raise CheckpointError(
                f"{facts.file}: tensor {brief(name)} is not one of {config['model_type']} ({facts.architecture}), so the model "
                "would be another without it. Use the model's Hugging Face folder."
            )
        target = path if layer is None else f"{names.layers}.{layer}.{path}"
        if expert is not None:
            yield f"{target.format(expert)}.{attribute}", _stored(names, facts, leaf, info)
        elif "{}" in path:
            yield from ((f"{target.format(i)}.{attribute}", one) for i, one in enumerate(_experts(facts, info)))
        elif "norm" in leaf and names.minus_one and attribute == "weight":
            yield f"{target}.{attribute}", Changed(info, info.shape, -1.0)
        else:
            yield f"{target}.{attribute}", _stored(names, facts, leaf, info)


def _stored(names: _Names, facts: Facts, leaf: str, info: TensorInfo) -> TensorInfo | Changed:
    order = _order(names, facts, leaf, info)
    shape = info.shape
    if len(shape) == 1:
        if order is not None:
            return Changed(info, shape, order=order)
        if leaf == "ffn_gate_inp_shexp":
            shape = (1, *shape)
        return GgufInfo(info.file, info.name, info.dtype, shape, info.start_bytes, info.end_bytes)
    transposed = leaf in names.transposed
    shape = shape[::-1] if transposed else shape
    return GgufInfo(info.file, info.name, info.dtype, shape, info.start_bytes, info.end_bytes, order, transposed)


def _order(names: _Names, facts: Facts, leaf: str, info: TensorInfo) -> Order | None:
    """The order of a tensor's rows in the model, or None if it is that of the file."""
    heads, rows = facts.size("attention.head_count"), info.shape[0]
    if leaf in names.fused_heads:
        return Order((3, heads, rows // (3 * heads)), (1, 0, 2))
    if leaf not in names.head_pairs:
        return None
    count = heads if leaf == "attn_q" else facts.size("attention.head_count_kv", heads)
    if rows % (2 * count):
        raise CheckpointError(
            f"{facts.file}: {brief(info.name)} has {rows} rows, which are not {count} heads of an even width: the file is "
            "damaged. Download it again."
        )
    return Order((count, rows // count // 2, 2), (0, 2, 1))


def _experts(facts: Facts, info: TensorInfo) -> Iterator[TensorInfo]:
    """The experts of a stacked tensor, each a tensor of its own."""
    if len(info.shape) != 3:
        raise CheckpointError(
            f"{facts.file}: {brief(info.name)} must have three dims, but its shape is {info.shape}: the file is damaged. "
            "Download it again."
        )
    count, *shape = info.shape
    size = info.nbytes // max(1, count)
    for place in range(count):
        start = info.start_bytes + place * size
        yield GgufInfo(info.file, info.name, info.dtype, tuple(shape), start, start + size)
