"""Giving a split model on the meta device its tensors, one at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.core.resolve import TensorPlan
from partita.errors import ModelError
from partita.torch.apply import parameter_homes, tie
from partita.torch.groups import ParallelGroups
from partita.torch.hub import quiet

Fill = Callable[[str, TensorPlan, int, Tensor], None]
"""Given a tensor's name, its cut, the tensor rank and an empty local tensor: fill it."""


def materialize(model: nn.Module, plan: Plan, groups: ParallelGroups, fill: Fill, device: torch.device) -> None:
    """Give a split model on the meta device its weights: each local tensor is made and filled, one at a time."""
    rank = groups.mp.rank
    homes = parameter_homes(model)
    for name, (module, attribute) in homes.items():
        tensor: Tensor = getattr(module, attribute)
        spec = plan.spec.tensors[name]
        if tensor.device.type != "meta" or (spec.tied_to is not None and spec.tied_to in homes):
            continue
        local = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        # A tied tensor whose twin is on another stage begins as the twin does.
        fill(spec.tied_to or name, plan.tensor(name), rank, local)
        local._is_hf_initialized = True  # type: ignore[attr-defined]
        if attribute in module._parameters:
            parameter = nn.Parameter(local, requires_grad=tensor.requires_grad)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[attribute] = parameter
        else:
            module._buffers[attribute] = local
    tie(homes, plan)
    _make_unsaved_buffers(model, device)


def _make_unsaved_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute what is not saved with a model (rotary frequencies), as transformers does after loading."""
    left = set()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.empty_like(buffer, device=device)
                left.add(path)
            elif buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
    if not left:
        return
    if not hasattr(model, "initialize_weights"):
        raise ModelError(
            f"{min(left)} has buffers on the meta device that are not saved, so nobody knows their values."
        )
    for path, module in model.named_modules():
        module._is_hf_initialized = path not in left
    with quiet(), torch.no_grad():
        model.initialize_weights()  # type: ignore[operator]
