"""The cache of a running text, and the finished blocks of texts that other texts may begin with.

A running text has mlx-lm's own cache, as `generate` creates it. What it shares with others is copied: a text that begins with
the blocks of another receives their keys and values before its first forward. An entry with a sliding window forgets tokens, so
its blocks are copied as soon as they are complete; an entry that keeps all tokens has its blocks until the text ends. A state
of fixed size belongs to one length of a text, so a model with one reuses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from partita.mlx.mlx_lm_internals import latest_tokens, leaves_of, refill, window_of

_Block = list[tuple[mx.array, mx.array] | None]
"""For each simple entry of a text's caches, keys and values `[1, heads, block_tokens, width]`; None where it has none."""


@dataclass
class TextCache:
    """The cache of a running text on this rank.

    Attributes:
        caches: The model's cache, by stage of this rank.
        blocks: The text's cache blocks, in order of its tokens.
        shared: The number of its first blocks that it took from other texts.
        tokens: The number of tokens, from the first, whose keys and values it has.
    """

    caches: dict[int, list[Any]]
    blocks: Sequence[int] = ()
    shared: int = 0
    tokens: int = 0

    @property
    def leaves(self) -> list[Any]:
        """The simple entries of all stages."""
        return [leaf for cache in self.caches.values() for leaf in leaves_of(cache)]

    def evaluated(self) -> list[Any]:
        """What to evaluate so that no forward is pending."""
        return [entry.state for cache in self.caches.values() for entry in cache if entry is not None]


class Blocks:
    """The finished blocks of texts on this rank."""

    def __init__(self, size: int, *, forgets: bool) -> None:
        """Hold blocks of `size` tokens; `forgets` if any entry of the model's cache has a window."""
        self._size, self._forgets = size, forgets
        self._stored: dict[int, _Block] = {}
        self._running: dict[int, tuple[TextCache, int]] = {}

    def start(self, text: TextCache) -> None:
        """Give a new text the keys and values of its shared blocks."""
        for place, block in enumerate(text.blocks):
            if place >= text.shared:
                self._stored.pop(block, None)
                self._running[block] = text, place
        if not text.shared:
            return
        found = [self._content(block) for block in text.blocks[: text.shared]]
        text.tokens = text.shared * self._size
        for index, leaf in enumerate(text.leaves):
            parts = [one for block in found if (one := block[index]) is not None]
            if parts:
                length = window_of(leaf) or text.tokens
                keys, values = (
                    mx.concatenate(list(arrays), axis=2)[..., -length:, :] for arrays in zip(*parts, strict=True)
                )
                refill(leaf, keys, values, text.tokens)
        # The blocks of a running text are views of its buffers, which it could not change in place before this.
        mx.eval(text.evaluated())

    def extend(self, text: TextCache, count: int) -> None:
        """Record that a forward computed the next `count` tokens of a text."""
        before, text.tokens = text.tokens // self._size, text.tokens + count
        if self._forgets:
            for place in range(before, min(text.tokens // self._size, len(text.blocks))):
                self._store(text, place)

    def end(self, text: TextCache) -> None:
        """Keep the blocks of a text that ends."""
        for place in range(text.shared, min(text.tokens // self._size, len(text.blocks))):
            if text.blocks[place] not in self._stored:
                self._store(text, place)
        for block in text.blocks[text.shared :]:
            self._running.pop(block, None)

    def _store(self, text: TextCache, place: int) -> None:
        block = [one and (_copied(one[0]), _copied(one[1])) for one in self._views(text, place)]
        mx.eval(block)
        self._stored[text.blocks[place]] = block

    def _content(self, block: int) -> _Block:
        if block in self._stored:
            return self._stored[block]
        return self._views(*self._running[block])

    def _views(self, text: TextCache, place: int) -> _Block:
        return [latest_tokens(leaf, self._size, (place + 1) * self._size) for leaf in text.leaves]


def forgets(text: TextCache) -> bool:
    """Whether the cache of a text has an entry with a window."""
    return any(window_of(leaf) for leaf in text.leaves)


def _copied(x: mx.array) -> mx.array:
    # A contiguous part of a buffer would keep all of it in memory.
    return mx.take(x, mx.arange(x.shape[2]), axis=2)
