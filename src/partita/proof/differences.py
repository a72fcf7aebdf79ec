"""The differences between a split model and the unsplit one over all ranks, in the same form on both engines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from partita.ranks.groups import Communicator

KINDS = ("module", "output", "gradient", "shard", "parameter")

SMALL = 1e-3
"""Parameters and gradients are compared relative to no less than this fraction of the model's largest: the gradient of a key's
bias is zero in exact arithmetic, and rounding, which grows with the attention's scores, is all that is left of it."""


@dataclass(frozen=True)
class Difference:
    """The difference of one value of the split model from the unsplit one's, relative to its largest magnitude.

    Attributes:
        kind: One of `KINDS`.
        name: The module's or parameter's path in the unsplit model.
        error: The largest over all ranks; infinite if the value is missing or not a number on one side only.
    """

    kind: str
    name: str
    error: float


def largest_of_ranks(
    mine: Iterable[Difference], axes: Sequence[Communicator], names: Sequence[str], missing: Iterable[str] = ()
) -> list[Difference]:
    """The largest error of each value over all ranks of a replica, by kind and in the order of `names`.

    Args:
        mine: The differences on this rank.
        axes: The tensor and the pipeline group.
        names: The paths of modules and parameters in the order of execution.
        missing: The gradients that the unsplit model has; one that no rank has is infinitely far from it.
    """
    found = [(d.kind, d.name, d.error) for d in mine]
    for comm in axes:
        merged: dict[tuple[str, str], float] = {}
        for part in comm.all_gather_object(found):
            for kind, name, error in part:
                known = merged.get((kind, name), -1.0)
                # NaN counts as larger than any number, and is kept.
                if error != error or error > known:
                    merged[kind, name] = error
        found = [(kind, name, error) for (kind, name), error in merged.items()]
    places = {name: place for place, name in enumerate(names)}
    here = {name for kind, name, _ in found if kind == "gradient"}
    found += [("gradient", name, float("inf")) for name in missing if name not in here]
    found.sort(key=lambda one: (KINDS.index(one[0]), places.get(one[1], 0)))
    return [Difference(*one) for one in found]


def first_wrong(differences: Iterable[Difference], tolerance: float) -> Difference | None:
    """The first difference above `tolerance`, in order of execution."""
    return next((d for d in differences if not d.error <= tolerance), None)
