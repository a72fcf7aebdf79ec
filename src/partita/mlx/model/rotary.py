"""Rotary embeddings as transformers computes them, which replace those that mlx-lm builds from a config.

Each family of mlx-lm reads the rotary keys itself and ignores some: YaRN's `truncate` and `attention_factor`, LongRoPE's
`short_factor`, or all of `rope_scaling`. This module computes the frequencies from the config and sets them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.model.rotary import KINDS, Rotary
from partita.core.model.spec import find_layers
from partita.mlx.mlx_lm_internals import rotated_dims
from partita.mlx.model.config import transformers_config
from partita.mlx.model.tree import named_modules, set_module


class RotaryEmbedding(nn.Module):
    """Rotates the first `dims` elements of each head by given frequencies; it is called like `mlx.nn.RoPE`.

    If the frequencies depend on the length of the text, each sequence uses its own length up to its last token, so it does not
    depend on the other sequences of the batch.
    """

    def __init__(self, form: Rotary, traditional: bool) -> None:
        """`traditional` rotates neighbouring elements as a pair, else element `i` with element `i + dims / 2`."""
        super().__init__()
        self.form, self.dims, self.traditional = form, form.dims, traditional
        self.text_length = 0
        self._short, self._short_scale = self._at(1)
        self._long, self._long_scale = self._at((form.limit or 0) + 1)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate `x`, `[batch, heads, tokens, head_dim]`.

        Args:
            x: Queries or keys.
            offset: Position of the first token, or one per sequence.
        """
        limit = self.form.limit
        if limit is None:
            return self._rotated(x, offset, self._short, self._short_scale)
        if isinstance(offset, mx.array) and offset.size > 1:
            starts: list[int] = offset.tolist()  # type: ignore[assignment]
            rows = [self(x[i : i + 1], start) for i, start in enumerate(starts)]
            return mx.concatenate(rows)
        start: Any = offset.item() if isinstance(offset, mx.array) else offset
        length = max(int(start) + x.shape[-2], self.text_length)
        if length <= limit:
            return self._rotated(x, offset, self._short, self._short_scale)
        if self.form.kind != "dynamic":
            return self._rotated(x, offset, self._long, self._long_scale)
        return self._rotated(x, offset, *self._at(length))

    def short(self, x: mx.array, offset: mx.array) -> mx.array:
        """Rotate `x` `[batch, heads, 1, head_dim]` at the positions `[batch]` of a text within the form's limit."""
        return self._rotated(x, offset, self._short, self._short_scale)

    def _at(self, length: int) -> tuple[mx.array, float]:
        """The periods by which MLX divides positions, `[dims / 2]`, and the scale in a text of `length` positions."""
        periods = [1 / frequency for frequency in self.form.inverse_frequencies(length)]
        return mx.array(periods, mx.float32), self.form.scale(length)

    def _rotated(self, x: mx.array, offset: int | mx.array, periods: mx.array, scale: float) -> mx.array:
        if scale != 1.0:
            x = x.at[..., : self.dims].multiply(scale)
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=1.0, offset=offset, freqs=periods
        )


@contextlib.contextmanager
def text_length(model: nn.Module, length: int) -> Iterator[None]:
    """A context in which a text of `length` tokens passes through `model` in parts, with the frequencies of the full text."""
    changed = [m for m in model.modules() if isinstance(m, RotaryEmbedding) and m.form.limit is not None]
    for module in changed:
        module.text_length = length
    try:
        yield
    finally:
        for module in changed:
            module.text_length = 0


_CACHE_DROPPED = frozenset(("phi3", "phimoe"))
"""Families that transformers recomputes from the first token when a text reaches LongRoPE's limit."""


def recomputed_beyond(config: Mapping[str, Any]) -> int | None:
    """The number of tokens at which a family drops its cache, since all frequencies change; None if it keeps the cache."""
    known = transformers_config(config) if config.get("model_type") in _CACHE_DROPPED else None
    parameters = getattr(known, "rope_parameters", None) or {}
    limit = parameters.get("original_max_position_embeddings") if parameters.get("rope_type") == "longrope" else None
    return limit if type(limit) is int else None


def correct_rotary(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Replace each rotary module of an unsplit mlx-lm model by one of the form that transformers reads from the config.

    Forms that transformers does not support, and plain forms that mlx-lm computes correctly, keep mlx-lm's module.

    Args:
        model: The model, modified in place.
        config: The config of the model.

    Raises:
        ModelError: The parameters of the form are invalid.
    """
    known = transformers_config(config)
    known = known.get_text_config() if known is not None else None
    parameters = getattr(known, "rope_parameters", None)
    if not isinstance(parameters, Mapping) or not parameters:
        return
    modules = named_modules(model)
    layers, _ = find_layers(list(modules))
    for path, module in modules.items():
        dims = rotated_dims(module)
        own = _of_layer(parameters, getattr(known, "layer_types", None), path, layers)
        if dims is None or own is None or own.get("rope_type", "default") not in KINDS:
            continue
        form = Rotary(dims, own, int(getattr(known, "max_position_embeddings", 0) or 0))
        if not _is_plainly(module, form):
            set_module(model, path, RotaryEmbedding(form, bool(getattr(module, "traditional", False))))


def _of_layer(parameters: Mapping[str, Any], kinds: Any, path: str, layers: str) -> Mapping[str, Any] | None:
    """The rotary parameters of a module's layer; None if transformers has none for it."""
    nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    if not nested:
        return parameters
    number = path.removeprefix(f"{layers}.").partition(".")[0]
    if not path.startswith(f"{layers}.") or not number.isdigit() or not isinstance(kinds, (list, tuple)):
        return None
    kind = kinds[int(number)] if int(number) < len(kinds) else None
    own = nested.get(kind) if isinstance(kind, str) else None
    # transformers reads YaRN's truncate beside the layer types, not inside them.
    return {**own, "truncate": parameters.get("truncate", True)} if own is not None else None


def _is_plainly(module: nn.Module, form: Rotary) -> bool:
    """Whether a module is MLX's own and already computes this plain form."""
    return (
        form.kind == "default"
        and type(module) is nn.RoPE
        and module.scale == 1.0
        and module.base == form.parameters.get("rope_theta")
    )
