"""Time: the seconds of a training step, of a prompt and of a decoded token, by what they are for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from partita.core.layout.placement import Placement, home_of, stage_at
from partita.core.model.spec import DTYPE_BYTES
from partita.cost import makespan as pipelines
from partita.cost.activations import Shape
from partita.cost.collectives import least_seconds, seconds
from partita.cost.degrees import Degrees, Groups, degrees_of
from partita.cost.facts import Part
from partita.cost.flops import flops_per_token
from partita.cost.hardware import Device, Group, Hardware, value_at
from partita.cost.kernels import Kernels, kernels_of
from partita.cost.layers import Seconds, Setting, layer_s, move_s, product_s
from partita.cost.memory import held_by, optimizer_bytes, training_shape, weight_dtype
from partita.cost.model import ModelCost
from partita.cost.stages import StageCost, stages_of
from partita.cost.work import Arrangement, Work


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step, or of a decoded token of every sequence.

    Attributes:
        step_s: All of it.
        bubble: The share of it in which an average rank waits for others in the pipeline.
        parts_s: The seconds of the slowest rank: compute, tp, pp, dp, optimizer, bubble, other.
        stages: Seconds of a micro-batch on each stage, in the order of the pipeline.
        comm_s: Seconds of a transfer between stages.
    """

    step_s: float
    bubble: float
    parts_s: dict[str, float] = field(default_factory=dict)
    stages: tuple[Seconds, ...] = ()
    comm_s: float = 0.0


def step(
    model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware, *, simulated: bool = False
) -> StepTime:
    """The seconds of a training step, or of a decoded token.

    Args:
        model: The model.
        work: What is done.
        arrangement: How.
        hardware: Where; its devices for as many ranks as the mesh has.
        simulated: Whether the schedule is simulated instead of estimated in closed form.
    """
    if work.purpose == "train":
        return _train(model, work, arrangement, hardware, simulated)
    return _decode(model, work, arrangement, hardware)


def _train(model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware, simulated: bool) -> StepTime:
    degrees = degrees_of(arrangement.mesh)
    groups = degrees.groups(hardware)
    kernels = kernels_of(hardware.kernels)
    shape = training_shape(work, arrangement, degrees, weight_dtype(model, work))
    homes = _homes(arrangement.placement, degrees.pp, arrangement.vpp)
    mine = stages_of(model, arrangement)
    stages = [
        slowest_of(
            hardware,
            degrees,
            pp,
            partial(seconds_of_stage, model, mine[pp][place], shape, work, arrangement, hardware, degrees),
        )
        for pp, place in homes
    ]
    comm = _transfer(model, shape, hardware, groups)
    run = pipelines.exact if simulated else pipelines.makespan
    f, b, w = ([getattr(one, name) for one in stages] for name in ("f", "b", "w"))
    blocked = comm + kernels.send_s if kernels.sends_block and degrees.pp > 1 else 0.0
    if blocked:
        f = [one + blocked * (index + 1 < len(f)) for index, one in enumerate(f)]
        b = [one + blocked * (index > 0) for index, one in enumerate(b)]
    pipeline = run(
        arrangement.schedule, degrees.pp, arrangement.microbatches, arrangement.vpp, f, b, w, 0.0 if blocked else comm
    )
    unlike = {stage: pp for pp, stage in enumerate(mine)}
    ends = [end_of_step(model, work, arrangement, hardware, degrees, groups, pp, stages) for pp in unlike.values()]
    dp, optimizer = max(ends, key=sum)
    busy = [
        arrangement.microbatches * sum(stages[i].total for i in _of_rank(arrangement, pp)) for pp in range(degrees.pp)
    ]
    slowest = max(range(degrees.pp), key=busy.__getitem__)
    own = [stages[i] for i in _of_rank(arrangement, slowest)]
    tp = arrangement.microbatches * sum(one.tp_f + one.tp_b for one in own)
    other = max(device.step_s for device in hardware.devices)
    total = pipeline + dp + optimizer + other
    hops = arrangement.microbatches * 2 * len(own) * blocked
    parts = {
        "compute": busy[slowest] - tp, "tp": tp, "pp": hops, "dp": dp, "optimizer": optimizer,
        "bubble": max(0.0, pipeline - busy[slowest] - hops), "other": other,
    }  # fmt: skip
    return StepTime(total, 1 - sum(busy) / len(busy) / total if total else 0.0, parts, tuple(stages), comm)


