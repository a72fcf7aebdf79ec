"""Initial weights that do not depend on how the model is split.

mlx-lm's initial weights are placeholders for loaded ones. So matrices and embeddings are sampled as
transformers samples them, in blocks of rows, each from a key of the seed and the tensor's name; a rank samples the blocks that
it needs. Biases start at zero, scales of norms at the identity. Everything else (a state's decay, sinks, convolutions) has the
model's own initialization.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.model.spec import text_config
from partita.core.plan import Plan
from partita.mlx.model.parts import Ranges, local_ranges, parameter_homes
from partita.mlx.model.tree import named_modules

BLOCK_ELEMENTS = 1 << 22
"""Approximate number of elements to sample with one key."""

DEVIATION = 0.02
"""Standard deviation of weights if the config has no `initializer_range`."""

_SMALLER = {"gpt2": "c_proj.weight"}
"""By family, the weights into the residual stream whose initial values are smaller by sqrt(2 x layers)."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def zero_scales(model: nn.Module) -> frozenset[str]:
    """Names of an unsplit model's norm scales to which the norm adds one, so that they start at zero."""
    return frozenset(
        f"{path}.weight"
        for path, module in named_modules(model).items()
        if isinstance(weight := module.get("weight"), mx.array) and weight.ndim == 1 and _adds_one(module)
    )


def _adds_one(module: nn.Module) -> bool:
    """Whether a norm with a zero scale returns nonzero values."""
    kept: Any = module["weight"]
    module["weight"] = mx.zeros_like(kept)
    try:
        output = module(mx.arange(1, kept.size + 1, dtype=mx.float32)[None])
        return bool(mx.any(output).item())
    except Exception:
        # It takes more than one input, so it is not such a norm.
        return False
    finally:
        module["weight"] = kept


class InitialFill:
    """Fills a split model with its part of the unsplit initial weights, one array at a time."""

    def __init__(self, config: Mapping[str, Any], zeros: frozenset[str], seed: int, dtype: mx.Dtype) -> None:
        """Create the weights of `seed` for a model of `config`; the arrays in `zeros` start at zero."""
        text = text_config(config)
        self.zeros, self.seed, self.dtype = zeros, seed, dtype
        self.deviation = float(text.get("initializer_range") or DEVIATION)
        self.smaller = _SMALLER.get(str(config.get("model_type")))

    def __call__(self, model: nn.Module, plan: Plan, tp_rank: int) -> None:
        """Fill a model that `apply_plan` has split."""
        for name, (home, key) in parameter_homes(model).items():
            array = home[key]
            if not mx.issubdtype(array.dtype, mx.floating):
                mx.eval(array)
                continue
            if key == "weight" and array.ndim >= 2 and not isinstance(home, _CONVOLUTIONS):
                ranges = local_ranges(home, key, name, plan, tp_rank) or tuple(((0, n),) for n in array.shape)
                array = self._drawn(name, plan.tensor(name).shape, ranges, plan.spec.num_layers)
            elif key == "bias" or name in self.zeros:
                array = mx.zeros(array.shape)
            array = array.astype(self.dtype)
            mx.eval(array)
            home[key] = array

    def _drawn(self, name: str, shape: tuple[int, ...], ranges: Ranges, layers: int) -> mx.array:
        """Sample the `ranges` of a tensor of this shape, in float32."""
        smaller = self.smaller is not None and name.endswith(self.smaller)
        deviation = self.deviation / math.sqrt(2 * layers) if smaller else self.deviation
        block_rows = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
        parts = []
        for start, stop in ranges[0]:
            for block in range(start // block_rows, -(-stop // block_rows)):
                first, last = block * block_rows, min(shape[0], (block + 1) * block_rows)
                rows = deviation * mx.random.normal((last - first, *shape[1:]), key=self._key(name, block))
                rows = rows[max(start, first) - first : min(stop, last) - first]
                for axis, mine in enumerate(ranges[1:], 1):
                    if mine != ((0, shape[axis]),):
                        before = (slice(None),) * axis
                        rows = mx.concatenate([rows[(*before, slice(a, b))] for a, b in mine], axis=axis)
                rows = mx.contiguous(rows).astype(self.dtype)
                mx.eval(rows)
                parts.append(rows)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)

    def _key(self, name: str, block: int) -> mx.array:
        digest = hashlib.sha256(f"{self.seed}:{name}:{block}".encode()).digest()
        return mx.random.key(int.from_bytes(digest[:7], "big"))
