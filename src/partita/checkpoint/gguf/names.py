"""The tensors of a GGUF file under the names that Hugging Face's checkpoints have, and how their values differ from those.

llama.cpp renames tensors, reorders the rows of some, stores others transposed or plus one, and stacks experts.
Source: convert_hf_to_gguf.py and gguf-py's tensor_mapping.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul

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

    def places(self) -> list[int]:
        """For each row of the model, the row on disk."""
        strides = list(accumulate(reversed(self.dims[1:]), mul, initial=1))[::-1]
        places = [0]
        for axis in self.axes:
            places = [place + step * strides[axis] for place in places for step in range(self.dims[axis])]
        return places


@dataclass(frozen=True)
class Groups:
    """An order of rows: on disk the first part of every group comes first, then the second of every group, and so on.

    In the model all parts of a group are together.

    Attributes:
        count: The number of groups.
        parts: The rows of each part of one group.
    """

    count: int
    parts: tuple[int, ...]

    def places(self) -> list[int]:
        """For each row of the model, the row on disk."""
        starts = [self.count * start for start in accumulate(self.parts[:-1], initial=0)]
        return [
            start + group * rows + row
            for group in range(self.count)
            for start, rows in zip(starts, self.parts, strict=True)
            for row in range(rows)
        ]


@dataclass(frozen=True)
class GgufInfo(TensorInfo):
    """A tensor of a GGUF file: `shape` is the model's, and rows on disk are outputs.

    Attributes:
        order: The order of its rows in the model, if it is another than on disk.
        transposed: Whether the model stores it as (..., inputs, outputs).
        other: A tensor of the same shape on disk whose outputs alternate with those of this one in the model.
    """

    order: Order | Groups | None = None
    transposed: bool = False
    other: TensorInfo | None = None

    @property
    def is_as_stored(self) -> bool:
        """Whether its bytes are those of a tensor of safetensors."""
        return self.dtype in PLAIN and self.order is None and not self.transposed


@dataclass(frozen=True)
class Changed:
    """A small tensor whose values are computed from those in the file.

    Attributes:
        infos: The tensors in the file.
        shape: Its shape in the model.
        change: From the values of each of `infos` to its values.
    """

    infos: tuple[TensorInfo, ...]
    shape: tuple[int, ...]
    change: Callable[..., list[float]]


@dataclass(frozen=True)
class _Names:
    """How one architecture names its tensors.

    Attributes:
        top: Modules outside of layers: llama.cpp's name -> Hugging Face's.
        layers: The path of the list of layers, by what begins the names of its tensors in the file before `blk`.
        leaves: Modules of a layer, relative to it; `{}` is the number of an expert, which the file stacks.
        tensors: Tensors of a layer, with `.weight` or `.bias` if the file has it, whose name in the model is no module's.
        minus_one: Whether its norms are stored plus one.
        transposed: Leaves whose weights the model stores as (inputs, outputs).
        alternating: Leaves whose outputs alternate in the model with those of another leaf.
        log_negative: Leaves that hold minus the exponential of the model's values.
        head_pairs: Leaves whose rows alternate between the halves of each head.
        fused_heads: Leaves whose rows hold first all queries, then all keys, then all values; the model has those of a KV head
            together.
        convolutions: Leaves whose weights have a dim of size 1 in the middle in the model.
    """

    top: dict[str, str]
    layers: Mapping[str, str]
    leaves: dict[str, str]
    tensors: Mapping[str, str] = field(default_factory=dict)
    minus_one: bool = False
    transposed: frozenset[str] = frozenset()
    alternating: Mapping[str, str] = field(default_factory=dict)
    log_negative: frozenset[str] = frozenset()
    head_pairs: frozenset[str] = frozenset()
    fused_heads: frozenset[str] = frozenset()
    convolutions: frozenset[str] = frozenset()


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
_DENSE = _Names(_TOP, {"": "model.layers"}, _ATTENTION | _NORMS | _GATED)
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
    {"": "transformer.h"},
    {"attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc",
     "ffn_down": "mlp.c_proj"},
    transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
)  # fmt: skip
_BLOOM = _Names(
    {"token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
     "output_norm": "transformer.ln_f", "output": "lm_head"},
    {"": "transformer.h"},
    {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_qkv": "self_attention.query_key_value",
     "attn_output": "self_attention.dense", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"},
    fused_heads=frozenset({"attn_qkv"}),
)  # fmt: skip

_FALCON = replace(
    _BLOOM,
    leaves={
        "attn_norm": "input_layernorm", "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
        "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
    },
)  # fmt: skip
_FALCON_40B = replace(_FALCON, leaves=_FALCON.leaves | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"})
_GPT_OSS = replace(
    _DENSE,
    leaves=_ATTENTION | {
        "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"
    },
    tensors={
        "attn_sinks.weight": "self_attn.sinks",
        "ffn_gate_exps.weight": "mlp.experts.gate_up_proj", "ffn_gate_exps.bias": "mlp.experts.gate_up_proj_bias",
        "ffn_up_exps.weight": "mlp.experts.gate_up_proj", "ffn_up_exps.bias": "mlp.experts.gate_up_proj_bias",
        "ffn_down_exps.weight": "mlp.experts.down_proj", "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
    },
    alternating={"ffn_gate_exps": "ffn_up_exps"},
    transposed=frozenset({"ffn_gate_exps", "ffn_down_exps"}),
)  # fmt: skip
_MAMBA = _Names(
    {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"},
    {"": "backbone.layers"},
    {"attn_norm": "norm", "ssm_in": "mixer.in_proj", "ssm_conv1d": "mixer.conv1d", "ssm_x": "mixer.x_proj",
     "ssm_dt": "mixer.dt_proj", "ssm_out": "mixer.out_proj"},
    tensors={"ssm_a": "mixer.A_log", "ssm_d": "mixer.D"},
    log_negative=frozenset({"ssm_a"}),
    convolutions=frozenset({"ssm_conv1d"}),
)  # fmt: skip
_LFM2 = replace(
    _DENSE,
    top={**_TOP, "token_embd_norm": "model.embedding_norm", "output_norm": "model.embedding_norm"},
    leaves=_ATTENTION | {
        "attn_norm": "operator_norm", "ffn_norm": "ffn_norm", "attn_output": "self_attn.out_proj",
        "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm", "ffn_gate": "feed_forward.w1",
        "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3", "shortconv.conv": "conv.conv",
        "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
    },
    convolutions=frozenset({"shortconv.conv"}),
)  # fmt: skip
_MINIMAX_M2 = replace(
    _MIXTRAL,
    tensors={"exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias"}, head_pairs=frozenset(),
)  # fmt: skip


def _t5(*, is_gated: bool) -> _Names:
    """T5's and UMT5's names: layers of the encoder begin with `enc.`, those of the decoder with `dec.`."""
    top = {"token_embd": "shared", "output": "lm_head"}
    leaves: dict[str, str] = {}
    for side, stack, last in (("enc.", "encoder", 1), ("dec.", "decoder", 2)):
        top[f"{side}output_norm"] = f"{stack}.final_layer_norm"
        blocks = [("", "layer.0", "SelfAttention")] + [("cross_", "layer.1", "EncDecAttention")] * (last == 2)
        for kind, layer, attention in blocks:
            leaves[f"{side}{kind}attn_norm"] = f"{layer}.layer_norm"
            leaves |= {f"{side}{kind}attn_{part}": f"{layer}.{attention}.{part}" for part in "qkvo"}
            leaves[f"{side}{kind}attn_rel_b"] = f"{layer}.{attention}.relative_attention_bias"
        inner = f"layer.{last}.DenseReluDense"
        leaves[f"{side}ffn_norm"] = f"layer.{last}.layer_norm"
        leaves |= {f"{side}ffn_up": f"{inner}.{'wi_1' if is_gated else 'wi'}", f"{side}ffn_down": f"{inner}.wo"}
        if is_gated:
            leaves[f"{side}ffn_gate"] = f"{inner}.wi_0"
    return _Names(top, {"enc.": "encoder.block", "dec.": "decoder.block"}, leaves)


_NAMES: Mapping[str, _Names] = {
    "llama": _LLAMA, "mistral": _LLAMA, "mixtral": _MIXTRAL, "qwen2": _DENSE, "qwen3": _DENSE, "qwen2_moe": _MOE,
    "qwen3_moe": _MOE, "gemma": _GEMMA, "gemma2": _GEMMA2, "gemma3_text": _GEMMA2, "phi3": _PHI3, "gpt2": _GPT2,
    "stablelm": _DENSE,
    "starcoder2": replace(_DENSE, leaves=_ATTENTION | _NORMS | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "nemotron": replace(_DENSE, leaves=_ATTENTION | _NORMS | _PLAIN_MLP, minus_one=True), "bloom": _BLOOM,
    "falcon": _FALCON, "gpt_oss": _GPT_OSS, "mamba": _MAMBA, "falcon_mamba": _MAMBA, "lfm2": _LFM2, "minimax_m2": _MINIMAX_M2,
}  # fmt: skip
"""By `model_type`."""

_SPLIT = re.compile(r"(enc\.|dec\.)?(?:blk\.(\d+)\.)?([a-z0-9_]+?|shortconv\.[a-z_]+)(?:\.(\d+))?(?:\.(weight|bias))?")


def _names_of(facts: Facts, config: Mapping[str, object]) -> _Names:
    kind = str(config["model_type"])
    if kind in ("t5", "umt5"):
        return _t5(is_gated=str(config["feed_forward_proj"]).startswith("gated"))
    return _FALCON_40B if kind == "falcon" and facts.has("attn_norm_2.weight") else _NAMES[kind]


def named(facts: Facts, config: Mapping[str, object]) -> Iterator[tuple[str, GgufInfo | Changed]]:
    """Each tensor under its name in Hugging Face's checkpoints: where it is stored, or what its values are computed from.

    Raises:
        CheckpointError: A tensor is not known, so that a model without it would be another.
    """
    names = _names_of(facts, config)
    for name, info in facts.tensors.items():
        if _COMPUTED.fullmatch(name):
            continue
        match = _SPLIT.fullmatch(name)
        side, layer, leaf, expert, attribute = match.groups() if match else (None, None, "", None, "")
        leaf = f"{side or ''}{leaf}"
        if expert is not None:  # older files have one tensor an expert
            leaf += "_exps"
        start = "" if layer is None else f"{names.layers.get(side or '', '')}.{layer}."
        own = names.tensors.get(name.split(".", 2)[-1]) if layer is not None else None
        if own is not None:
            if leaf not in names.alternating.values():
                yield start + own, _unlike_a_module(names, facts, leaf, info)
            continue
        path = names.top.get(leaf) if layer is None else names.leaves.get(leaf)
        if path is None or attribute is None:
            raise CheckpointError(
                f"{facts.file}: tensor {brief(name)} is not one of {config['model_type']} ({facts.architecture}), so the model "
                "would be another without it. Use the model's Hugging Face folder."
            )
        target = start + path
        if expert is not None:
            yield f"{target.format(expert)}.{attribute}", _stored(names, facts, leaf, info)
        elif "{}" in path:
            yield from ((f"{target.format(i)}.{attribute}", one) for i, one in enumerate(_experts(facts, info)))
        elif "norm" in leaf and names.minus_one and attribute == "weight":
            yield f"{target}.{attribute}", Changed((info,), info.shape, lambda values: [value - 1 for value in values])
        else:
            yield f"{target}.{attribute}", _stored(names, facts, leaf, info)


def _unlike_a_module(names: _Names, facts: Facts, leaf: str, info: TensorInfo) -> GgufInfo | Changed:
    """A tensor that the model does not have as the weight or bias of a module."""
    if leaf in names.log_negative:
        return Changed((info,), info.shape, lambda values: _log_negative(facts, info, values))
    if leaf in names.alternating:
        partner = info.name.replace(leaf, names.alternating[leaf])
        other = facts.tensors.get(partner)
        if other is None or (other.shape, other.dtype) != (info.shape, info.dtype):
            found = "missing" if other is None else f"{other.dtype} {other.shape}"
            raise CheckpointError(
                f"{facts.file}: {brief(partner)} must be {info.dtype} {info.shape} as {brief(info.name)} is, but is {found}. "
                "Take a file of the model in which both have one type."
            )
        if len(info.shape) == 2:
            return Changed((info, other), (info.shape[0], 2 * info.shape[1]), _alternating)
        return _stacked(facts, info, other)
    if leaf in names.transposed and len(info.shape) == 3:
        return _stacked(facts, info)
    return GgufInfo(info.file, info.name, info.dtype, info.shape, info.start_bytes, info.end_bytes)


def _stacked(facts: Facts, info: TensorInfo, other: TensorInfo | None = None) -> GgufInfo:
    """Experts that the model has in one tensor as [experts, inputs, outputs]."""
    experts, outputs, inputs = _checked_experts(facts, info)
    shape = (experts, inputs, outputs * (1 if other is None else 2))
    return GgufInfo(
        info.file, info.name, info.dtype, shape, info.start_bytes, info.end_bytes, transposed=True, other=other
    )


def _alternating(first: list[float], second: list[float]) -> list[float]:
    values = first + second
    values[::2], values[1::2] = first, second
    return values


def _log_negative(facts: Facts, info: TensorInfo, values: list[float]) -> list[float]:
    if not all(value < 0 for value in values):
        raise CheckpointError(
            f"{facts.file}: all values of {brief(info.name)} must be below 0: the file is damaged. Download it again."
        )
    return [math.log(-value) for value in values]


def _stored(names: _Names, facts: Facts, leaf: str, info: TensorInfo) -> GgufInfo | Changed:
    order = _order(names, facts, leaf, info)
    shape = info.shape
    if len(shape) == 1:
        if order is not None:
            places = order.places()
            return Changed((info,), shape, lambda values: [values[place] for place in places])
        if leaf == "ffn_gate_inp_shexp":
            shape = (1, *shape)
        return GgufInfo(info.file, info.name, info.dtype, shape, info.start_bytes, info.end_bytes)
    transposed = leaf in names.transposed
    shape = shape[::-1] if transposed else shape
    if leaf in names.convolutions:
        shape = (shape[0], 1, shape[1])
    return GgufInfo(info.file, info.name, info.dtype, shape, info.start_bytes, info.end_bytes, order, transposed)


def _order(names: _Names, facts: Facts, leaf: str, info: TensorInfo) -> Order | Groups | None:
    """The order of a tensor's rows in the model, or None if it is that of the file."""
    if leaf not in names.fused_heads and leaf not in names.head_pairs:
        return None
    heads, rows = facts.size("attention.head_count"), info.shape[0]
    kv_heads = facts.size("attention.head_count_kv", heads)
    if leaf in names.fused_heads:
        count = heads + 2 * kv_heads
        if rows % count or heads % kv_heads:
            raise _wrong_rows(facts, info, f"{heads} query and {kv_heads} KV heads")
        width = rows // count
        return None if kv_heads == 1 else Groups(kv_heads, (heads // kv_heads * width, width, width))
    count = heads if leaf == "attn_q" else kv_heads
    if rows % (2 * count):
        raise _wrong_rows(facts, info, f"{count} heads of an even width")
    return Order((count, rows // count // 2, 2), (0, 2, 1))


def _wrong_rows(facts: Facts, info: TensorInfo, heads: str) -> CheckpointError:
    return CheckpointError(
        f"{facts.file}: {brief(info.name)} has {info.shape[0]} rows, which are not {heads}: the file is damaged. "
        "Download it again."
    )


def _experts(facts: Facts, info: TensorInfo) -> Iterator[GgufInfo]:
    """The experts of a stacked tensor, each a tensor of its own."""
    count, *shape = _checked_experts(facts, info)
    size = info.nbytes // max(1, count)
    for place in range(count):
        start = info.start_bytes + place * size
        yield GgufInfo(info.file, info.name, info.dtype, tuple(shape), start, start + size)


def _checked_experts(facts: Facts, info: TensorInfo) -> tuple[int, ...]:
    """The shape of a tensor of stacked experts."""
    if len(info.shape) != 3:
        raise CheckpointError(
            f"{facts.file}: {brief(info.name)} must have three dims, but its shape is {info.shape}: the file is damaged. "
            "Download it again."
        )
    return info.shape