def _of_rank(arrangement: Arrangement, pp: int) -> tuple[int, ...]:
    """The stages of a pipeline rank."""
    return tuple(stage_at(arrangement.placement, arrangement.mesh.pp, pp, place) for place in range(arrangement.vpp))


@lru_cache(maxsize=1024)
def _homes(placement: Placement, pp: int, vpp: int) -> tuple[tuple[int, int], ...]:
    return tuple(home_of(placement, pp, stage) for stage in range(pp * vpp))


def slowest_of(hardware: Hardware, degrees: Degrees, pp: int, of: Callable[[Device], Seconds]) -> Seconds:
    """The seconds of the slowest device of a pipeline rank: its tensor ranks and replicas wait for each other."""
    if hardware.is_uniform:
        return of(hardware.devices[0])
    inner = degrees.tp * degrees.cp
    devices = {
        id(device): device
        for dp in range(degrees.dp)
        for rank in range(inner)
        if (device := hardware.device((dp * degrees.pp + pp) * inner + rank))
    }
    return max((of(device) for device in devices.values()), key=lambda one: one.total)


def seconds_of_stage(
    model: ModelCost, stage: StageCost, shape: Shape, work: Work, arrangement: Arrangement, hardware: Hardware,
    degrees: Degrees, device: Device,
) -> Seconds:  # fmt: skip
    """Seconds of a micro-batch on a stage."""
    sliced = model.sliced(*degrees.split)
    key = (
        "stage",
        stage,
        shape,
        work.lora_rank,
        arrangement.recompute,
        arrangement.zero >= 3,
        device,
        hardware,
        degrees,
    )
    found: Seconds | None = model.cache.get(key)
    if found is None:
        both = [
            _stage_of_rank(model, stage, shape, work, arrangement, hardware, device, degrees, tp)
            for tp in sliced.distinct
        ]
        found = model.cache[key] = max(both, key=lambda one: one.total)
    return found


def _stage_of_rank(
    model: ModelCost, stage: StageCost, shape: Shape, work: Work, arrangement: Arrangement, hardware: Hardware,
    device: Device, degrees: Degrees, tp: int,
) -> Seconds:  # fmt: skip
    sliced = model.sliced(*degrees.split)
    groups = degrees.groups(hardware)
    setting = Setting(
        device,
        hardware,
        kernels_of(hardware.kernels),
        groups.tp,
        groups.cp,
        groups.ep,
        arrangement.recompute,
        not work.lora_rank,
    )
    total = Seconds(device.microbatch_s / 3, device.microbatch_s * 2 / 3)
    kinds = [*stage.kinds, *((len(model.first) + k, 1) for k in range(stage.mtp))]
    for kind, count in kinds:
        layer = sliced.layers[tp][kind]
        gathering = groups.dp if arrangement.zero >= 3 else None
        key = ("layer", kind, tp, shape, setting, degrees.split, gathering)
        one: Seconds | None = model.cache.get(key)
        if one is None:
            one = layer_s(layer, model, shape, setting)
            if arrangement.zero >= 3 and degrees.replicas > 1:
                one = _gathered(one, layer.held.bits / 8, hardware, groups)
            model.cache[key] = one
        total += one.times(count)
    if stage.embedding:
        total += _embedding(model, shape, setting)
    if stage.loss or stage.mtp:
        total += _head(model, shape, setting, degrees, tp).times((1 if stage.loss else 0) + stage.mtp)
    return total


def _gathered(one: Seconds, weight_bytes: float, hardware: Hardware, groups: Groups) -> Seconds:
    """A layer whose weights are gathered over the replicas beside its products, and whose gradients are scattered."""
    gather = seconds(hardware, groups.dp, "all_gather", weight_bytes)
    scatter = seconds(hardware, groups.dp, "reduce_scatter", weight_bytes)
    link = hardware.link_inside() if groups.dp.is_inside else hardware.link_between()
    f = max(one.f + link.occupies * gather, gather)
    back = one.b + one.w
    slower = max(back + link.occupies * (gather + scatter), gather + scatter) - back
    return replace(one, f=f, b=one.b + slower)


