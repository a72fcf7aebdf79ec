"""Memory: the bytes of every rank at its peak, by what they are for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from partita.core.model.spec import DTYPE_BYTES
from partita.core.optimizers import check_optimizer
from partita.cost.activations import Shape, embedding_bytes, head_bytes, layer_bytes, micro_batch
from partita.cost.alive import Counts, alive
from partita.cost.degrees import Degrees, degrees_of
from partita.cost.facts import Layer, Part, bytes_of_bits
from partita.cost.kernels import Kernels, kernels_of
from partita.cost.model import ModelCost
from partita.cost.stages import StageCost, stages_of
from partita.cost.work import Arrangement, MemoryUse, Work


def memory(model: ModelCost, work: Work, arrangement: Arrangement, kernels: str = "torch") -> tuple[MemoryUse, ...]:
    """The bytes of every global rank.

    Args:
        model: The model.
        work: What is done with it.
        arrangement: How.
        kernels: What computes its layers; that of a hardware file is `hardware.kernels`.

    Raises:
        PlanError: The model cannot be arranged so.
    """
    check_optimizer(work.optimizer)
    degrees = degrees_of(arrangement.mesh)
    key = ("memory", work, arrangement.microbatches, arrangement.zero, arrangement.recompute, arrangement.sequence_parallel,
           degrees, kernels)  # fmt: skip
    known: dict[object, tuple[MemoryUse, ...]] = model.cache.setdefault(key, {})
    stages = stages_of(model, arrangement)
    counts: tuple[tuple[Counts, ...], ...] = ((),) * degrees.pp
    if work.purpose == "train":
        counts = alive(arrangement.schedule, degrees.pp, arrangement.microbatches, arrangement.vpp)
    replica: list[MemoryUse] = []
    for place in zip(stages, counts, strict=True):
        if place not in known:
            sliced = model.sliced(*degrees.split)
            uses = {
                tp: memory_of(model, work, arrangement, degrees, kernels_of(kernels), *place, tp)
                for tp in sliced.distinct
            }
            known[place] = tuple(uses[tp] for tp in sliced.same_as)
        replica += known[place] * degrees.cp
    return tuple(replica) * degrees.dp


def memory_of(
    model: ModelCost, work: Work, arrangement: Arrangement, degrees: Degrees, kernels: Kernels,
    stages: tuple[StageCost, ...], counts: tuple[Counts, ...], tp: int,
) -> MemoryUse:  # fmt: skip
    """The bytes of tensor rank `tp` with these stages, of which `counts` micro-batches are alive."""
    if work.purpose != "train":
        weights = weight_bytes(model, work, held_by(model, stages, degrees, tp))
        cache, buffers = _generating(model, work, arrangement, degrees, kernels, stages, tp)
        return MemoryUse(weights=weights, cache=cache, buffers=buffers)
    held = held_bytes(model, work, arrangement, degrees, stages, tp)
    return at_peak(held, moments(model, work, arrangement, degrees, kernels, stages, counts, tp))


def held_bytes(
    model: ModelCost, work: Work, arrangement: Arrangement, degrees: Degrees, stages: tuple[StageCost, ...], tp: int
) -> MemoryUse:
    """Training: the bytes of weights, gradients and the optimizer's state on a rank with these stages."""
    held = held_by(model, stages, degrees, tp)
    weights = weight_bytes(model, work, held)
    trained = _trained(model, work, held)
    item = DTYPE_BYTES[weight_dtype(model, work)]
    gradient = DTYPE_BYTES[work.gradient_dtype] if work.gradient_dtype else item
    dense, experts = degrees.replicas, degrees.expert_replicas
    apart = held.experts / held.parameters if held.parameters and not work.lora_rank else 0.0

    def sharded(size: float, stage: int) -> int:
        """Bytes of a rank's shard, if ZeRO distributes them from `stage` on."""
        return math.ceil(size if arrangement.zero < stage else size * ((1 - apart) / dense + apart / experts))

    return MemoryUse(
        weights=sharded(weights, 3) + (item * trained if work.lora_rank else 0),
        gradients=sharded(trained * gradient, 2),
        optimizer=sharded(optimizer_bytes(work, held, trained, item), 1),
    )


