"""The seconds of a layer: a roofline for each operation, and the collectives between its tensor ranks.

product      max(2 m k n / (peak x efficiency), bytes / (bandwidth x efficiency)) + start
attention    2 products of the scores, [length, width] x [width, context] and back; fused, or each with its bytes
others       bytes / (bandwidth x efficiency) + start
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from partita.core.model.spec import DTYPE_BYTES
from partita.cost.activations import Shape, context_of
from partita.cost.collectives import seconds
from partita.cost.facts import Attention, Layer, Product, is_in_attention
from partita.cost.hardware import Device, Group, Hardware, value_at
from partita.cost.kernels import Kernels
from partita.cost.model import ModelCost
from partita.cost.work import Recompute


@dataclass(frozen=True)
class Seconds:
    """Seconds of a layer or a stage for one micro-batch.

    Attributes:
        f: Its forward.
        b: Its input gradient, with what is computed again.
        w: Its weight gradient.
        tp_f: Of `f`, what passes in collectives between tensor ranks.
        tp_b: The same of `b`.
    """

    f: float = 0.0
    b: float = 0.0
    w: float = 0.0
    tp_f: float = 0.0
    tp_b: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.f + other.f, self.b + other.b, self.w + other.w, self.tp_f + other.tp_f, self.tp_b + other.tp_b
        )

    def times(self, count: float) -> Seconds:
        """`count` of them."""
        return Seconds(self.f * count, self.b * count, self.w * count, self.tp_f * count, self.tp_b * count)

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.f + self.b + self.w


FEW_ROWS = 8
"""Rows up to which reading the weights limits a product."""


def product_s(device: Device, dtype: str, rows: float, product: Product) -> float:
    """Seconds of a product whose inputs have `rows` rows."""
    item = DTYPE_BYTES[dtype]
    count, inputs, outputs = product.experts, product.inputs, product.outputs
    if not rows or not inputs or not outputs:
        return 0.0
    visited = 1.0
    if product.is_routed:
        rows = rows * product.chosen * product.share
        own = product.chosen * product.share
        chance, tokens = (own / count, rows / own) if own <= count else (1 / count, rows)
        visited = 1 - (1 - chance) ** max(1.0, tokens)
    each = rows / (count * visited)
    operations = 2.0 * rows * inputs * outputs
    bits = 8 * item if product.bits is None else product.bits
    moved = inputs * outputs * count * visited * bits / 8 + rows * (inputs + outputs) * item
    one = operations / (count * visited)
    share = value_at(device.product_efficiency, one) * value_at(device.narrow_efficiency, min(each, inputs, outputs))
    computing = operations / (device.peak(dtype) * share)
    few = device.vector_efficiency if device.vector_efficiency and each <= FEW_ROWS else device.memory_efficiency
    moving = moved / (device.memory_bandwidth * value_at(few, moved))
    unpacking = 0.0
    if product.bits is not None and device.unpack_flops:
        unpacking = inputs * outputs * count * visited / device.unpack_flops
    return max(computing, moving) + unpacking + device.operation_s


def move_s(device: Device, moved: float, operations: int = 1) -> float:
    """Seconds of operations that move bytes and compute little."""
    if moved <= 0:
        return 0.0
    return (
        moved / (device.memory_bandwidth * value_at(device.memory_efficiency, moved)) + operations * device.operation_s
    )


def attention_s(attention: Attention, device: Device, kernels: Kernels, shape: Shape, past: int = 0) -> float:
    """Seconds of the attention core, forward; with `past` tokens in the cache for a token that is decoded."""
    context = context_of(attention, shape) if not past else min(past, attention.window or past)
    share = kernels.causal_share if attention.is_causal and not past else 1.0
    if attention.window and attention.window < shape.context and not past:
        share = 1.0
    pairs = shape.batch * attention.heads * shape.length * context * share
    widths = attention.key_width + attention.value_width
    operations = 2.0 * pairs * widths
    speed = device.peak(shape.dtype) * kernels.attention_speed * value_at(device.attention_efficiency, operations)
    if past:
        cached = shape.batch * context * attention.cached(latent=kernels.caches_latent) * shape.item
        computing = operations / speed
        return max(computing, move_s(device, cached, 0)) + 2 * device.operation_s
    if not kernels.stores_scores:
        computing = operations / speed
        read = shape.tokens * (attention.heads + attention.kv_heads) * widths * shape.item
        return max(computing, move_s(device, read, 0)) + device.operation_s
    scores = pairs * shape.item
    one = 2.0 * shape.length * context * attention.key_width
    narrow = min(shape.length, attention.key_width, context)
    efficiency = value_at(device.product_efficiency, one * shape.batch * attention.heads) * value_at(
        device.narrow_efficiency, narrow
    )
    moved = scores + shape.tokens * attention.heads * attention.key_width * 2 * shape.item
    product = max(
        operations / 2 / (device.peak(shape.dtype) * efficiency), move_s(device, moved, 0)
    ) + device.operation_s  # fmt: skip
    return 2 * product + move_s(device, kernels.score_passes * scores, 2)


ALONE = Group(1, 1)


@dataclass(frozen=True)
class Setting:
    """What a layer runs in: the device, kernels, groups of tensor, context and expert ranks, and what is computed again."""

    device: Device
    hardware: Hardware
    kernels: Kernels
    tp: Group
    cp: Group = ALONE
    ep: Group = ALONE
    recompute: Recompute = "none"
    trains_weights: bool = True


def layer_s(layer: Layer, model: ModelCost, shape: Shape, setting: Setting, past: int = 0) -> Seconds:
    """Seconds of a layer for a micro-batch; with `past` for one decoded token of each sequence."""
    device, kernels = setting.device, setting.kernels
    dtype = shape.product_dtype or shape.dtype
    products = math.fsum(product_s(device, dtype, shape.tokens, product) for product in layer.products)
    casts_f, casts_b = _casts(layer, shape, device)
    core: float = attention_s(layer.attention, device, kernels, shape, past) if layer.attention is not None else 0.0
    others = _others(layer, model, shape, setting)
    again = products + casts_f + core + others / device.others_share
    backward = (
        products
        + casts_b
        + core * kernels.attention_backward
        + others * kernels.backward / device.others_backward_share
    )
    fixed = device.decode_layer_s if past else device.layer_s
    if device.is_asynchronous:
        forward, backward = max(again, fixed), max(backward, device.layer_backward_s)
    else:
        forward, backward = again + fixed, backward + device.layer_backward_s
    weights = _weight_gradients(products, layer, device, kernels) if setting.trains_weights else 0.0
    tp_f, tp_b, hidden = _tensor_ranks(layer, model, shape, setting)
    if kernels.hides_tensor:
        tp_f, tp_b = (_beside(one, products, setting) for one in (tp_f, tp_b))
    cp_f, cp_b = _context_ranks(layer, shape, setting, core)
    sent_f, sent_b = _expert_ranks(layer, model, shape, setting, forward, backward + weights)
    tp_f, tp_b = tp_f + cp_f + sent_f, tp_b + cp_b + sent_b
    beside = weights if kernels.overlaps_tensor else 0.0
    exposed = _beside(hidden, beside, setting)
    if setting.recompute == "full":
        skipped, reduced = _not_again(layer, model, shape, setting)
        backward += forward - skipped
        tp_b += tp_f - reduced
    elif setting.recompute == "selective":
        backward += core
        if kernels.recomputes_attention:
            inside = (p for p in layer.products if is_in_attention(p))
            backward += math.fsum(product_s(device, dtype, shape.tokens, product) for product in inside)
    return Seconds(forward + tp_f, backward + tp_b + exposed, weights, tp_f, tp_b + exposed)


def _not_again(layer: Layer, model: ModelCost, shape: Shape, setting: Setting) -> tuple[float, float]:
    """Seconds of what is left out when a layer is computed again: its last product, and the all-reduce behind it.

    The outputs of experts are kept, since they are weighted.
    """
    rows = [p for p in layer.products if p.style_in == "row" and not is_in_attention(p)]
    if not setting.kernels.stops_early or not rows or any(p.is_routed for p in layer.products):
        return 0.0, 0.0
    skipped = product_s(setting.device, shape.product_dtype or shape.dtype, shape.tokens, rows[-1])
    if rows[-1].style != "row":
        return skipped, 0.0
    name = "reduce_scatter" if shape.sequence_parallel else "all_reduce"
    return skipped, seconds(setting.hardware, setting.tp, name, shape.tokens * model.hidden * shape.item)


def _beside(collective: float, computing: float, setting: Setting) -> float:
    """Seconds that a collective of tensor ranks adds to the computing beside which it runs."""
    if not collective:
        return 0.0
    return max(0.0, collective - computing) + collective * setting.hardware.link_inside().occupies


def _casts(layer: Layer, shape: Shape, device: Device) -> tuple[float, float]:
    """Seconds in which what products read is cast to their dtype, as it is and transposed: forward, backward."""
    if shape.product_dtype is None:
        return 0.0, 0.0
    moved = shape.item + 2 * DTYPE_BYTES[shape.product_dtype]
    rows = {p.name: shape.tokens * (p.chosen * p.share if p.is_routed else 1) for p in layer.products}
    read = {p.source: rows[p.name] * p.inputs for p in layer.products}
    forward = math.fsum(move_s(device, moved * size) for size in read.values())
    return forward, math.fsum(move_s(device, moved * rows[p.name] * p.outputs) for p in layer.products)


def _weight_gradients(products: float, layer: Layer, device: Device, kernels: Kernels) -> float:
    """Seconds of a micro-batch's weight gradients, which are added to those before."""
    elements = sum(product.inputs * product.outputs * product.experts for product in layer.products)
    adding = move_s(device, kernels.accumulated_bytes * elements, 0)
    return max(products, adding) if kernels.fuses_accumulation else products + adding