def _embedding(model: ModelCost, shape: Shape, setting: Setting) -> Seconds:
    rows = move_s(setting.device, 2.0 * shape.tokens * model.hidden * shape.item)
    message = shape.tokens * model.hidden * shape.item
    tp = seconds(setting.hardware, setting.tp, "reduce_scatter" if shape.sequence_parallel else "all_reduce", message)
    return Seconds(rows + tp, 0.0, 2 * rows, tp, 0.0)


def _head(model: ModelCost, shape: Shape, setting: Setting, degrees: Degrees, tp: int) -> Seconds:
    head = model.sliced(*degrees.split).ends[tp].head
    if head is None:
        return Seconds()
    product = product_s(setting.device, shape.dtype, shape.tokens, head)
    forward_s, backward_s = (
        move_s(setting.device, moved * shape.tokens * head.outputs) / setting.device.others_share
        for moved in setting.kernels.logit_moved
    )
    message = shape.tokens * model.hidden * shape.item
    gather = seconds(setting.hardware, setting.tp, "all_gather", message) if shape.sequence_parallel else 0.0
    back = seconds(setting.hardware, setting.tp, "reduce_scatter" if shape.sequence_parallel else "all_reduce", message)
    weights = product if setting.trains_weights else 0.0
    return Seconds(product + forward_s + gather, product + backward_s + back, weights, gather, back)


def _transfer(model: ModelCost, shape: Shape, hardware: Hardware, groups: Groups) -> float:
    """Seconds of a hidden state on its way to the next stage."""
    if groups.pp.size == 1:
        return 0.0
    message = shape.tokens * model.hidden * shape.item
    link = replace(groups.pp, size=2, per_node=2 if groups.pp.is_inside else 1)
    if shape.sequence_parallel:
        return seconds(hardware, link, "send", message / shape.tp)
    if kernels_of(hardware.kernels).splits_messages and shape.tp > 1:
        gather = seconds(hardware, groups.tp, "all_gather", message)
        return seconds(hardware, link, "send", message / shape.tp) + gather
    return seconds(hardware, link, "send", message)


def end_of_step(
    model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware, degrees: Degrees, groups: Groups,
    pp: int, stages: list[Seconds],
) -> tuple[float, float]:  # fmt: skip
    """Seconds in which a pipeline rank sums its gradients over replicas, and updates its weights."""
    held = held_by(model, stages_of(model, arrangement)[pp], degrees, model.sliced(*degrees.split).distinct[0])
    trained = held.lora * work.lora_rank if work.lora_rank else held.parameters
    item = DTYPE_BYTES[weight_dtype(model, work)]
    gradient = DTYPE_BYTES[work.gradient_dtype] if work.gradient_dtype else max(4, item)
    dp = 0.0
    if degrees.replicas > 1 and arrangement.zero < 3:
        dense = trained - (0 if work.lora_rank else held.experts)
        experts = _expert_replicas(degrees, groups)
        summed = gathered = 0.0
        for elements, group in ((dense, groups.dp), (trained - dense, experts)):
            summed += seconds(
                hardware, group, "reduce_scatter" if arrangement.zero else "all_reduce", elements * gradient
            )
            if arrangement.zero:
                gathered += seconds(hardware, group, "all_gather", elements * item)
        dp = summed + gathered
        if arrangement.overlap_gradients:
            # Gradients are complete, and weights needed, while the last and the first micro-batches pass; virtual stages work
            # on groups of pp micro-batches, so that one is complete long before the next. The embedding is the first that is
            # needed and the last that is complete: nothing runs beside it.
            own = [stages[i] for i in _of_rank(arrangement, pp)]
            count = min(arrangement.microbatches, degrees.pp if arrangement.vpp > 1 else 1)
            backward, forward = (count * sum(one) for one in zip(*((s.b + s.w, s.f) for s in own), strict=True))
            alone = _embedding_share(model, stages_of(model, arrangement)[pp], degrees, work, trained)
            dp = max(summed * alone, summed - backward) + max(gathered * alone, gathered - forward)
            dp += hardware.link_between().occupies * (summed + gathered)
    moved = _moved_by_update(work, arrangement, hardware, held, trained, item)
    device = _updating(hardware)
    layers = sum(stage.layers for stage in stages_of(model, arrangement)[pp])
    loops = device.update_layer_s * layers
    return dp, (move_s(device, moved) / device.optimizer_share + loops) if trained else 0.0