def at_peak(held: MemoryUse, moments: tuple[Moment, ...]) -> MemoryUse:
    """What is held throughout, and what is besides at the moment with the most."""
    peak = _peak(held, moments)
    return MemoryUse(
        weights=held.weights,
        gradients=held.gradients if peak.has_gradients else 0,
        optimizer=held.optimizer,
        activations=math.ceil(peak.activations),
        buffers=math.ceil(peak.buffers),
    )


def total_at_peak(held: MemoryUse, moments: tuple[Moment, ...]) -> int:
    """The bytes of `at_peak` together."""
    peak = _peak(held, moments)
    kept = math.ceil(peak.activations) + math.ceil(peak.buffers)
    return held.weights + held.optimizer + (held.gradients if peak.has_gradients else 0) + kept


def _peak(held: MemoryUse, moments: tuple[Moment, ...]) -> Moment:
    """The moment with the most bytes."""
    if len(moments) == 1:
        return moments[0]
    return max(moments, key=lambda one: one.activations + one.buffers + one.has_gradients * held.gradients)


def weight_dtype(model: ModelCost, work: Work) -> str:
    """The dtype of weights and products."""
    return work.dtype or model.spec.dtype


def held_by(model: ModelCost, stages: tuple[StageCost, ...], degrees: Degrees, rank: int) -> Part:
    """What tensor rank `rank` holds of the stages of a pipeline rank."""
    key = "held", stages, degrees.split, rank
    found: Part | None = model.cache.get(key)
    if found is None:
        found = model.cache[key] = _held_by(model, stages, degrees, rank)
    return found


def _held_by(model: ModelCost, stages: tuple[StageCost, ...], degrees: Degrees, rank: int) -> Part:
    sliced = model.sliced(*degrees.split)
    layers, ends = sliced.layers[rank], sliced.ends[rank]
    held = Part()
    for stage in stages:
        for kind, count in stage.kinds:
            held += layers[kind].held.times(count)
        for k in range(stage.mtp):
            held += layers[len(model.first) + k].held
    first, last = any(s.embedding for s in stages), any(s.loss for s in stages)
    mtp = any(s.mtp for s in stages)
    if first and last:
        return held + ends.both
    if first:
        return held + ends.embedding
    if last:
        return held + (ends.mtp_and_loss if mtp else ends.loss)
    return held + ends.mtp if mtp else held


def weight_bytes(model: ModelCost, work: Work, held: Part) -> int:
    """Bytes of the weights that a rank holds; quantized ones are packed unless `work` names a dtype."""
    if work.dtype is None or work.dtype == model.spec.dtype:
        return bytes_of_bits(held.bits)
    return bytes_of_bits(held.unpacked_bits * DTYPE_BYTES[work.dtype] / model.spec.dtype_bytes)


def _trained(model: ModelCost, work: Work, held: Part) -> int:
    return held.lora * work.lora_rank if work.lora_rank else held.parameters


def optimizer_bytes(work: Work, held: Part, trained: int, item: int) -> int:
    """Bytes of moments and master copies of all trained parameters that a rank holds."""
    master = work.master_dtype == "float32" and item < 4
    state = 4 if master else item
    matrices = held.matrices if work.optimizer == "muon" and not work.lora_rank else 0
    moments = {"sgd": trained, "muon": 2 * trained - matrices}.get(work.optimizer, 2 * trained)
    return moments * state + (4 * trained if master else 0)


# --- activations ------------------------------------------------------------------------------------------------------


