"""A peer: the pipeline that LocalAI's MLX backend makes of a model, by a layer that receives and a layer that sends.

Written from the description of `backend/python/mlx-distributed/sharding.py` in github.com/mudler/LocalAI: the first layer of
a rank takes what the rank before sends, the last one sends on and then gathers, so that all ranks end with the last one's
hidden state.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class _First(nn.Module):
    def __init__(self, layer: nn.Module, group: Any) -> None:
        super().__init__()
        self.layer, self._group = layer, group

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        rank = self._group.rank()
        if rank > 0:
            x = mx.distributed.recv_like(x, rank - 1, group=self._group)
        return self.layer(x, *args, **kwargs)


class _Last(nn.Module):
    def __init__(self, layer: nn.Module, group: Any) -> None:
        super().__init__()
        self.layer, self._group = layer, group

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rank, size = self._group.rank(), self._group.size()
        out = self.layer(x, mask, cache)
        if rank < size - 1:
            out = mx.distributed.send(out, rank + 1, group=self._group)
            if cache is not None:
                cache.keys = mx.depends(cache.keys, out)
        return mx.distributed.all_gather(out, group=self._group)[-out.shape[0] :]


def wrap(model: Any, group: Any) -> None:
    """Keep this rank's layers of `model`, whose list `model.model.layers` is; what `mlx_lm` counts becomes local too."""
    layers, rank, size = list(model.model.layers), group.rank(), group.size()
    each, more = divmod(len(layers), size)
    start = rank * each + min(rank, more)
    mine = layers[start : start + each + (rank < more)]
    mine[0] = _First(mine[0], group)
    mine[-1] = _Last(mine[-1], group)
    model.model.layers = mine