def _others(layer: Layer, model: ModelCost, shape: Shape, setting: Setting) -> float:
    """Seconds of norms, activations, positions and the residual stream, forward."""
    kernels, device, item = setting.kernels, setting.device, shape.item
    tokens = shape.tokens
    total = 0.0
    for width in layer.norms:
        total += move_s(device, kernels.norm_passes * tokens * width * shape.whole * item)
    total += 2 * move_s(device, kernels.residual_passes * tokens * model.hidden * shape.whole * item)
    if layer.head_norms:
        total += move_s(device, kernels.norm_passes * tokens * layer.head_norms * item, 2)
    for mlp in layer.mlps:
        widths = (3 if mlp.is_gated else 2) * mlp.inner * mlp.rows
        total += move_s(device, kernels.activation_passes * tokens * widths * item)
    attention = layer.attention
    if attention is not None and attention.has_rotary:
        rotated = (attention.heads + attention.kv_heads) * attention.key_width
        total += move_s(device, kernels.rotary_passes * tokens * rotated * item, 2)
    return total


def _tensor_ranks(layer: Layer, model: ModelCost, shape: Shape, setting: Setting) -> tuple[float, float, float]:
    """Seconds of collectives between tensor ranks: of the forward, of the backward, and of the backward beside weights."""
    if setting.tp.size == 1:
        return 0.0, 0.0, 0.0
    message = shape.tokens * model.hidden * shape.item

    def of(name: str, size: float = message) -> float:
        return seconds(setting.hardware, setting.tp, name, size)

    gathered = of("all_gather", shape.tokens * layer.gathers * shape.item) if layer.gathers else 0.0
    if shape.sequence_parallel:
        forward = layer.entries * of("all_gather") + layer.reduces * of("reduce_scatter")
        backward = layer.reduces * of("all_gather")
        again = layer.entries * of("all_gather") if setting.kernels.gathers_again else 0.0
        return forward + gathered, backward + gathered, again + layer.entries * of("reduce_scatter")
    return layer.reduces * of("all_reduce") + gathered, gathered, layer.entries * of("all_reduce")


