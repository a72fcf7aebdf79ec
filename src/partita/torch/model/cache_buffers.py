"""Key-value caches on a CPU with room for more tokens: an append writes the new tokens only.

An entry of transformers' cache concatenates, which copies all earlier tokens for every new one. Here the entry's tensors are
views of a buffer:

    buffer   [batch, heads, begin | kept: window - 1 at most | end | room, width]

The entry's other methods (crop, reorder, ...) replace its tensors; the next append then starts a new buffer. No memory that
was returned is written again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from partita.torch.layers.decode_stacks import Room
from partita.torch.transformers_internals import appends_tokens, window_of

LARGE = 1 << 14
"""Elements of a tensor from which a copy takes longer than the additional operations of a buffer."""

LEAST_ROOM = 64
"""Tokens of room in a new buffer, or an eighth of the kept tokens if that is more."""


def reserve(cache: Any) -> None:
    """Make the entries of a cache, filled by one forward, append into buffers. Entries of other kinds stay as they are."""
    for entry in getattr(cache, "layers", None) or ():
        if appends_tokens(entry) and not isinstance(vars(entry).get("update"), _Append):
            entry.update = _Append(entry)


class _Append:
    """Replaces `update` of one entry."""

    def __init__(self, entry: Any) -> None:
        # A reference to the entry would be a cycle, which would keep its memory until the next garbage collection.
        self.entry, self.window = weakref.ref(entry), window_of(entry)
        self.concatenate: Callable[..., tuple[Tensor, Tensor]] = type(entry).update
        self.keys, self.values = TokenBuffer(), TokenBuffer()

    def __call__(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values that the new tokens see, `[batch, heads, tokens, width]`."""
        entry: Any = self.entry()
        if not (_is_large(entry.keys, keys) and _is_large(entry.values, values)) or getattr(
            entry, "record_past", False
        ):
            return self.concatenate(entry, keys, values, *args, **kwargs)
        all_keys, all_values = self.keys.append(entry.keys, keys), self.values.append(entry.values, values)
        if self.window is None:
            entry.keys, entry.values = all_keys, all_values
        else:
            entry.cumulative_length += keys.shape[-2]
            entry.keys, entry.values = (t[:, :, -self.window + 1 :] for t in (all_keys, all_values))
        self.keys.kept, self.values.kept = entry.keys, entry.values
        return all_keys, all_values

    def room(self) -> Room | None:
        """Where the next token of each sequence goes; see `decode_stacks.HasRoom`."""
        entry: Any = self.entry()
        if getattr(entry, "record_past", False) or not (entry.keys.is_cpu and entry.values.is_cpu):
            return None
        keys, values = self.keys.room(entry.keys), self.values.room(entry.values)
        return Room(keys, values, keys.shape[-2])

    def appended(self) -> None:
        """The next token of each sequence is there."""
        entry: Any = self.entry()
        count = entry.keys.shape[-2] + 1
        if self.window is not None:
            entry.cumulative_length += 1
            count = min(count, self.window - 1)
        entry.keys, entry.values = self.keys.grown(count), self.values.grown(count)


def _is_large(kept: Tensor | None, new: Tensor) -> bool:
    return kept is not None and kept.numel() >= LARGE and kept.is_cpu and kept.dtype is new.dtype


class TokenBuffer:
    """The memory of a growing tensor of tokens; `kept` is the tensor that the last append left, or its last tokens."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        self.memory = torch.empty(0)
        self.end = self.capacity = 0

    def append(self, kept: Tensor, new: Tensor) -> Tensor:
        """`kept` and then `new` along the tokens; `kept` is not copied if the previous call left it here."""
        count, added = kept.shape[-2], new.shape[-2]
        self._reserve(kept, added)
        self.memory.narrow(-2, self.end, added).copy_(new)
        self.end += added
        return self.memory.narrow(-2, self.end - count - added, count + added)

    def room(self, kept: Tensor) -> Tensor:
        """`kept` and then the memory of one more token, which `grown` appends."""
        self._reserve(kept, 1)
        self.kept, count = kept, kept.shape[-2]
        return self.memory.narrow(-2, self.end - count, count + 1)

    def grown(self, count: int) -> Tensor:
        """The last `count` tokens, with the one that was written to the room."""
        self.end += 1
        self.kept = self.memory.narrow(-2, self.end - count, count)
        return self.kept

    def _reserve(self, kept: Tensor, added: int) -> None:
        count = kept.shape[-2]
        if kept is not self.kept or self.end + added > self.capacity:
            self.capacity, self.end = count + added + max(LEAST_ROOM, count // 8), count
            self.memory = kept.new_empty((*kept.shape[:-2], self.capacity, kept.shape[-1]))
            self.memory.narrow(-2, 0, count).copy_(kept)

    def extended(self, kept: Tensor, new: Tensor) -> Tensor:
        """`kept` and then `new` along the tokens, in a buffer where that pays."""
        if new.shape[-2] == 0:
            return kept
        return self.append(kept, new) if _is_large(kept, new) else torch.cat([kept, new], -2)
