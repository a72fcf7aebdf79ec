"""Rows of several documents: their positions and attention are passed to mlx-lm's own forward in the place of its cache.

mlx-lm's models ask their cache for the attention mask and for the position of the first token, which they pass to their rotary
modules. A `PackedRows` answers with a mask of the documents and with the position of every token, and keeps no keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.errors import ModelError
from partita.mlx.layers.region_parts import Around
from partita.mlx.mlx_lm_internals import rotated_dims
from partita.mlx.model.rotary import RotaryEmbedding
from partita.mlx.model.tree import named_modules, set_module


class PackedRows:
    """An entry of a cache for rows of several documents; all layers share it.

    Attributes:
        offset: int `[batch, tokens]`, the position of each token in its document.
        state: Nothing: keys and values are not kept.
    """

    def __init__(self, positions: mx.array) -> None:
        """A document begins where a position of `positions` `[batch, tokens]` does not follow the one before."""
        self.offset = positions
        self.state: tuple[mx.array, ...] = ()
        begins = (positions[:, 1:] != positions[:, :-1] + 1).astype(mx.int32)
        self._document = mx.pad(mx.cumsum(begins, axis=1), [(0, 0), (1, 0)])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The keys and values of these rows."""
        return keys, values

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """bool `[batch, 1, count, count]`: each token sees the earlier ones of its document, `window_size` at most."""
        place = mx.arange(count)
        seen = place[:, None] >= place[None]
        if window_size is not None:
            seen = seen & (place[:, None] < place[None] + window_size)
        document = self._document
        return (seen & (document[:, :, None] == document[:, None, :]))[:, None]


class RotaryByToken(Around):
    """A rotary module that also takes a position for each token."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate `x` `[batch, heads, tokens, head_dim]`; `offset` may be `[batch, tokens]`."""
        rotary: Any = self["inner"]
        if not isinstance(offset, mx.array) or offset.ndim != 2:
            return rotary(x, offset=offset)
        if x.ndim != 4 or offset.shape != (x.shape[0], x.shape[2]):
            raise ModelError(f"its rotary embedding gets {list(x.shape)} for positions {list(offset.shape)}.")
        batch, heads, tokens, width = x.shape
        apart = x.transpose(0, 2, 1, 3).reshape(batch * tokens, heads, 1, width)
        if isinstance(rotary, RotaryEmbedding):
            rotated = rotary.short(apart, offset.reshape(-1))
        else:
            rotated = rotary(apart, offset=offset.reshape(-1))
        return rotated.reshape(batch, tokens, heads, width).transpose(0, 2, 1, 3)


@contextmanager
def positions_by_token(model: nn.Module) -> Iterator[None]:
    """Let the rotary modules of a model take a position for each token inside the context."""
    found = {
        path: module
        for path, module in named_modules(model).items()
        if isinstance(module, RotaryEmbedding) or rotated_dims(module) is not None
    }
    for path, module in found.items():
        set_module(model, path, RotaryByToken(module))
    try:
        yield
    finally:
        for path, module in found.items():
            set_module(model, path, module)


def rotary_limit(model: nn.Module) -> int | None:
    """The length of a text beyond which some rotary module of a model changes its frequencies; None if none does."""
    limits = [m.form.limit for m in model.modules() if isinstance(m, RotaryEmbedding) and m.form.limit is not None]
    return min(limits, default=None)
