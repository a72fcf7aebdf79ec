"""The rule for the model's own dtype: a split model may have at most twice the rounding error of the unsplit one.

Both run in the same dtype from the same stored weights, and the errors of both are measured against the unsplit model in
float64. An error is the root mean square over all elements of a tensor and all ranks that hold it. The largest error of one
element is not suitable: it depends on the order of a few sums, and by chance is more than twice as large in one of two models
that round equally well. For a sum of two rounded parts the expected root mean square is sqrt(2) times larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

FACTOR = 2.0
"""The allowed ratio of the split model's error to the unsplit model's."""

SMALL = 1e-3
"""Errors are relative to no less than this fraction of the largest tensor of the same kind, since the gradient of a key's bias
is zero in exact arithmetic and rounding is all that is left of it."""


SAMPLES = 16
"""The largest number of samples before an error counts as more than rounding."""

REPEATS = 8
"""The largest number of times that the unsplit model is trained again before a difference counts as more than rounding."""


@dataclass(frozen=True)
class Rounding:
    """One tensor in three runs: sums of squares over its elements on all ranks.

    Attributes:
        kind: `module`, `output`, `gradient`, `loss` or `parameter`.
        name: Its path in the unsplit model.
        elements: The number of elements.
        exact: The sum of squares of the float64 values.
        unsplit: The sum of squares of the unsplit model's errors.
        split: The sum of squares of the split model's errors; infinite or not a number if it has no such value.
    """

    kind: str
    name: str
    elements: int
    exact: float
    unsplit: float
    split: float

    def __add__(self, other: Rounding) -> Rounding:
        """The same tensor on more ranks."""
        return replace(
            self,
            elements=self.elements + other.elements,
            exact=self.exact + other.exact,
            unsplit=self.unsplit + other.unsplit,
            split=self.split + other.split,
        )


@dataclass(frozen=True)
class Judged:
    """The error of a split tensor and the largest error that is allowed, both relative to the tensor's magnitude."""

    kind: str
    name: str
    error: float
    allowed: float


@dataclass
class Measured:
    """The result of a comparison in the model's own dtype, the same on every rank.

    Attributes:
        judged: Modules in the order in which they ran, the output, then gradients.
        dtypes: Modules whose outputs have another dtype in the split model, with both dtypes, and `the model` for its output.
        outputs: Number of outputs whose dtypes were compared.
    """

    judged: list[Judged]
    dtypes: dict[str, str]
    outputs: int

    def first_wrong(self, dtype: str) -> str:
        """The first wrong dtype, or rounding error above the limit of `dtype`, in words; empty if all is right."""
        for path, dtypes in self.dtypes.items():
            return f"the output of {path} is {dtypes}."
        for one in self.judged:
            if not one.error <= one.allowed:
                error, allowed = f"{one.error:.1e}", f"{one.allowed:.1e}"
                return f"the {one.kind} {one.name} is rounded by {error} in {dtype}, where {allowed} is allowed."
        return ""


def add_ranks(ranks: Iterable[Sequence[Rounding]]) -> list[Rounding]:
    """The measurements of several ranks as one, in the order in which they are first seen."""
    total: dict[tuple[str, str], Rounding] = {}
    for one in (one for rank in ranks for one in rank):
        key = one.kind, one.name
        total[key] = total[key] + one if key in total else one
    return list(total.values())


def judge(measured: Sequence[Rounding], unit_roundoff: float) -> list[Judged]:
    """Compare each error with the one that is allowed.

    The limit is twice the unsplit model's own error of the same tensor. A small tensor may be rounded well by chance, so
    no limit is below the median of its kind, nor below one rounding.

    Args:
        measured: All tensors of a comparison.
        unit_roundoff: The largest relative error of one rounding in the dtype.
    """
    judged = []
    for kind in dict.fromkeys(one.kind for one in measured):
        tensors = [one for one in measured if one.kind == kind]
        largest = max((_mean(one.exact, one) for one in tensors), default=0.0)
        scales = [max(_mean(one.exact, one), SMALL * largest) or 1.0 for one in tensors]
        own = [_mean(one.unsplit, one) / scale for one, scale in zip(tensors, scales, strict=True)]
        usual = median(own)
        judged += [
            Judged(kind, one.name, _mean(one.split, one) / scale, max(FACTOR * max(error, usual), unit_roundoff))
            for one, scale, error in zip(tensors, scales, own, strict=True)
        ]
    return judged


def judge_trained(
    measured: Sequence[Rounding], again: Callable[[int], Sequence[Rounding]], unit_roundoff: float
) -> list[Judged]:
    """Compare the errors of trained models with those that are allowed, as `judge`, but with a fair sample of the unsplit's.

    Each step of training amplifies the rounding of the steps before it, and one amplified direction makes up the error of all
    parameters. So the errors of two equally good models differ by any factor. Where one is over its limit, the unsplit model is
    trained again from weights that differ in the last bit, and its largest error of all runs counts.

    Args:
        measured: All losses and parameters.
        again: Trains the unsplit model from weights that the given seed changes by one rounding, and measures it.
        unit_roundoff: See `judge`.
    """
    judged = judge(measured, unit_roundoff)
    for seed in range(1, REPEATS + 1):
        wrong = [one.error for one in judged if not one.error <= one.allowed]
        if not wrong or not all(map(math.isfinite, wrong)):
            break
        errors = {(one.kind, one.name): one.unsplit for one in again(seed)}
        measured = [replace(one, unsplit=max(one.unsplit, errors[one.kind, one.name])) for one in measured]
        judged = judge(measured, unit_roundoff)
    return judged


def _mean(squares: float, one: Rounding) -> float:
    return math.sqrt(squares / one.elements) if one.elements else 0.0
