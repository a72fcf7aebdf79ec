"""LoRA on split layers: our own, and peft's added afterwards.

An adapter wraps the inner layer, so it is split with it. In a column layer `lora_B [out_r, rank]` is split like the
weight and `lora_A [rank, in]` is replicated; in a row layer `lora_A [rank, in_r]` is split and `lora_B [out, rank]`
is replicated; in a vocabulary `lora_embedding_A [rank, vocab_r]` is split and `lora_embedding_B [dim, rank]` is replicated.
Replicated parts must start equal; each rank computes a part of their gradient, and the parts are summed.
Source: LoRA (Hu et al. 2021, 2106.09685).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.layers.grads import sum_gradient, sum_shared_gradient
from partita.torch.layers.inner import base_layer, empty_linear


class LoraLinear(nn.Module):
    """`y = base(x) + alpha / rank * x @ lora_A.T @ lora_B.T` with the base frozen; names follow peft."""

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        inputs: Split | None = None,
        tp_rank: int = 0,
    ) -> None:
        """Add an adapter of `rank` to a linear layer. `alpha` defaults to `rank`, so that the scale is 1.

        `lora_A` is sampled (Kaiming uniform, as in peft) and `lora_B` is zero: at first nothing changes.

        Args:
            base_layer: The layer; it is frozen.
            rank: Rows of `lora_A`.
            alpha: The scale is `alpha / rank`.
            inputs: For a row layer's part, the split of the inputs: `lora_A` is then this rank's part of an unsplit one that
                every rank samples.
            tp_rank: The tensor rank of this part.
        """
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise ModelError(f"the rank of LoRA must be an integer of at least 1; got {rank!r}.")
        if alpha is not None and not math.isfinite(alpha):
            raise ModelError(f"the alpha of LoRA must be a finite number; got {alpha!r}.")
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        out_features, in_features = weight.shape[::-1] if hasattr(base_layer, "nf") else weight.shape
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = empty_linear(in_features, rank, bias=False, device=weight.device, dtype=weight.dtype)
        self.lora_B = empty_linear(rank, out_features, bias=False, device=weight.device, dtype=weight.dtype)
        self.scaling = (alpha if alpha is not None else rank) / rank
        self.inputs = inputs
        whole = inputs if inputs is not None else Split.even(in_features, 1)
        with torch.no_grad():
            self.lora_A.weight.copy_(_part(_draw(self.lora_A.weight, whole), whole, tp_rank))
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        y: Tensor = self.base_layer(x)
        update: Tensor = self.lora_B(self.lora_A(x))
        return y + update * self.scaling


@torch.no_grad()
def adopt(linear: Any, comm: Communicator, split: Split, style: Literal["column", "row", "vocab"]) -> None:
    """Fit an adapter on an inner layer to its split: replicated parts start equal and have their gradients summed.

    A new `lora_A` of a row layer is sampled again, as peft samples that of the unsplit layer. Does nothing for an adapter that
    is fitted already. Every rank must call it.

    Raises:
        ModelError: It is unknown whether parts of the adapter are split, or the ranks' parts do not match.
    """
    base = base_layer(linear)
    if comm.size == 1 or base is linear:
        return
    own = {id(parameter) for parameter in base.parameters()}
    added = [
        (name, p)
        for name, p in linear.named_parameters()
        if id(p) not in own and not getattr(p, "_partita_adopted", False)
    ]
    if not added:
        return
    kinds = {name: _kind(name) for name, _ in added}
    strange = [name for name, kind in kinds.items() if kind is None]
    if strange:
        raise ModelError(
            f"{type(linear).__name__} has {strange[0]!r}, which cannot be split. Use a plain LoRA adapter "
            "(no DoRA, no lora_bias), or add it to the unsplit model, merge it, and split that."
        )
    if any(p.is_meta for _, p in added):
        raise ModelError("an adapter on the meta device has no values yet. Add it after the model is loaded.")
    zero = all(bool((p == 0).all()) for name, p in added if kinds[name] in _ZERO_AT_FIRST)
    fresh = all(comm.all_gather_object(zero))
    for name, parameter in added:
        if kinds[name] == _WHOLE[style]:
            _make_equal(name, parameter, comm, fresh)
            sum_gradient(parameter, comm)
        elif style == "row" and fresh and getattr(linear, "inputs", None) is None:
            whole = _draw(parameter, split)
            parameter.copy_(_part(comm.broadcast_(whole), split, comm.rank))
        elif style == "column" and not split.is_partition:
            _check_copies(name, parameter, comm, split)
            sum_shared_gradient(parameter, comm, 0, split)
        parameter._partita_adopted = True
    if getattr(linear, "inputs", None) is None:
        _draw_alike(comm, added[0][1].device)


_WHOLE = {"column": "lora_A", "row": "lora_B", "vocab": "lora_embedding_B"}
_ZERO_AT_FIRST = ("lora_B", "lora_embedding_A")


def _kind(name: str) -> str | None:
    parts = name.split(".")
    if parts[-1] == "bias":
        return None
    return next((part for part in parts if part in (*_WHOLE.values(), *_ZERO_AT_FIRST)), None)


def _make_equal(name: str, parameter: Tensor, comm: Communicator, fresh: bool) -> None:
    """Copy the values of a new adapter from the first rank; a trained adapter must be equal on all ranks already."""
    first = comm.broadcast_(parameter.detach().clone(memory_format=torch.contiguous_format))
    if fresh:
        parameter.copy_(first)
    else:
        _must_be_equal(name, first, parameter, comm)


def _check_copies(name: str, parameter: Tensor, comm: Communicator, split: Split) -> None:
    """Check that the rows of `lora_B` for heads that several ranks hold are equal on all of them."""
    whole = comm.gather_split(parameter.detach(), 0, split)
    _must_be_equal(name, torch.cat([whole[a:b] for a, b in split.ranges(comm.rank)]), parameter, comm)


def _must_be_equal(name: str, expected: Tensor, parameter: Tensor, comm: Communicator) -> None:
    if not all(comm.all_gather_object(torch.equal(expected, parameter))):
        raise ModelError(
            f"{name} must be equal on all ranks if the adapter changes the output, but it differs. "
            "Add an adapter that changes nothing at first (init_lora_weights=True), then load its weights."
        )


def _draw(part: Tensor, inputs: Split) -> Tensor:
    """Sample an unsplit `lora_A [rank, in]` as peft does; `part` will hold a part of it."""
    bound = 1.0 / math.sqrt(inputs.size)
    return torch.empty(part.shape[0], inputs.size, dtype=part.dtype, device=part.device).uniform_(-bound, bound)


def _part(whole: Tensor, inputs: Split, rank: int) -> Tensor:
    return torch.cat([whole[:, a:b] for a, b in inputs.ranges(rank)], 1)


def _draw_alike(comm: Communicator, device: torch.device) -> None:
    """Synchronize the ranks' generators after an adapter sampled parts of unequal sizes."""
    state = comm.broadcast_object(torch.get_rng_state())
    assert isinstance(state, Tensor)
    torch.set_rng_state(state)
    if device.type == "cuda":
        state = comm.broadcast_object(torch.cuda.get_rng_state(device))
        assert isinstance(state, Tensor)
        torch.cuda.set_rng_state(state, device)
