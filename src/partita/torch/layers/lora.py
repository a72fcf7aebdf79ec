"""LoRA on split layers: our own, and peft's added afterwards.

An adapter wraps the inner layer, so it is split with it. In a column layer `lora_B [out_r, rank]` is split like the
weight and `lora_A [rank, in]` is replicated; in a row layer `lora_A [rank, in_r]` is split and `lora_B [out, rank]`
is replicated; in a vocabulary `lora_embedding_A [rank, vocab_r]` is split and `lora_embedding_B [dim, rank]` is replicated.
A bias of `lora_B` and DoRA's magnitudes `[out]` follow the outputs. `PART_DIMS` has all of them.
Replicated parts must start equal; each rank computes a part of their gradient, and the parts are summed.
Source: LoRA (Hu et al. 2021, 2106.09685), DoRA (Liu et al. 2024, 2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.layers.grads import sum_gradient, sum_shared_gradient
from partita.torch.layers.inner import base_layer, empty_linear

Style = Literal["column", "row", "vocab"]

_MAGNITUDE = "lora_magnitude_vector.weight"

PART_DIMS: Mapping[Style, Mapping[str, int | None]] = {
    "column": {"lora_A.weight": None, "lora_B.weight": 0, "lora_B.bias": 0, _MAGNITUDE: 0},
    "row": {"lora_A.weight": 1, "lora_B.weight": None, "lora_B.bias": None, _MAGNITUDE: None},
    "vocab": {"lora_embedding_A": 1, "lora_embedding_B": None, _MAGNITUDE: None},
}
"""The dimension along which each parameter of an adapter is split with a layer of a style; None if it is replicated."""

_ZERO_AT_FIRST = ("lora_B.weight", "lora_embedding_A")

_NAMED_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


class LoraLinear(nn.Module):
    """`y = base(x) + alpha / rank * dropout(x) @ lora_A.T @ lora_B.T` with the base frozen; names follow peft."""

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        inputs: Split | None = None,
        tp_rank: int = 0,
        dropout: float = 0.0,
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
            dropout: Probability with which training drops an input of `lora_A`.
        """
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise ModelError(f"the rank of LoRA must be an integer of at least 1; got {rank!r}.")
        if alpha is not None and not math.isfinite(alpha):
            raise ModelError(f"the alpha of LoRA must be a finite number; got {alpha!r}.")
        if not 0 <= dropout < 1:
            raise ModelError(f"the dropout of LoRA must be at least 0 and less than 1; got {dropout!r}.")
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        out_features, in_features = weight.shape[::-1] if hasattr(base_layer, "nf") else weight.shape
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = empty_linear(in_features, rank, bias=False, device=weight.device, dtype=weight.dtype)
        self.lora_B = empty_linear(rank, out_features, bias=False, device=weight.device, dtype=weight.dtype)
        self.scaling = (alpha if alpha is not None else rank) / rank
        self.inputs = inputs
        whole = inputs if inputs is not None else Split.even(in_features, 1)
        self.dropout = nn.Dropout(dropout) if inputs is None else PartDropout(dropout, inputs, tp_rank)
        with torch.no_grad():
            self.lora_A.weight.copy_(_part(_draw(self.lora_A.weight, whole), whole, tp_rank))
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        y: Tensor = self.base_layer(x)
        update: Tensor = self.lora_B(self.lora_A(self.dropout(x)))
        return y + update * self.scaling


@torch.no_grad()
def adopt(linear: Any, comm: Communicator, split: Split, style: Style, *, filled: bool = False) -> None:
    """Fit an adapter on an inner layer to its split: replicated parts start equal and have their gradients summed.

    A new `lora_A` of a row layer is sampled again, as peft samples that of the unsplit layer. Does nothing for an adapter that
    is fitted already. Every rank must call it.

    Args:
        linear: The adapter, around a part of a layer.
        comm: The ranks.
        split: The split of the layer.
        style: The style of the layer.
        filled: Whether the adapter has its part of the unsplit values already, so that none are sampled or checked.

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
    linear._partita_adopted = len(list(linear.parameters()))
    if not added:
        return
    strange = [name for name, _ in added if part_kind(name) not in PART_DIMS[style]]
    if strange:
        raise ModelError(
            f"{type(linear).__name__} has {strange[0]!r}, which cannot be split. Use LoRA or DoRA, or add the adapter to "
            "the unsplit model, merge it, and split that."
        )
    if any(p.is_meta for _, p in added):
        raise ModelError("an adapter on the meta device has no values yet. Add it after the model is loaded.")
    samples = getattr(linear, "inputs", None) is None
    if not filled:
        _agree(added, comm, split, style, samples=samples)
    for name, parameter in added:
        if part_dim(style, name) is None:
            sum_gradient(parameter, comm)
        elif style == "column":
            sum_shared_gradient(parameter, comm, 0, split)
        parameter._partita_adopted = True
    if hasattr(linear, "lora_magnitude_vector"):
        _fit_peft_layer(linear, comm, split, style)
        if not filled:
            measure_magnitudes(linear)
    if not filled and samples:
        _draw_alike(comm, added[0][1].device)


def adopt_new(linear: Any, comm: Communicator, split: Split, style: Style) -> None:
    """`adopt` at the beginning of a forward, because peft adds a second adapter to the first's layer without replacing it.

    A compiled graph contains nothing of it, unless there are new parameters: then the graph breaks here.
    """
    if not torch.compiler.is_compiling():
        adopt(linear, comm, split, style)
    elif getattr(linear, "_partita_adopted", 0) != len(list(linear.parameters())):
        _adopt_outside(linear, comm, split, style)


_adopt_outside = _disable_dynamo(adopt)


def _agree(
    added: Sequence[tuple[str, nn.Parameter]], comm: Communicator, split: Split, style: Style, *, samples: bool
) -> None:
    """Make the ranks' parts of an adapter parts of one unsplit adapter: a new one is sampled, another one is checked."""
    zero = all(bool((p == 0).all()) for name, p in added if part_kind(name) in _ZERO_AT_FIRST)
    fresh = all(comm.all_gather_object(zero))
    for name, parameter in added:
        if part_kind(name) == _MAGNITUDE:
            continue  # computed from the others
        if part_dim(style, name) is None:
            _make_equal(name, parameter, comm, fresh)
        elif style == "row" and fresh and samples:
            parameter.copy_(_part(comm.broadcast_(_draw(parameter, split)), split, comm.rank))
        elif style == "column" and not split.is_partition:
            _check_copies(name, parameter, comm, split)


