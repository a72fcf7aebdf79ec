"""Master weights on disk, of either engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def masters_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The master weights among the tensors of a checkpoint, by their parameters' names."""
    return {name.removeprefix("master."): one for name, one in tensors.items() if name.startswith("master.")}


def distance(found: Mapping[str, Any], expected: Mapping[str, Any], start: Mapping[str, Any]) -> float:
    """How far two models are from each other, relative to the way that the second one has gone since `start`."""
    assert found.keys() == expected.keys()
    apart = sum(_squares(found[name], one) for name, one in expected.items())
    way = sum(_squares(start[name], one) for name, one in expected.items())
    return math.sqrt(apart / way)


def _squares(one: Any, other: Any) -> float:
    return float(np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).sum())
