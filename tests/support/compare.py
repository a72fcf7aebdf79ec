"""Comparison of a split computation with the unsplit one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from partita.core.sharding.split import Range
from partita.torch.collectives.comm import Communicator

EXACT = 1e-12
"""Relative error allowed in float64: sums over the ranks are made in another order, which costs a few units of 1e-16."""


def assert_equal(actual: Tensor | None, expected: Tensor | None, tolerance: float = EXACT, what: str = "") -> None:
    """`actual` is `expected` up to `tolerance` of its largest magnitude; 0 asks for the same bits."""
    assert actual is not None, f"{what}: nothing came out"
    assert expected is not None, f"{what}: nothing was expected"
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    if expected.numel() == 0:
        return
    assert not expected.isnan().any(), f"{what}: the expected tensor holds NaN"
    if tolerance == 0:
        assert torch.equal(actual, expected), f"{what}: not the same bits"
        return
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.3g} is over {tolerance:.3g}"


def world() -> Communicator:
    """All ranks of the pool, or this process alone."""
    return Communicator() if dist.is_initialized() else Communicator.single()


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same on every rank, as all are seeded alike."""
    return torch.randn(shape, dtype=dtype)


def part(whole: Tensor, dim: int, ranges: tuple[Range, ...]) -> Tensor:
    """What lies in `ranges` of a dimension."""
    return torch.cat([whole.narrow(dim, a, b - a) for a, b in ranges] or [whole.narrow(dim, 0, 0)], dim)
