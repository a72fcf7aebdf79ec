"""Creating the tensors of a split model on the meta device, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.core.sharding.cuts import TensorPlan
from partita.errors import ModelError
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.parts import parameter_homes, tie
from partita.torch.training.shards import Slot
from partita.torch.transformers_internals import can_initialize, initialize, mark_initialized

Fill = Callable[[str, TensorPlan, int, Tensor], None]
"""Takes a tensor's name, its `TensorPlan`, the part that this rank holds and an empty local tensor, and fills it."""

Quantized = Callable[[str, TensorPlan, int, Tensor], Tensor | None]
"""Takes the same, with the tensor on the meta device, and returns the local tensor still quantized, or None if it is plain."""


@dataclass(frozen=True)
class Filled:
    """The weights that a model was filled with, to detect later changes.

    Attributes:
        tensors: Each local tensor by its unsplit name, and its version when it was filled.
        shards: This replica's shards of the parameters, by their `id`, if it keeps no more of them. The parameters have their
            shapes, but no memory.
    """

    tensors: Mapping[str, tuple[Tensor, int]]
    shards: Mapping[int, Slot] = field(default_factory=dict)

    def check(self, model: nn.Module) -> nn.Module:
        """Return `model` if every tensor in it still holds what it was filled with.

        Raises:
            ModelError: Some code replaced a tensor or wrote to it.
        """
        homes = parameter_homes(model)
        for name, (tensor, version) in self.tensors.items():
            if name not in homes or getattr(*homes[name]) is not tensor or tensor._version != version:
                raise ModelError(
                    f"{name} was changed after its weights were read, so the model differs from the checkpoint. This is an "
                    "error in Partita or in the model's code: please report it with the model's config."
                )
        return model


def materialize(
    model: nn.Module,
    plan: Plan,
    groups: ParallelGroups,
    fill: Fill,
    device: torch.device,
    quantized: Quantized | None = None,
    *,
    zero: int = 0,
) -> Filled:
    """Give a split model on the meta device its weights: each local tensor is created and filled, one at a time.

    Its unsaved buffers must be computed before it is split (`make_unsaved_buffers`). What `quantized` returns stays quantized.
    With `zero` 3 and several replicas all but this one's shard of a parameter is released before the next one is created.
    """
    homes = parameter_homes(model)
    is_sharded = zero == 3 and groups.replicas.size > 1
    filled: dict[str, tuple[Tensor, int]] = {}
    shards: dict[int, Slot] = {}
    for name, (module, attribute) in homes.items():
        tensor: Tensor = getattr(module, attribute)
        spec = plan.spec.tensors[name]
        if spec.tied_to is not None and spec.tied_to in homes:
            continue
        assert tensor.device.type == "meta", name
        # A tied tensor whose twin is on another stage is initialized like the twin.
        given = spec.tied_to or name, plan.tensor(name), groups.part(plan.tensor(name))
        packed = quantized(*given, tensor) if quantized is not None else None
        local = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if packed is None else packed.to(device)
        if packed is None:
            fill(*given, local)
        if attribute in module._parameters:
            local = nn.Parameter(local, requires_grad=tensor.requires_grad and packed is None)
            module._parameters[attribute] = local
            if is_sharded and packed is None:
                slot = Slot.of(name, local, groups.copies(plan.tensor(name)))
                slot.detach(is_only=True)
                slot.open()
                shards[id(local)] = slot
        else:
            module._buffers[attribute] = local
        mark_initialized(local)
        filled[name] = local, local._version
    tie(homes, plan)
    for path, module in model.named_modules():
        for attribute in module._non_persistent_buffers_set:
            buffer = module._buffers.get(attribute)
            assert buffer is None or buffer.device.type != "meta", f"{path}.{attribute}"
            module._buffers[attribute] = None if buffer is None else buffer.to(device)
    return Filled(filled, shards)


def make_unsaved_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the unsaved buffers of an unsplit model (rotary frequencies) while its parameters have no memory yet.

    Only the model's own initialization computes these values. It initializes whole modules, parameters included, and reaches
    into other modules, so it runs before any weight is read and before any module is replaced.

    Raises:
        ModelError: The model has such a buffer, and no initialization that computes it.
    """
    left: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.empty_like(buffer, device=device)
                left[f"{path}.{name}"] = module, name, module._buffers[name]
            elif buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
    if not left:
        return
    if not can_initialize(model):
        raise ModelError(f"{min(left)} is an unsaved buffer on the meta device, so its values are unknown.")
    initialize(model)
    for path, (module, name, empty) in left.items():
        if module._buffers[name] is empty and empty._version == 0:
            raise ModelError(
                f"{path} is an unsaved buffer, and {type(model).__name__}'s initialization does not compute it, so "
                "its values are unknown."
            )
    for module in model.modules():
        mark_initialized(module)