def part_kind(name: str) -> str:
    """What a parameter of an adapter is: its name without the adapter's, as in `lora_A.default.weight`."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.rpartition('.')[2]}" if first in _NAMED_PARTS else first


def part_dim(style: Style, name: str) -> int | None:
    """The dimension along which a parameter of an adapter is split; None if it is replicated."""
    return PART_DIMS[style][part_kind(name)]


def _fit_peft_layer(linear: Any, comm: Communicator, split: Split, style: Style) -> None:
    """Replace what a peft layer computes from its own part alone: dropout of split inputs, a summed bias, norms of rows."""
    if style == "row":
        for name, dropout in linear.lora_dropout.items():
            if type(dropout) is nn.Dropout:
                linear.lora_dropout[name] = PartDropout(dropout.p, split, comm.rank).train(dropout.training)
        for up in linear.lora_B.values():
            if type(up) is nn.Linear and up.bias is not None:
                up.__class__ = _LinearBiasOnce
                up.__dict__["adds_bias"] = comm.rank == 0
    if style != "column":
        for dora in linear.lora_magnitude_vector.values():
            dora.get_weight_norm = partial(_unsplit_norm, dora.fan_in_fan_out, comm)


@torch.no_grad()
def measure_magnitudes(linear: Any, adapter_name: str | None = None) -> None:
    """Set DoRA's magnitudes of a peft layer to the norms of its adapted weight, as peft does when it adds an adapter.

    Every rank must call it after the values of the adapter have changed.

    Args:
        linear: peft's layer.
        adapter_name: The adapter (default: all).
    """
    weight: Tensor = base_layer(linear).weight  # type: ignore[assignment]
    for name, dora in linear.lora_magnitude_vector.items():
        if adapter_name not in (None, name):
            continue
        if name in linear.lora_embedding_A:
            update = (linear.lora_embedding_B[name] @ linear.lora_embedding_A[name]).to(weight.dtype)
        else:
            update = (linear.lora_B[name].weight @ linear.lora_A[name].weight).to(weight.dtype)
        dora.weight.copy_(dora.get_weight_norm(weight, update, linear.scaling[name]))


def _unsplit_norm(
    transposed: bool, comm: Communicator, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str = ""
) -> Tensor:
    """DoRA's norms `[out]` of rows whose inputs are split: `weight [out, in_r]`, the same result on every rank."""
    part = (weight.T if transposed else weight) + scaling * lora_weight
    wide = torch.promote_types(part.dtype, torch.float32)
    return comm.all_reduce_(part.detach().to(wide).square().sum(1)).sqrt().to(weight.dtype)


class PartDropout(nn.Dropout):
    """Dropout of this rank's part of the inputs, with the elements that dropout of the unsplit inputs drops."""

    def __init__(self, p: float, split: Split, rank: int) -> None:
        """Dropout with the probability `p` of rank `rank`'s part of inputs that are split by `split`."""
        super().__init__(p)
        self.split, self.rank = split, rank

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_r]` to the same shape; every rank samples for all of `[..., in]`."""
        if not self.training or self.p == 0:
            return x
        kept = F.dropout(x.new_ones(*x.shape[:-1], self.split.size), self.p)
        return x * torch.cat([kept[..., a:b] for a, b in self.split.ranges(self.rank)], -1)


class _LinearBiasOnce(nn.Linear):
    """A linear layer whose outputs are summed over the ranks: only the first rank adds the bias.

    The other ranks keep it in the graph, because its gradient is a sum over all ranks.
    """

    adds_bias = True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * float(self.adds_bias))


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