def training_shape(work: Work, arrangement: Arrangement, degrees: Degrees, dtype: str) -> Shape:
    """A micro-batch of training on a rank."""
    return Shape(
        micro_batch(work.batch_size, degrees.dp, arrangement.microbatches),
        math.ceil(work.sequence_length / degrees.cp),
        work.sequence_length,
        dtype,
        degrees.tp,
        arrangement.sequence_parallel and degrees.tp > 1,
        work.product_dtype,
    )


def stage_activations(
    model: ModelCost, stage: StageCost, shape: Shape, kernels: Kernels, arrangement: Arrangement, tp: int
) -> float:
    """Bytes that a stage keeps of a micro-batch, the loss not counted: no schedule keeps more than one of those alive."""
    layers = model.sliced(*degrees_of(arrangement.mesh).split).layers[tp]
    kept = embedding_bytes(model, shape, kernels) if stage.embedding else 0.0
    for kind, count in stage.kinds:
        kept += count * layer_bytes(layers[kind], model, shape, kernels, arrangement.recompute)
    for k in range(stage.mtp):
        kept += layer_bytes(layers[len(model.first) + k], model, shape, kernels, arrangement.recompute)
    return kept


@dataclass(frozen=True)
class Moment:
    """A moment of a step at which memory may be largest: bytes of activations and buffers, and whether gradients exist."""

    activations: float
    buffers: float
    has_gradients: bool = True


def moments(
    model: ModelCost, work: Work, arrangement: Arrangement, degrees: Degrees, kernels: Kernels,
    stages: tuple[StageCost, ...], counts: tuple[Counts, ...], tp: int,
) -> tuple[Moment, ...]:  # fmt: skip
    """The moments of a step at which memory may be largest."""
    shape = training_shape(work, arrangement, degrees, weight_dtype(model, work))
    key = (
        "training", shape, arrangement.recompute, distribution(work, arrangement, degrees, kernels), degrees.pp > 1,
        degrees.split, kernels.name, stages, counts, tp, _accumulates(arrangement, stages, counts),
    )  # fmt: skip
    found: tuple[Moment, ...] | None = model.cache.get(key)
    if found is None:
        found = model.cache[key] = _moments(model, work, shape, arrangement, degrees, kernels, stages, counts, tp)
    return found


def distribution(work: Work, arrangement: Arrangement, degrees: Degrees, kernels: Kernels) -> tuple[object, ...]:
    """What `moments` need to know of replicas and of what is distributed over them."""
    if not kernels.frees_gradients or arrangement.zero == 0 or degrees.replicas == 1:
        return arrangement.zero >= 3, degrees.replicas > 1
    gradients = work.gradient_dtype, work.lora_rank, degrees.expert_replicas, arrangement.microbatches > 1
    return arrangement.zero, degrees.replicas, *(gradients if arrangement.zero > 1 else ())


def _accumulates(arrangement: Arrangement, stages: tuple[StageCost, ...], counts: tuple[Counts, ...]) -> bool:
    """Whether a rank has gradients of earlier micro-batches when its activations are the most."""
    return arrangement.microbatches * len(stages) > max(sum(one) for one in counts)


