"""What this rank knows of a step besides its numbers: what is not finite, its peak of memory, and a trace of its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from partita.checkpoint.durable import failing_as
from partita.ranks.memory import peak_resident_bytes
from partita.torch.collectives.groups import ParallelGroups
from partita.training.finite import Fault
from partita.training.flops import peak_flops


@dataclass
class LocalStep:
    """The losses and gradients of this rank's replica in a step, before replicas are summed.

    Attributes:
        model: The model.
        groups: This rank's groups.
        losses: The loss of each micro-batch, on the rank with the loss.
        norms: The largest element of each gradient by its name, if there are several replicas.
    """

    model: nn.Module
    groups: ParallelGroups
    losses: dict[int, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] | None = None

    def before_sum(self) -> None:
        """Keep the largest elements of the gradients, which replicas are about to sum."""
        if self.groups.replicas.size > 1:
            self.norms = self._norms()

    def fault(self) -> Fault:
        """What is not finite."""
        norms = self._norms() if self.norms is None else self.norms
        names = [name for name, norm in norms.items() if not norm.isfinite()]
        bad = tuple(number for number, loss in sorted(self.losses.items()) if not loss.isfinite())
        return Fault(self.groups.rank, self.groups.dp.rank, bad, names[-1] if names else None)

    def _norms(self) -> dict[str, Tensor]:
        # The largest element, since a sum of squares may overflow where every element is finite.
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        if not grads:
            return {}
        return dict(zip(grads, torch._foreach_norm(list(grads.values()), float("inf")), strict=True))


def peak_bytes(device: torch.device) -> int:
    """The peak of this rank's memory: what torch allocated on a GPU, else the memory of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def device_peak_flops(device: torch.device) -> float | None:
    """The peak of a CUDA device in bfloat16; None if it is unknown."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@contextmanager
def traced(file: Path) -> Iterator[None]:
    """Write a trace of torch's profiler of what runs in the context."""
    with failing_as(file, "cannot be written"):
        file.parent.mkdir(parents=True, exist_ok=True)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        yield
    with failing_as(file, "cannot be written"):
        profiler.export_chrome_trace(str(file))