def _embedding_share(
    model: ModelCost, stages: tuple[StageCost, ...], degrees: Degrees, work: Work, trained: int
) -> float:
    """The embedding's share of the parameters that a pipeline rank trains."""
    if work.lora_rank or not trained or not any(stage.embedding for stage in stages):
        return 0.0
    sliced = model.sliced(*degrees.split)
    return min(1.0, sliced.ends[sliced.distinct[0]].embedding.parameters / trained)


def least_end_of_step_s(model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware) -> float:
    """Seconds in which the slowest rank at least sums its gradients and updates its weights, whatever layers it has.

    One rank holds no less than their mean, and each byte of it takes as long as at the best efficiency, without latency.
    """
    degrees = degrees_of(arrangement.mesh)
    kinds = Counter(model.kinds)
    every = StageCost(tuple(sorted(kinds.items())), model.mtp, embedding=True, loss=True)
    held = held_by(model, (every,), degrees, model.sliced(*degrees.split).distinct[0])
    trained = held.lora * work.lora_rank if work.lora_rank else held.parameters
    item = DTYPE_BYTES[weight_dtype(model, work)]
    gradient = DTYPE_BYTES[work.gradient_dtype] if work.gradient_dtype else max(4, item)
    dp = 0.0
    if degrees.replicas > 1 and arrangement.zero < 3:
        groups = degrees.groups(hardware)
        apart = 0 if work.lora_rank else held.experts
        for elements, group in ((trained - apart, groups.dp), (apart, _expert_replicas(degrees, groups))):
            name = "reduce_scatter" if arrangement.zero else "all_reduce"
            dp += least_seconds(hardware, group, name, elements * gradient)
            if arrangement.zero:
                dp += least_seconds(hardware, group, "all_gather", elements * item)
        if arrangement.overlap_gradients:
            dp *= hardware.link_between().occupies
    device = _updating(hardware)
    most = device.memory_bandwidth * max(share for _, share in device.memory_efficiency) * device.optimizer_share
    return (dp + _moved_by_update(work, arrangement, hardware, held, trained, item) / most) / degrees.pp


def _expert_replicas(degrees: Degrees, groups: Groups) -> Group:
    """The ranks that hold the same experts."""
    return replace(groups.dp, size=degrees.expert_replicas, per_node=min(groups.dp.per_node, degrees.expert_replicas))


def _moved_by_update(
    work: Work, arrangement: Arrangement, hardware: Hardware, held: Part, trained: int, item: int
) -> float:
    """Bytes that the optimizer's step moves on a rank."""
    gradient = DTYPE_BYTES[work.gradient_dtype] if work.gradient_dtype else max(4, item)
    shards = degrees_of(arrangement.mesh).replicas if arrangement.zero >= 1 else 1
    passes = kernels_of(hardware.kernels).optimizer_passes
    return (2 * optimizer_bytes(work, held, trained, item) + trained * (item + passes * gradient)) / shards


def _updating(hardware: Hardware) -> Device:
    """The device that updates its weights last."""
    return hardware.devices[0] if hardware.is_uniform else min(hardware.devices, key=lambda d: d.memory_bandwidth)


# --- generating ---------------------------------------------------------------------------------------------------------