def _moments(
    model: ModelCost, work: Work, shape: Shape, arrangement: Arrangement, degrees: Degrees, kernels: Kernels,
    stages: tuple[StageCost, ...], counts: tuple[Counts, ...], tp: int,
) -> tuple[Moment, ...]:  # fmt: skip
    sizes = [stage_activations(model, stage, shape, kernels, arrangement, tp) for stage in stages]
    activations = max(sum(n * size for n, size in zip(one, sizes, strict=True)) for one in counts)
    sliced = model.sliced(*degrees.split)
    message = shape.tokens * model.hidden * shape.item * shape.whole
    buffers = 2 * message if degrees.pp > 1 else 0.0
    head = sliced.ends[tp].head
    columns = head.outputs if head is not None else 0
    layers = [sliced.layers[tp][kind] for stage in stages for kind, _ in stage.kinds]
    loss = kept = layer = buckets = gathered = loose = 0.0
    if any(stage.loss for stage in stages):
        kept = head_bytes(model, columns, shape, kernels, sliced.ends[tp].norm, is_rms=sliced.ends[tp].is_rms)
        beside = shape.item + kernels.logit_bytes
        if kernels.frees_gradients:  # three copies in float32: logits, less their maximum, and their exponentials
            beside = 2 * kernels.logit_bytes - shape.item
        loss = shape.tokens * columns * beside
    if layers:
        layer = max(_inside_layer(one, model, shape, kernels, arrangement) for one in layers)
        if arrangement.zero >= 3:
            buffers += 2 * max(one.held.bits for one in layers) / 8
    if degrees.replicas > 1:
        # One buffer in float32, to which that of a narrower dtype is cast.
        copies = 4 + (shape.item if shape.item < 4 else 0) if kernels.frees_gradients else 2 * 4
        elements = min(BUCKET_BYTES / shape.item, held_by(model, stages, degrees, tp).parameters)
        buckets = copies * elements
        if arrangement.zero == 3:
            # What is outside of the layers (two large tensors at most) is complete when its gradients are distributed, and gloo
            # has a copy of the sums.
            outside = _outside(model, stages, degrees, tp).parameters
            largest = max((one.held.parameters for one in layers), default=0)
            exchanged = max(min(BUCKET_BYTES / shape.item, max(outside, largest)), outside / 2)
            buckets = outside * shape.item + exchanged * (
                4 + 4 / degrees.replicas + (4 if kernels.frees_gradients else 0)
            )
            gathered = exchanged * shape.item * (2 + 1 / degrees.replicas)
            loose = outside * shape.item
            if work.lora_rank:
                gathered += held_by(model, stages, degrees, tp).parameters * shape.item
        elif arrangement.zero:
            # The shards of a bucket, what all replicas have of it, and the copy from which gloo returns it.
            gathered = elements * shape.item * (2 + 1 / degrees.replicas)
    if not kernels.frees_gradients:
        return (Moment(activations + kept, buffers + max(loss, layer) + buckets),)
    waiting = _undistributed(model, work, arrangement, degrees, stages, tp)
    accumulates = _accumulates(arrangement, stages, counts)
    return (
        Moment(
            activations + kept,
            buffers + loose + loss + (waiting if accumulates and arrangement.microbatches > 1 else 0.0),
            has_gradients=accumulates,
        ),
        # The last layer of a backward, when all gradients exist: other micro-batches' activations, and this layer's.
        Moment(max(0.0, activations - sum(sizes)), buffers + loose + layer + waiting),
        Moment(0.0, buckets + waiting),
        # Weights are gathered when they are updated (ZeRO 1 and 2), or when a layer needs them and when they are saved (3); the
        # frozen ones of adapters are complete beside their shards when the training ends (3).
        # Gradients that ZeRO 2 distributed are gone by then.
        Moment(0.0, gathered, has_gradients=arrangement.zero == 1),
    )


def _outside(model: ModelCost, stages: tuple[StageCost, ...], degrees: Degrees, tp: int) -> Part:
    """What a rank holds outside of the layers."""
    return _held_by(model, tuple(replace(one, kinds=(), mtp=0) for one in stages), degrees, tp)


def _undistributed(
    model: ModelCost, work: Work, arrangement: Arrangement, degrees: Degrees, stages: tuple[StageCost, ...], tp: int
) -> float:
    """Bytes by which gradients exceed their shards when a backward ends, with ZeRO 2 and 3.

    ZeRO 2 distributes those of a layer after its last backward of a step, so that those of earlier micro-batches are complete;
    what belongs to no layer is distributed after all layers.
    """
    if arrangement.zero < 2 or degrees.replicas == 1 or work.lora_rank:
        return 0.0
    item = DTYPE_BYTES[work.gradient_dtype] if work.gradient_dtype else DTYPE_BYTES[weight_dtype(model, work)]
    held = held_by(model, stages, degrees, tp)
    dense, experts = held.parameters - held.experts, held.experts
    if arrangement.zero == 3 or arrangement.microbatches == 1:
        layers = [model.sliced(*degrees.split).layers[tp][kind].held for stage in stages for kind, _ in stage.kinds]
        outside = _outside(model, stages, degrees, tp)
        largest = max(layers, key=lambda one: one.parameters, default=Part())
        dense, experts = outside.parameters - outside.experts, largest.experts
        dense += largest.parameters - largest.experts
    return item * (dense * (1 - 1 / degrees.replicas) + experts * (1 - 1 / degrees.expert_replicas))


