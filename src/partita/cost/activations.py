"""Activations: the bytes of a layer, and of the ends of the model, that a micro-batch keeps for its backward.

The closed forms of Korthikanti et al. 2022 (2205.05198, table 2), in bytes of a layer with two bytes an element, s tokens, b
sequences, h hidden, a heads, t tensor ranks, follow from the same counts with the kernels `megatron`:

    none                       s b h (10 + 24 / t + 5 a s / (h t))
    sequence parallel          s b h / t (34 + 5 a s / h)
    selective                  s b h (10 + 24 / t), with sequence parallel s b h / t * 34
    full                       2 s b h
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from partita.core.model.spec import DTYPE_BYTES
from partita.cost.facts import Attention, Layer, is_in_attention
from partita.cost.kernels import Kernels
from partita.cost.model import ModelCost
from partita.cost.work import Recompute


@dataclass(frozen=True)
class Shape:
    """A micro-batch on a rank.

    Attributes:
        batch: Its sequences.
        length: Tokens of each that the rank has (its part, with context parallelism).
        context: Tokens that each of them may attend to.
        dtype: The dtype of the activations.
        tp: Tensor ranks.
        sequence_parallel: Whether what all of them would hold is split over the tokens.
        product_dtype: The narrower dtype in which the layers' products compute; None for `dtype`.
    """

    batch: int
    length: int
    context: int
    dtype: str
    tp: int = 1
    sequence_parallel: bool = False
    product_dtype: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.batch * self.length

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def whole(self) -> float:
        """The share of what no product splits that this rank holds."""
        return 1 / self.tp if self.sequence_parallel else 1.0


def layer_bytes(layer: Layer, model: ModelCost, shape: Shape, kernels: Kernels, recompute: Recompute) -> float:
    """Bytes that a layer keeps of a micro-batch."""
    if recompute == "full":
        return shape.tokens * model.hidden * shape.item * shape.whole
    is_selective = recompute == "selective" and kernels.recomputes_attention
    key = "elements", id(layer), shape.item, shape.tp == 1, shape.whole, kernels.name, is_selective
    found: tuple[Layer, tuple[float, float, float]] | None = model.cache.get(key)
    if found is None:
        one = _without_attention(layer, model) if is_selective else layer
        found = model.cache[key] = layer, _elements(one, shape, kernels)  # the layer, so that its id stays its own
    split, whole, flat = found[1]
    kept = shape.tokens * (split + whole * shape.whole) * shape.item + shape.tokens * flat
    if layer.attention is not None and recompute == "none" and kernels.stores_scores:
        kept += score_bytes(layer.attention, shape, kernels)
    return kept


def _without_attention(layer: Layer, model: ModelCost) -> Layer:
    """What a layer keeps if its attention is computed again."""
    products = tuple(p for p in layer.products if not is_in_attention(p) or p.source.endswith(f".{model.hidden}"))
    return replace(layer, products=products, attention=None, head_norms=0)


def score_bytes(attention: Attention, shape: Shape, kernels: Kernels) -> float:
    """Bytes of a layer's stored scores: their softmax, and with dropout its mask and what is left."""
    scores = shape.batch * attention.heads * shape.length * context_of(attention, shape)
    return scores * (2 * shape.item + 1 if kernels.dropout else shape.item)


def context_of(attention: Attention, shape: Shape) -> int:
    """Tokens that a token attends to at most."""
    return min(shape.context, attention.window) if attention.window else shape.context


def _elements(layer: Layer, shape: Shape, kernels: Kernels) -> tuple[float, float, float]:
    """Of a token: elements that products split, elements that they do not, and bytes of masks and statistics."""
    split = whole = flat = 0.0
    seen: set[str] = set()
    for product in layer.products:
        if product.source in seen:
            continue
        seen.add(product.source)
        rows = product.chosen * product.share if product.is_routed else 1
        if product.style == "row" or (product.style_in == "row" and shape.tp == 1):
            split += product.inputs * rows
        else:
            whole += product.inputs * rows
    for product in layer.products:
        if product.is_routed and product.style_in == "row" and kernels.keeps_views:
            # The outputs that are weighted, and what the router chose.
            whole += product.outputs * product.chosen
            flat += 4 * product.experts + 40 * product.chosen + 4
    attention = layer.attention
    if attention is not None:
        queries, keys = attention.heads * attention.key_width, attention.kv_heads * attention.key_width
        values = attention.kv_heads * attention.value_width
        split += queries + keys + values
        if kernels.keeps_views and attention.has_rotary:
            split += (
                queries + keys
            ) * attention.is_fused + attention.heads * attention.value_width * attention.is_partial
        if not kernels.stores_scores:
            flat += 4 * attention.heads
        if layer.head_norms:
            more, statistics = _norm_elements(layer.is_rms, shape, kernels)
            split += more * layer.head_norms
            flat += statistics * (attention.heads + attention.kv_heads)
    for mlp in layer.mlps:
        plain = (4.0 if mlp.activation in EAGER_GELU else 0.0 if mlp.activation == "relu" else 1.0) if kernels.eager_gelu else (
            kernels.plain_saved)  # fmt: skip
        split += mlp.inner * mlp.rows * (kernels.gated_saved if mlp.is_gated else plain)
    more, statistics = _norm_elements(layer.is_rms, shape, kernels)
    whole += more * sum(layer.norms) - (sum(layer.norms[1:]) if layer.is_parallel else 0)
    flat += statistics * len(layer.norms)
    if kernels.dropout:
        flat += shape.whole * sum(layer.norms[:2])
    return split, whole, flat


EAGER_GELU = ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu", "gelu_accurate")
"""Activations that transformers computes in several operations."""


def _norm_elements(is_rms: bool, shape: Shape, kernels: Kernels) -> tuple[float, float]:
    """For each element of a norm's input the elements that it keeps; and bytes of its statistics of a token."""
    if not kernels.eager_norms:
        return 1.0, 0.0
    return (1 + 4 / shape.item, 4.0) if is_rms else (1.0, 2.0 * shape.item)


def head_bytes(model: ModelCost, columns: int, shape: Shape, kernels: Kernels, norm: int, *, is_rms: bool) -> float:
    """Bytes that the head and the loss keep of a micro-batch; `columns` are this rank's logits of a token."""
    saved, _ = _norm_elements(is_rms, shape, kernels)
    whole = shape.tokens * shape.whole * (saved * norm + model.hidden) * shape.item
    logits = columns * (kernels.logit_bytes + (shape.item if kernels.keeps_logits else 0))
    return whole + shape.tokens * logits


def embedding_bytes(model: ModelCost, shape: Shape, kernels: Kernels) -> float:
    """Bytes that the embedding keeps of a micro-batch: the mask of its dropout, and the ids."""
    mask = model.hidden * shape.whole if kernels.dropout else 0.0
    return shape.tokens * (mask + 8)


def micro_batch(batch: int, dp: int, microbatches: int) -> int:
    """Sequences of a replica's largest micro-batch."""
    return math.ceil(math.ceil(batch / dp) / microbatches)
