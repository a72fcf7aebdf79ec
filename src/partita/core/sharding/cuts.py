"""The splits of a model's tensors, modules and attention layers over the ranks that hold a layer together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

from partita.core.sharding.rules import Style
from partita.core.sharding.split import Split, kv_positions

SplitAxis = Literal["tp", "ep"]
"""The axes of a mesh over whose ranks a tensor is split."""


@dataclass(frozen=True)
class TensorPlan:
    """The split of one tensor over the tensor axis, or of a tensor of distributed experts over the expert axis.

    A *part* below is the index of a rank along `axis` (`Plan.part`, `AxisGroups.part`).

    Attributes:
        name: Its name in the unsplit model.
        shape: Its unsplit shape.
        dim: The dimension that is split, or None if it is replicated.
        split: The ranges of that dimension of each part.
        partial_grad: Whether ranks that hold the same elements each see a part of their gradient, to sum.
        axis: The axis whose ranks hold the parts: tp, or ep for the ranks that hold experts together (ep x etp).
        inner_dim: A second dimension that is split, of experts that are distributed over ep and each split over etp.
        inner: The ranges of that dimension of each of the etp ranks, which are neighbours.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    split: Split | None = None
    partial_grad: bool = False
    axis: SplitAxis = "tp"
    inner_dim: int | None = None
    inner: Split | None = None

    @property
    def parts(self) -> int:
        """Number of parts."""
        return 1 if self.split is None else self.split.parts * (1 if self.inner is None else self.inner.parts)

    def split_dims(self, part: int) -> tuple[tuple[int, Split, int], ...]:
        """The dimensions that are split: each with its split, and the index of a part in it."""
        if self.split is None or self.dim is None:
            return ()
        if self.inner is None or self.inner_dim is None:
            return ((self.dim, self.split, part),)
        outer, inner = divmod(part, self.inner.parts)
        return (self.dim, self.split, outer), (self.inner_dim, self.inner, inner)

    def local_shape(self, part: int) -> tuple[int, ...]:
        """The shape of a part."""
        shape = list(self.shape)
        for dim, split, place in self.split_dims(part):
            shape[dim] = split.local_size(place)
        return tuple(shape)

    def local_numel(self, part: int) -> int:
        """Elements of a part."""
        return math.prod(self.local_shape(part))

    def ranges(self, part: int) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each dimension the ranges of the unsplit tensor that a part has, in local order."""
        ranges: list[tuple[tuple[int, int], ...]] = [((0, size),) for size in self.shape]
        for dim, split, place in self.split_dims(part):
            ranges[dim] = split.ranges(place)
        return tuple(ranges)

    def owned_ranges(self, part: int) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The ranges that a part owns: over all parts every element once."""
        if self.split is None or self.dim is None:
            return self.ranges(part) if part == 0 else ((),) * len(self.shape)
        ranges = list(self.ranges(part))
        for dim, split, place in self.split_dims(part):
            ranges[dim] = split.owned_ranges(place)
        return tuple(ranges)


@dataclass(frozen=True)
class ModulePlan:
    """The split of one module.

    Attributes:
        path: Its path in the model.
        style: See `Rule`.
        split: The split of its dimension: a column layer's outputs, a row layer's inputs, the vocabulary.
        gather_output: Whether its outputs are gathered after it.
        split_input: Whether it receives its complete input and selects its part of it.
        transposed: Whether its weight is stored as [in, out].
        distributed: Whether complete experts are distributed over the ranks, rather than each expert split.
        copy_output: Number of its last outputs that enter a split region.
        expand: For each tensor rank, the blocks of `expand_width` local outputs in the order (and as often) as the
            attention needs them: KV heads repeated for query heads whose number is not the same for all. None: unchanged.
        expand_width: Outputs of one block.
    """

    path: str
    style: Style
    split: Split | None = None
    gather_output: bool = False
    split_input: bool = False
    transposed: bool = False
    distributed: bool = False
    copy_output: int = 0
    expand: tuple[tuple[int, ...] | None, ...] = ()
    expand_width: int = 0

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON, the split left as it is."""
        data = asdict(replace(self, split=None))
        del data["path"]
        return {**data, "expand": [None if e is None else list(e) for e in self.expand] if any(self.expand) else []}

    @classmethod
    def from_data(cls, path: str, data: Mapping[str, Any]) -> ModulePlan:
        """The inverse of `to_data`."""
        expand = tuple(None if e is None else tuple(e) for e in data.get("expand", ()))
        return cls(path, **{**data, "expand": expand})


@dataclass(frozen=True)
class AttentionPlan:
    """The heads of one attention module over the tensor ranks.

    Attributes:
        path: The module that holds the projections.
        num_heads: Query heads of the unsplit module.
        num_kv_heads: Its KV heads.
        heads: The query heads of each rank.
        kv_heads: The KV heads of each rank; copies if there are fewer than ranks.
    """

    path: str
    num_heads: int
    num_kv_heads: int
    heads: Split
    kv_heads: Split

    def local_heads(self, tp_rank: int) -> int:
        """Query heads of a tensor rank."""
        return self.heads.local_size(tp_rank)

    def local_kv_heads(self, tp_rank: int) -> int:
        """KV heads in a tensor rank's attention: as many as query heads if they are expanded."""
        expanded = kv_expansion(self.num_heads // self.num_kv_heads, self.heads)[tp_rank]
        return self.kv_heads.local_size(tp_rank) if expanded is None else self.local_heads(tp_rank)


@cache
def kv_expansion(group: int, heads: Split) -> tuple[tuple[int, ...] | None, ...]:
    """For each rank, the positions of its query heads' KV heads if they cannot be repeated evenly, else None.

    `group` query heads share a KV head; `heads` are the query heads of each rank.
    """
    expansion: list[tuple[int, ...] | None] = []
    for rank in range(heads.parts):
        positions = kv_positions(group, heads, rank)
        counts = {positions.count(position) for position in positions}
        expansion.append(None if len(counts) == 1 else positions)
    return tuple(expansion)