BUCKET_BYTES = 25 << 20
"""Bytes of gradients that replicas exchange at once."""


def _inside_layer(layer: Layer, model: ModelCost, shape: Shape, kernels: Kernels, arrangement: Arrangement) -> float:
    """Bytes that are alive within a layer's backward: all that it keeps if it is computed again, and gradients."""
    inside = shape.tokens * model.hidden * shape.item * 2.0
    if layer.mlps:
        inside += (
            shape.tokens * shape.item * max(mlp.inner * mlp.rows * (3 if mlp.is_gated else 1) for mlp in layer.mlps)
        )
    if arrangement.recompute != "none":
        everything = layer_bytes(layer, model, shape, kernels, "none")
        inside += everything - layer_bytes(layer, model, shape, kernels, arrangement.recompute)
    return inside


# --- generating ---------------------------------------------------------------------------------------------------------


def cache_bytes(
    model: ModelCost, work: Work, arrangement: Arrangement, degrees: Degrees, kernels: Kernels,
    stages: tuple[StageCost, ...], tp: int, context: int | None = None,
) -> int:  # fmt: skip
    """Bytes of the cache of a rank for all sequences of its replica, each of `context` tokens, of which cp ranks have parts."""
    sequences = math.ceil(work.sequences / degrees.dp)
    length = work.context if context is None else context
    item = DTYPE_BYTES[weight_dtype(model, work)]
    layers = model.sliced(*degrees.split).layers[tp]
    total = 0
    for stage in stages:
        for kind, count in stage.kinds:
            attention = layers[kind].attention
            if attention is not None:
                # The last tokens of a prompt, which a window sees, may all be on one rank.
                tokens = min(math.ceil(length / degrees.cp), attention.window or length)
                total += count * tokens * attention.cached(latent=kernels.caches_latent) * item
    return total * sequences


def _generating(
    model: ModelCost, work: Work, arrangement: Arrangement, degrees: Degrees, kernels: Kernels,
    stages: tuple[StageCost, ...], tp: int,
) -> tuple[int, int]:  # fmt: skip
    """Bytes of the cache, and of what a prompt's forward keeps alive."""
    sequences = math.ceil(math.ceil(work.sequences / degrees.dp) / arrangement.microbatches)
    length = math.ceil(work.sequence_length / degrees.cp)
    shape = Shape(sequences, length, work.sequence_length, weight_dtype(model, work), degrees.tp)
    sliced = model.sliced(*degrees.split)
    cache = cache_bytes(model, work, arrangement, degrees, kernels, stages, tp)
    inside = 0.0
    for stage in stages:
        for kind, _ in stage.kinds:
            layer = sliced.layers[tp][kind]
            widest = max((p.outputs * (p.chosen if p.is_routed else 1) for p in layer.products), default=0)
            # A gated activation, what it multiplies and the result; the residual stream and what a norm makes of it.
            gated = max((3 * mlp.inner * mlp.rows for mlp in layer.mlps if mlp.is_gated), default=0.0)
            inside = max(inside, shape.tokens * shape.item * (4.0 * model.hidden + max(gated, 2 * widest)))
    head = sliced.ends[tp].head
    if any(stage.loss for stage in stages) and head is not None:
        inside = max(inside, shape.batch * head.outputs * (shape.item + 4.0))
    message = shape.tokens * model.hidden * shape.item if degrees.pp > 1 else 0
    return cache, math.ceil(inside + 2 * message)
