"""What a layer and the ends of a model consist of on one tensor rank, as the costs of a model count it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ATTENTION = re.compile(r"(^|[._])(self_)?(attn|attention)([._]|$)|(^|\.)attention\.")
"""Names of the modules and tensors of an attention."""


@dataclass(frozen=True)
class Product:
    """A matrix product of a layer on a rank: [rows, inputs] x [inputs, outputs].

    Attributes:
        name: The path of its module within the layer.
        inputs: Inputs on this rank.
        outputs: Outputs on this rank.
        style: How it is split: `column`, `row` or `replicate`.
        source: What names the tensor that it reads; products of one source share it.
        experts: The number of matrices on this rank, each for a part of the rows; 1 for a plain product.
        chosen: For each token, the experts that it visits.
        share: Rows on this rank for one of the replica's: experts that are elsewhere see other ranks' tokens instead.
        bits: Bits of a weight's element; None in the model's dtype.
        unsplit: Inputs and outputs of the unsplit product.
        style_in: The style that its rule has, also where nothing is split.
        is_routed: Whether its matrices are experts, which see only some tokens; a rank may have a single one.
    """

    name: str
    inputs: int
    outputs: int
    style: str
    source: str
    experts: int = 1
    chosen: int = 1
    share: float = 1.0
    bits: float | None = None
    unsplit: tuple[int, int] = (0, 0)
    style_in: str = "replicate"
    is_routed: bool = False


@dataclass(frozen=True)
class Attention:
    """The attention of a layer on a rank.

    Attributes:
        heads: Query heads on this rank.
        kv_heads: Key and value heads on this rank.
        key_width: Elements of a query or key of a head.
        value_width: Elements of a value of a head.
        window: Tokens that a token attends to at most; 0 for all.
        latent: Elements of a token's latent (kv_lora_rank + qk_rope_head_dim), which no rank splits; 0 without.
        is_causal: Whether tokens attend to earlier ones only.
        has_rotary: Whether queries and keys are rotated.
        is_fused: Whether one product computes queries, keys and values.
        is_partial: Whether only a part of each head is rotated.
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    window: int = 0
    latent: int = 0
    is_causal: bool = True
    has_rotary: bool = True
    is_fused: bool = False
    is_partial: bool = False

    def cached(self, *, latent: bool) -> int:
        """Elements of a token in the cache."""
        return self.latent if latent and self.latent else self.kv_heads * (self.key_width + self.value_width)


@dataclass(frozen=True)
class Mlp:
    """The activation between the products of an MLP on a rank: width, whether it is gated, rows for each token, its name."""

    inner: int
    is_gated: bool
    rows: float = 1.0
    activation: str = "silu"


@dataclass(frozen=True)
class Part:
    """What a rank holds of a part of the model (a layer, or what is outside the layers).

    Attributes:
        parameters: Parameters, which are trained.
        bits: Bits of parameters and saved buffers as they are stored.
        unpacked_bits: The same with quantized weights in the model's dtype.
        matrices: Parameters that Muon updates, which keep one moment.
        lora: For each rank of an adapter, its parameters.
        experts: Of `parameters`, those of routed experts, of which there are other numbers of copies.
    """

    parameters: int = 0
    bits: float = 0.0
    unpacked_bits: float = 0.0
    matrices: int = 0
    lora: int = 0
    experts: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(
            self.parameters + other.parameters,
            self.bits + other.bits,
            self.unpacked_bits + other.unpacked_bits,
            self.matrices + other.matrices,
            self.lora + other.lora,
            self.experts + other.experts,
        )

    def times(self, count: int) -> Part:
        """`count` of them."""
        return Part(
            self.parameters * count,
            self.bits * count,
            self.unpacked_bits * count,
            self.matrices * count,
            self.lora * count,
            self.experts * count,
        )


@dataclass(frozen=True)
class Layer:
    """A kind of layer on a tensor rank.

    Attributes:
        held: What the rank holds.
        products: Its matrix products.
        attention: Its attention, if it has one.
        mlps: Its activations.
        norms: Widths of the norms that all ranks compute.
        head_norms: Elements of the norms inside a split region.
        reduces: All-reduces of [tokens, hidden] in the forward.
        entries: The same in the backward.
        is_rms: Whether its norms are RMS norms.
        is_parallel: Whether all of its norms read the same tensor (attention and MLP side by side).
        dispatched: Elements of a token that are sent to the ranks with its experts, and back.
        gathers: Elements of a token that are gathered in the forward: the outputs of layers that are split by themselves.
    """

    held: Part
    products: tuple[Product, ...]
    attention: Attention | None
    mlps: tuple[Mlp, ...]
    norms: tuple[int, ...]
    head_norms: int
    reduces: int
    entries: int
    gathers: int
    is_rms: bool = True
    is_parallel: bool = False
    dispatched: int = 0


@dataclass(frozen=True)
class Ends:
    """What a tensor rank holds outside the layers: at the embedding, at the loss, and if both are on one pipeline rank."""

    embedding: Part
    loss: Part
    both: Part
    mtp: Part
    mtp_and_loss: Part
    head: Product | None
    norm: int
    is_rms: bool


@dataclass(frozen=True)
class Sliced:
    """The model over `tp` tensor ranks: by tensor rank, each kind of layer and the ends."""

    layers: tuple[tuple[Layer, ...], ...]
    ends: tuple[Ends, ...]

    @cached_property
    def distinct(self) -> tuple[int, ...]:
        """The first of each set of tensor ranks that hold the same."""
        first: dict[Any, int] = {}
        for rank, held in enumerate(zip(self.layers, self.ends, strict=True)):
            first.setdefault(held, rank)
        return tuple(first.values())

    @cached_property
    def same_as(self) -> tuple[int, ...]:
        """For each tensor rank the first one that holds the same."""
        first: dict[Any, int] = {}
        return tuple(first.setdefault(held, rank) for rank, held in enumerate(zip(self.layers, self.ends, strict=True)))


def is_in_attention(product: Product) -> bool:
    """Whether a product is part of the attention."""
    return ATTENTION.search(product.name) is not None


def ceil_div(value: int, by: int) -> int:
    """`value / by`, rounded up."""
    return -(-value // by)


def bytes_of_bits(bits: float) -> int:
    """Whole bytes of bits."""
    return math.ceil(bits / 8)
