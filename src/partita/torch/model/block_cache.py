"""Keys and values of many texts in one pool of token slots per layer, and the cache that a model sees of it.

Slot `i` of a pool holds the keys and values of one token of one text. A forward writes its new tokens to their slots and reads
each row's slots in order, the rows aligned at their last token; padding reads slot 0, which stays zero. Rows with fewer new
tokens than others of their forward are padded before them; this padding writes to a slot that is never read. A layer with a
sliding window keeps every token, and its mask hides those outside the window: so the keys of a prompt can be reused at any
length. Of context parallel ranks each has the slots of its own tokens: token t of a text is on rank t mod cp.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partita.torch.layers.decode_stacks import Room
from partita.torch.transformers_internals import cache_of_entries, growing_entry, holds_plain_tokens


@dataclass(frozen=True)
class Form:
    """The keys and values of a token in one layer on this rank."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of one token."""
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize

    @classmethod
    def of(cls, entry: Any) -> Form:
        """The form of a layer's entry of a cache that has seen tokens."""
        keys, values = entry.keys, entry.values
        return cls(keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype)


class Pools:
    """The slots of this rank's layers.

    Attributes:
        entries: For each entry of the model's cache whether it is a sliding window's.
        keys: By layer, `[slots, heads, key_width]`.
        values: By layer, `[slots, heads, value_width]`.
        lengths: The number of tokens of each row of the forward that runs.
        unread: The slot to which padding writes.
    """

    def __init__(self, entries: list[bool], forms: Mapping[int, Form], slots: int, device: torch.device) -> None:
        """Allocate `slots` slots for each layer of `forms`, and `unread`."""
        self.entries, self.unread = entries, slots
        slots += 1
        self.lengths: list[int] = []
        self.keys = {i: _zeros(slots, f.heads, f.key_width, f.dtype, device) for i, f in forms.items()}
        self.values = {i: _zeros(slots, f.heads, f.value_width, f.dtype, device) for i, f in forms.items()}

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy the keys and values of a block of `size` tokens to another one."""
        for pool in (*self.keys.values(), *self.values.values()):
            pool[target * size : (target + 1) * size] = pool[source * size : (source + 1) * size]


def _zeros(slots: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch.zeros(slots, heads, width, dtype=dtype, device=device)


@dataclass(frozen=True)
class Place:
    """Where the tokens of a forward are.

    Attributes:
        read: int64 `[rows, keys]`, the slot of each token of each row that is kept on this rank, new ones included; 0 for
            padding on the left.
        write: int64, the slots of the new tokens that are kept; `Pools.unread` for padding before them.
        past: The number of columns before the new tokens.
        length: The number of columns, new tokens included.
        kept: int64, the places in `[rows * count]` of the new tokens that are kept (default: all, and the padding).
    """

    read: Tensor
    write: Tensor
    past: int
    length: int
    kept: Tensor | None = None


def block_cache(pools: Pools, place: Place, layers: frozenset[int]) -> Any:
    """The cache of one forward of a stage with the layers `layers`."""
    make = _entry_class()
    return cache_of_entries(
        [make(pools, place, i, is_sliding, i in layers) for i, is_sliding in enumerate(pools.entries)]
    )


def entries_of(cache: Any) -> list[bool] | None:
    """For each entry of a cache whether it is a sliding window's; None if any holds something else than keys and values."""
    if not cache.layers or not all(holds_plain_tokens(entry) for entry in cache.layers):
        return None
    return [bool(entry.is_sliding) for entry in cache.layers]


@functools.cache
def _entry_class() -> Any:
    class BlockEntry(growing_entry()):  # type: ignore[misc]
        """One layer's entry: the pool's slots for the rows of this forward."""

        is_sliding = False
        is_croppable = False

        def __init__(self, pools: Pools, place: Place, layer: int, is_sliding: bool, is_own: bool) -> None:
            super().__init__()
            self.pools, self.place, self.layer, self.is_own = pools, place, layer, is_own
            self.is_sliding = is_sliding
            self.is_initialized = True
            self.seen = place.past

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.seen = self.place.length
            if not self.is_own:
                return keys, values
            return (
                _exchange(self.pools.keys[self.layer], keys, self.place),
                _exchange(self.pools.values[self.layer], values, self.place),
            )

        def room(self) -> Room | None:
            if not self.is_own or self.place.kept is not None:
                return None
            keys, values = self.pools.keys[self.layer], self.pools.values[self.layer]
            return Room(keys, values, self.place.past + 1, self.place.read, self.place.write)

        def appended(self) -> None:
            self.seen = self.place.past + 1

        def get_seq_length(self) -> int:
            return self.seen

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.seen + query_length, 0

    return BlockEntry


def _exchange(pool: Tensor, new: Tensor, place: Place) -> Tensor:
    """Store `new`, `[rows, heads, count, width]`, and return the kept tokens of the rows, `[rows, heads, keys, width]`."""
    tokens = new.transpose(1, 2).reshape(-1, *pool.shape[1:])
    pool.index_copy_(0, place.write, tokens if place.kept is None else tokens[place.kept])
    rows, keys = place.read.shape
    return pool.index_select(0, place.read.view(-1)).view(rows, keys, *pool.shape[1:]).transpose(1, 2)
