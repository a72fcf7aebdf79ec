"""Rotary position embeddings as data: the frequencies and the scale of each form that transformers has.

Pair `i` of the `dims / 2` pairs of a head is rotated by `position * inverse_frequencies[i]` and multiplied by `scale`. The
forms are those of transformers' `modeling_rope_utils`: default, linear, dynamic NTK, YaRN (arXiv 2309.00071), LongRoPE (arXiv
2402.13753) and Llama 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from partita.errors import ModelError

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""The values of `rope_type` that are computed here."""


@dataclass(frozen=True)
class Rotary:
    """One form of rotary embeddings.

    Attributes:
        dims: Elements of a head that are rotated.
        parameters: `rope_parameters` as transformers 5 standardizes them: `rope_type`, `rope_theta` and the form's own keys.
        max_positions: `max_position_embeddings` of the config.
    """

    dims: int
    parameters: Mapping[str, Any] = field(hash=False)
    max_positions: int = 0

    @property
    def kind(self) -> str:
        """The form's name."""
        return str(self.parameters.get("rope_type") or "default")

    @property
    def limit(self) -> int | None:
        """The longest text in positions whose frequencies and scale do not depend on its length; None if they never do."""
        if self.kind == "dynamic":
            return self.max_positions
        return int(self._number("original_max_position_embeddings")) if self.kind == "longrope" else None

    def inverse_frequencies(self, length: int) -> list[float]:
        """The frequencies in a text of `length` positions, in radians a position, `[dims / 2]`.

        Raises:
            ModelError: The form is unknown, or its parameters do not make frequencies.
        """
        base = self._number("rope_theta")
        if self.kind == "dynamic":
            stretched = self._number("factor") * max(length, self.max_positions) / self.max_positions
            base *= (stretched - (self._number("factor") - 1)) ** (self.dims / (self.dims - 2))
        plain = [base ** -(2 * i / self.dims) for i in range(self.dims // 2)]
        if self.kind in ("default", "dynamic"):
            return plain
        if self.kind == "linear":
            return [frequency / self._number("factor") for frequency in plain]
        if self.kind == "yarn":
            return self._yarn(plain)
        if self.kind == "llama3":
            return [self._llama3(frequency) for frequency in plain]
        if self.kind == "longrope":
            return [frequency / factor for frequency, factor in zip(plain, self._factors(length), strict=True)]
        raise ModelError(f"rope_type must be one of {', '.join(KINDS)}; got {self.kind!r}.")

    def scale(self, length: int) -> float:
        """The factor of rotated queries and keys in a text of `length` positions."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.kind == "longrope" and "short_mscale" in self.parameters:
            return self._number("long_mscale" if self._is_long(length) else "short_mscale")
        given = self.parameters.get("attention_factor")
        if given is not None:
            return float(given)
        factor = self._factor()
        if self.kind == "longrope":
            original = self._number("original_max_position_embeddings")
            return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        over, under = self.parameters.get("mscale"), self.parameters.get("mscale_all_dim")
        return _yarn_scale(factor, over) / _yarn_scale(factor, under) if over and under else _yarn_scale(factor, 1.0)

    def _number(self, key: str) -> float:
        value = self.parameters.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ModelError(f"the rotary form {self.kind!r} needs the number {key}; the config has {value!r}.")
        return value

    def _factor(self) -> float:
        if self.parameters.get("factor") is not None:
            return self._number("factor")
        return self.max_positions / self._number("original_max_position_embeddings")

    def _is_long(self, length: int) -> bool:
        return length > self._number("original_max_position_embeddings")

    def _factors(self, length: int) -> Sequence[float]:
        # PhiMoE chooses its scale by the length, but always uses short_factor (transformers 5.24).
        long = self._is_long(length) and "short_mscale" not in self.parameters
        key = "long_factor" if long else "short_factor"
        factors = self.parameters.get(key)
        if not isinstance(factors, (list, tuple)) or len(factors) != self.dims // 2:
            count = len(factors) if isinstance(factors, (list, tuple)) else repr(factors)
            raise ModelError(
                f"{key} must hold a number for each of the {self.dims // 2} pairs that are rotated; got {count}."
            )
        return factors

    def _yarn(self, plain: Sequence[float]) -> list[float]:
        """Keep pairs below `low`, divide the frequencies of pairs above `high` by the factor, and interpolate between them."""
        original = self._number("original_max_position_embeddings")

        def pair(rotations: float) -> float:
            """The fractional index of the pair that makes this many rotations within the original length."""
            turned = math.log(original / (rotations * 2 * math.pi))
            return self.dims * turned / (2 * math.log(self._number("rope_theta")))

        low = pair(self.parameters.get("beta_fast") or 32)
        high = pair(self.parameters.get("beta_slow") or 1)
        if self.parameters.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dims - 1)
        high = high + 0.001 if low == high else high
        shares = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(self.dims // 2)]
        return [f * (1 - share) + f / self._factor() * share for f, share in zip(plain, shares, strict=True)]

    def _llama3(self, frequency: float) -> float:
        low, high = self._number("low_freq_factor"), self._number("high_freq_factor")
        turns = self._number("original_max_position_embeddings") * frequency / (2 * math.pi)
        if turns > high:
            return frequency
        if turns < low:
            return frequency / self._number("factor")
        share = (turns - low) / (high - low)
        return (1 - share) * frequency / self._number("factor") + share * frequency


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
