"""LoRA on split layers: ours, and peft's put on afterwards.

An adapter sits on the inner layer, so it is split with it. Of a column layer `lora_B [out_r, rank]` is split as the
weight and `lora_A [rank, in]` is whole on every rank; of a row layer `lora_A [rank, in_r]` is split and `lora_B [out, rank]`
is whole. What is whole must start equal, and each rank sees only a part of its gradient, which is summed.
Source: LoRA (Hu et al. 2021, 2106.09685).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.split import Split
from partita.errors import ModelError
from partita.torch.comm import Communicator
from partita.torch.grads import sum_gradient
from partita.torch.inner import base_layer


class LoraLinear(nn.Module):
    """`y = base(x) + alpha / rank * x @ lora_A.T @ lora_B.T` with the base frozen; names as in peft."""

    def __init__(self, base_layer: nn.Module, rank: int, alpha: float | None = None) -> None:
        """Put an adapter of `rank` on a linear layer. `alpha` is by default `rank`, so that the scale is 1.

        `lora_A` is drawn (Kaiming uniform, as peft does) and `lora_B` is zero: at first nothing changes.
        """
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise ModelError(f"the rank of LoRA must be a whole number of at least 1, but is {rank!r}.")
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        out_features, in_features = weight.shape[::-1] if hasattr(base_layer, "nf") else weight.shape
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(in_features, rank, bias=False, device=weight.device, dtype=weight.dtype)
        self.lora_B = nn.Linear(rank, out_features, bias=False, device=weight.device, dtype=weight.dtype)
        self.scaling = (alpha if alpha is not None else rank) / rank
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        y: Tensor = self.base_layer(x)
        update: Tensor = self.lora_B(self.lora_A(x))
        return y + update * self.scaling


def adopt(linear: Any, comm: Communicator, split: Split, *, column: bool) -> None:
    """Fit what was put on an inner layer to its split: what is whole starts equal and has its gradients summed.

    Raises:
        ModelError: It is an adapter whose parts cannot be told to be split or whole.
    """
    base = base_layer(linear)
    if comm.size == 1 or base is linear:
        return
    own = {id(parameter) for parameter in base.parameters()}
    added = [(name, p) for name, p in linear.named_parameters() if id(p) not in own]
    kinds = {name: _kind(name) for name, _ in added}
    strange = [name for name, kind in kinds.items() if kind is None]
    if strange:
        raise ModelError(
            f"{type(linear).__name__} brings {strange[0]!r}, which cannot be split. Use a plain LoRA adapter "
            "(no DoRA, no lora_bias), or put it on the unsplit model, merge it, and split that."
        )
    whole = "lora_A" if column else "lora_B"
    fresh = all(bool((p == 0).all()) for name, p in added if kinds[name] == "lora_B")
    for name, parameter in added:
        if getattr(parameter, "_partita_adopted", False):
            continue
        if kinds[name] == whole:
            comm.broadcast_(parameter.data)
            sum_gradient(parameter, comm)
        elif not column and fresh:
            _draw_split(parameter, comm, split)
        parameter._partita_adopted = True


def _kind(name: str) -> str | None:
    parts = name.split(".")
    if parts[-1] == "bias":
        return None
    return next((part for part in parts if part in ("lora_A", "lora_B")), None)


@torch.no_grad()
def _draw_split(parameter: nn.Parameter, comm: Communicator, split: Split) -> None:
    """Draw the split `lora_A [rank, in_r]` of a row layer as the unsplit one would be, from the first rank's generator."""
    bound = 1.0 / math.sqrt(split.size)
    whole = torch.empty(parameter.shape[0], split.size, dtype=parameter.dtype, device=parameter.device)
    comm.broadcast_(whole.uniform_(-bound, bound))
    parameter.copy_(torch.cat([whole[:, a:b] for a, b in split.ranges(comm.rank)], 1))
