"""Initial weights that do not depend on how the model is split.

MLX's layers begin at weights of mlx-lm's choice, made for loading others over them. So matrices and embeddings are drawn as
transformers draws them, in blocks of rows, each from a key of the seed and the tensor's name; a rank draws the blocks that it
needs. Biases begin at zero, scales of norms at what does nothing. All else (a state's decay, sinks, convolutions) is what the
model itself makes of it.
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
"""About how many elements are drawn with one key."""

DEVIATION = 0.02
"""Of weights, where the config has no `initializer_range`."""

_SMALLER = {"gpt2": "c_proj.weight"}
"""Of families, the weights that lead back into the residual stream where these begin smaller by sqrt(2 x layers)."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def zero_scales(model: nn.Module) -> frozenset[str]:
    """Names of the norms' scales of an unsplit model to which its norms add one, so that they begin at zero."""
    return frozenset(
        f"{path}.weight"
        for path, module in named_modules(model).items()
        if isinstance(weight := module.get("weight"), mx.array) and weight.ndim == 1 and _adds_one(module)
    )


def _adds_one(module: nn.Module) -> bool:
    """Whether a norm whose scale is zero gives anything but zero."""
    kept: Any = module["weight"]
    module["weight"] = mx.zeros_like(kept)
    try:
        output = module(mx.arange(1, kept.size + 1, dtype=mx.float32)[None])
        return bool(mx.any(output).item())
    except Exception:
        # It takes more than one input, so it is none of these.
        return False
    finally:
        module["weight"] = kept


class InitialFill:
    """Gives a split model its part of the unsplit initial weights, an array at a time."""

    def __init__(self, config: Mapping[str, Any], zeros: frozenset[str], seed: int, dtype: mx.Dtype) -> None:
        """Weights of `seed` for a model of `config`, of whose arrays those in `zeros` begin at zero."""
        text = text_config(config)
        self.zeros, self.seed, self.dtype = zeros, seed, dtype
        self.deviation = float(text.get("initializer_range") or DEVIATION)
        self.smaller = _SMALLER.get(str(config.get("model_type")))

    def __call__(self, model: nn.Module, plan: Plan, tp_rank: int) -> None:
        """Fill what `apply_plan` left of an unsplit model."""
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
        """The `ranges` of a tensor of this shape, in float32."""
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
