"""Comparison of a split computation with the unsplit one, in MLX."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from partita.core.sharding.split import Range
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.groups import init

EXACT = 1e-12
"""Relative error allowed in float64: sums over the ranks are made in another order, which costs a few units of 1e-16."""

SINGLE = 1e-5
"""Relative error allowed in float32, whose units are 6e-8."""


def assert_equal(actual: mx.array | None, expected: mx.array | None, tolerance: float = EXACT, what: str = "") -> None:
    """`actual` is `expected` up to `tolerance` of its largest magnitude; 0 asks for the same bits."""
    assert actual is not None, f"{what}: nothing came out"
    assert expected is not None, f"{what}: nothing was expected"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    mx.eval(actual)  # also where it is empty: the other ranks wait for this one
    if expected.size == 0:
        return
    assert not mx.isnan(expected).any().item(), f"{what}: the expected array holds NaN"
    if tolerance == 0:
        assert mx.array_equal(actual, expected).item(), f"{what}: not the same bits"
        return
    wide = expected.astype(mx.float64)
    error = mx.abs(actual.astype(mx.float64) - wide).max() / mx.maximum(mx.abs(wide).max(), 1e-30)
    assert error.item() <= tolerance, f"{what}: relative error {error.item():.3g} is over {tolerance:.3g}"


def world(**options: bool) -> Communicator:
    """All ranks of the pool, or this process alone."""
    return init(**options)


def draw(*shape: int, dtype: mx.Dtype = mx.float64) -> mx.array:
    """Normal numbers, the same on every rank, as all are seeded alike."""
    return mx.random.normal(shape).astype(dtype)


def part(whole: mx.array, axis: int, ranges: Sequence[Range]) -> mx.array:
    """What lies in `ranges` of an axis."""
    rows = mx.moveaxis(whole, axis, 0)
    return mx.moveaxis(mx.concatenate([rows[a:b] for a, b in ranges] or [rows[:0]]), 0, axis)