def _context_ranks(layer: Layer, shape: Shape, setting: Setting, core: float) -> tuple[float, float]:
    """Seconds in which keys and values pass between the ranks that share sequences, beyond those of the attention."""
    if setting.cp.size == 1 or layer.attention is None:
        return 0.0, 0.0
    attention = layer.attention
    widths = attention.kv_heads * (attention.key_width + attention.value_width)
    message = shape.tokens * setting.cp.size * widths * shape.item
    gather = seconds(setting.hardware, setting.cp, "all_gather", message)
    scatter = seconds(setting.hardware, setting.cp, "reduce_scatter", message)
    later = core * setting.kernels.attention_backward
    return max(0.0, gather - core), max(0.0, gather + scatter - later)


def _expert_ranks(
    layer: Layer, model: ModelCost, shape: Shape, setting: Setting, forward: float, backward: float
) -> tuple[float, float]:
    """Seconds in which tokens are sent to the ranks with their experts, and back, beyond those of a forward and a backward."""
    if setting.ep.size == 1 or not layer.dispatched:
        return 0.0, 0.0
    kernels, ep = setting.kernels, setting.ep
    elements, item = layer.dispatched, shape.item
    if kernels.sends_once and not ep.is_inside:
        machines = int(model.config.get("topk_group") or math.ceil(ep.size / ep.per_node))
        elements = min(elements, machines * model.hidden)
        item = DTYPE_BYTES[shape.product_dtype] if shape.product_dtype else item
    tokens = shape.tokens * shape.whole
    there, back = (seconds(setting.hardware, ep, "all_to_all", tokens * elements * each) for each in (item, shape.item))
    sent = there + back
    if not kernels.expert_processors:
        return sent, sent
    lost = sent * kernels.expert_processors
    return lost + max(0.0, sent - forward), lost + max(0.0, sent - backward)