def _decode(model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware) -> StepTime:
    """A token of every sequence: groups of sequences pass the stages one behind the other."""
    degrees = degrees_of(arrangement.mesh)
    each = math.ceil(math.ceil(work.sequences / degrees.dp) / arrangement.microbatches)
    past = max(1, (work.sequence_length + work.context) // 2 // degrees.cp)
    return _passes(model, work, arrangement, hardware, Shape(
        each, 1, past, weight_dtype(model, work), degrees.tp), past)  # fmt: skip


def prefill_s(model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware) -> float:
    """Seconds until the prompts of all sequences are read."""
    degrees = degrees_of(arrangement.mesh)
    each = math.ceil(math.ceil(work.sequences / degrees.dp) / arrangement.microbatches)
    length = math.ceil(work.sequence_length / degrees.cp)
    shape = Shape(each, length, work.sequence_length, weight_dtype(model, work), degrees.tp)
    return _passes(model, work, arrangement, hardware, shape, 0).step_s


def _passes(
    model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware, shape: Shape, past: int
) -> StepTime:
    degrees = degrees_of(arrangement.mesh)
    groups = degrees.groups(hardware)
    mine = stages_of(model, arrangement)
    stages = [
        slowest_of(
            hardware, degrees, pp, partial(seconds_of_forward, model, mine[pp][place], shape, hardware, degrees, past)
        )
        for pp, place in _homes(arrangement.placement, degrees.pp, arrangement.vpp)
    ]
    comm = _transfer(model, shape, hardware, groups)
    by_rank = [sum(stages[i].f for i in _of_rank(arrangement, pp)) for pp in range(degrees.pp)]
    other = max(device.token_s if past else device.step_s for device in hardware.devices)
    hops = comm * len(stages) if degrees.pp > 1 else 0.0
    through = sum(one.f for one in stages) + hops
    groups_of = arrangement.microbatches
    total = max(through, groups_of * max(by_rank)) + other if past else through + (groups_of - 1) * max(by_rank) + other
    slowest = max(range(degrees.pp), key=by_rank.__getitem__)
    tp = groups_of * sum(stages[i].tp_f for i in _of_rank(arrangement, slowest))
    busy = groups_of * by_rank[slowest]
    parts = {
        "compute": busy - tp, "tp": tp, "pp": hops, "dp": 0.0, "optimizer": 0.0,
        "bubble": max(0.0, total - busy - hops - other), "other": other,
    }  # fmt: skip
    share = 1 - groups_of * sum(by_rank) / len(by_rank) / total if total else 0.0
    return StepTime(total, share, parts, tuple(stages), comm)


def seconds_of_forward(
    model: ModelCost, stage: StageCost, shape: Shape, hardware: Hardware, degrees: Degrees, past: int, device: Device
) -> Seconds:
    """Seconds of a stage's forward: of a prompt, or with `past` tokens in the cache of one token of each sequence."""
    key = ("forward", stage, shape, hardware, device, degrees, past)
    found: Seconds | None = model.cache.get(key)
    if found is None:
        sliced = model.sliced(*degrees.split)
        ranks = [_forward_of_rank(model, stage, shape, hardware, device, degrees, past, tp) for tp in sliced.distinct]
        found = model.cache[key] = max(ranks, key=lambda one: one.f)
    return found


def _forward_of_rank(
    model: ModelCost, stage: StageCost, shape: Shape, hardware: Hardware, device: Device, degrees: Degrees, past: int,
    tp: int,
) -> Seconds:  # fmt: skip
    sliced = model.sliced(*degrees.split)
    kernels: Kernels = kernels_of(hardware.kernels)
    groups = degrees.groups(hardware)
    setting = Setting(device, hardware, kernels, groups.tp, groups.cp, groups.ep)
    total = Seconds(0.0 if past else device.microbatch_s)
    for kind, count in stage.kinds:
        total += layer_s(sliced.layers[tp][kind], model, shape, setting, past).times(count)
    if stage.embedding:
        total += _embedding(model, shape, setting)
    head = sliced.ends[tp].head
    if stage.loss and head is not None:
        logits = product_s(device, shape.dtype, shape.batch, head) + move_s(device, 8.0 * shape.batch * head.outputs)
        total += Seconds(logits)
    return total


def model_flops(model: ModelCost, work: Work) -> float:
    """Operations of a model's training step, or of a decoded token of every sequence."""
    if work.purpose == "train":
        key = ("flops", work.sequence_length, work.lora_rank > 0)
        if key not in model.cache:
            model.cache[key] = flops_per_token(model.spec, work.sequence_length, is_frozen=work.lora_rank > 0)
        return float(model.cache[key]) * work.batch_size * work.sequence_length
    key = ("flops", 0, False)
    if key not in model.cache:
        model.cache[key] = flops_per_token(model.spec, 0)
    return float(model.cache[key]) / 3 * work.sequences


def least_flops_s(device: Device, dtype: str, operations: float) -> float:
    """Seconds of operations at the best efficiency of a device."""
    best = max(value for _, value in device.product_efficiency)
    return operations / (device.peak(dtype) * best * value_at(device.narrow_efficiency, 1e9))
