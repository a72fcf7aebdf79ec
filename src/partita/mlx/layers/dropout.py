"""Dropout of an adapter's input: each rank drops its part of the elements that the unsplit layer drops."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
import mlx.nn as nn

from partita.core.sharding.split import Split
from partita.training.random import mixed_seed

_seed: ContextVar[int | None] = ContextVar("seed", default=None)


@contextmanager
def dropout_seeded(seed: int | None) -> Iterator[None]:
    """Sample the dropout of named layers from `seed` and their names inside the context, whatever was sampled before.

    Every layout, and a forward that is recomputed in backward, then drops the same elements. With None, dropout samples from
    MLX's random state as `nn.Dropout` does.
    """
    token = _seed.set(seed)
    try:
        yield
    finally:
        _seed.reset(token)


class AdapterDropout(nn.Module):
    """Dropout of the input of an adapter, which is replicated or split by its last dimension.

        forward          y_r [..., in_r] = x_r * kept_r / (1 - p), where every rank samples `kept` for all of [..., in]
        input gradient   dy_r * kept_r / (1 - p)

    Without a name, or outside `dropout_seeded`, ranks drop the same elements only if their random states are equal.
    """

    def __init__(self, p: float, name: str = "", split: Split | None = None, rank: int = 0) -> None:
        """Dropout with the probability `p`; `split` says which part of the input rank `rank` has, if it is split."""
        super().__init__()
        self.p, self.name, self.split, self.rank = p, name, split, rank

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in_r]` to the same shape."""
        if not self.training or self.p == 0:
            return x
        width = x.shape[-1] if self.split is None else self.split.size
        kept = mx.random.bernoulli(1 - self.p, (*x.shape[:-1], width), key=self._key())
        if self.split is not None:
            kept = mx.concatenate([kept[..., a:b] for a, b in self.split.ranges(self.rank)], axis=-1)
        return (1 / (1 - self.p)) * kept * x

    def _key(self) -> mx.array | None:
        seed = _seed.get()
        if seed is None or not self.name:
            return None
        return mx.random.key(mixed_seed(seed, zlib.crc32(self.name.encode())))

    def _extra_repr(self) -> str:
        return f"p={self.p}"
