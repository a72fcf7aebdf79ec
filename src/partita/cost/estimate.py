"""`estimate`: the memory and time of an arrangement, which `plan`, the planner, `schedule` and the documents share."""

from __future__ import annotations

import math

from partita.core.mesh import Mesh
from partita.core.model.spec import DTYPE_BYTES
from partita.cost.degrees import degrees_of
from partita.cost.facts import Part
from partita.cost.hardware import Hardware
from partita.cost.memory import memory, optimizer_bytes, weight_dtype
from partita.cost.model import ModelCost
from partita.cost.time import least_flops_s, model_flops, prefill_s, step
from partita.cost.work import Arrangement, Estimate, Work

RESERVE = 0.05
"""The share of a device's memory that is left free: allocators cannot use all of it."""


def estimate(
    model: ModelCost, work: Work, arrangement: Arrangement, hardware: Hardware, *, simulated: bool = False
) -> Estimate:
    """What an arrangement costs.

    Args:
        model: The model.
        work: What is done with it.
        arrangement: How.
        hardware: Where.
        simulated: Whether the schedule is simulated, which takes longer; else its time is in closed form.

    Raises:
        PlanError: The model cannot be arranged so, or the hardware has too few devices.
    """
    ranks = arrangement.mesh.size
    hardware = hardware.for_ranks(ranks)
    uses = memory(model, work, arrangement, hardware.kernels)
    found = step(model, work, arrangement, hardware, simulated=simulated)
    dtype = weight_dtype(model, work)
    peak = (
        hardware.devices[0].peak(dtype) * ranks
        if len(hardware.devices) == 1
        else sum(device.peak(dtype) for device in hardware.devices)
    )
    if work.purpose == "train":
        tokens = work.batch_size * work.sequence_length
        prefill = 0.0
    else:
        tokens = work.sequences
        prefill = prefill_s(model, work, arrangement, hardware)
    limit = tuple(limit_of(hardware, rank) for rank in range(ranks)) if len(hardware.devices) > 1 else (
        limit_of(hardware, 0),) * ranks  # fmt: skip
    return Estimate(
        arrangement=arrangement,
        step_s=found.step_s,
        prefill_s=prefill,
        tokens_per_s=tokens / found.step_s if found.step_s else math.inf,
        mfu=model_flops(model, work) / found.step_s / peak if found.step_s else 0.0,
        bubble=max(0.0, found.bubble),
        parts_s=found.parts_s,
        memory=uses,
        limit=limit,
    )


def limit_of(hardware: Hardware, rank: int) -> int:
    """The bytes that a rank may use."""
    device = hardware.device(rank)
    return max(1, int((device.memory_bytes - device.reserved_bytes) * (1 - RESERVE)))


def lower_bound(model: ModelCost, work: Work, mesh: Mesh, hardware: Hardware) -> tuple[float, int]:
    """Seconds and bytes of the largest rank that no arrangement on a mesh falls short of, for pruning a search.

    The seconds are those of all operations, evenly distributed and at the best efficiency of the devices, without a bubble and
    without communication. The bytes are those of weights and optimizer, evenly distributed, with all of ZeRO.
    """
    degrees = degrees_of(mesh)
    ranks = mesh.size
    devices = hardware.for_ranks(ranks).devices
    dtype = weight_dtype(model, work)
    speed = sum(1 / least_flops_s(device, dtype, 1.0) for device in devices) * (ranks if len(devices) == 1 else 1)
    spec = model.spec
    item = DTYPE_BYTES[dtype]
    parts = degrees.pp * degrees.tp * (degrees.ep if model.num_experts else 1)
    weights = spec.parameter_bytes if work.dtype in (None, spec.dtype) else spec.parameters * item
    if work.purpose != "train":
        bandwidth = sum(device.memory_bandwidth for device in devices) * (ranks if len(devices) == 1 else 1)
        most = max(max(value for _, value in device.memory_efficiency) for device in devices)
        read = weights if not model.num_experts else weights * model.chosen_experts / model.num_experts / 2
        return max(model_flops(model, work) / speed, read / (bandwidth * max(1.0, most))), weights // (
            degrees.pp * degrees.tp
        )
    trained = spec.parameters if not work.lora_rank else 0
    held = Part(parameters=trained, matrices=trained if work.optimizer == "muon" else 0)
    state = optimizer_bytes(work, held, trained, item) // degrees.replicas if trained else 0
    return model_flops(model, work) / speed, (weights // degrees.replicas + state) // parts
