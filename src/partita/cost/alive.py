"""How many micro-batches of each virtual stage a schedule keeps alive at once."""

from __future__ import annotations

from functools import lru_cache
from operator import ge

from partita.core.layout.placement import home_of
from partita.schedule import Kind, orders, placement_of, vpp_of

Counts = tuple[int, ...]


def alive(kind: str, pp: int, microbatches: int, vpp: int) -> tuple[tuple[Counts, ...], ...]:
    """For each pipeline rank the counts, by virtual stage, that it reaches and that no other of its counts exceeds everywhere.

    The peak of a rank is the largest of them, weighted by the bytes of its stages. It follows from the order of the
    actions alone (`Timeline.peak_activations` for equal stages).
    """
    if kind == "gpipe":
        return (((microbatches,) * vpp,),) * pp
    if kind == "1f1b" and vpp == 1:
        return tuple(((min(microbatches, pp - rank),),) for rank in range(pp))
    return _alive(kind, pp, _enough(pp, microbatches), vpp)


@lru_cache(maxsize=1024)
def _alive(kind: str, pp: int, microbatches: int, vpp: int) -> tuple[tuple[Counts, ...], ...]:
    placement = placement_of(kind)
    last = Kind.F if kind == "forward-only" else None
    found = []
    places = [home_of(placement, pp, stage)[1] for stage in range(pp * vpp)]
    for row in orders(kind, pp, microbatches, vpp if vpp_of(kind, None) > 1 or vpp > 1 else None):
        counts = [0] * vpp
        seen: set[Counts] = {(0,) * vpp}
        grew = False
        for stage, action in row:
            place = places[stage]
            if action is Kind.F:
                counts[place] += 1
                grew = True
            if action is last or (last is None and action in (Kind.BW, Kind.W)):
                if grew:
                    seen.add(tuple(counts))
                    grew = False
                counts[place] -= 1
        found.append(_largest(seen))
    return tuple(found)


def _enough(pp: int, microbatches: int) -> int:
    """Fewer micro-batches with the same peak: a schedule repeats itself, pp micro-batches at a time, once it is warm."""
    if microbatches <= 3 * pp:
        return microbatches
    return 2 * pp + (microbatches - 1) % pp + 1


def _largest(seen: set[Counts]) -> tuple[Counts, ...]:
    """The counts that no others exceed everywhere. Of counts with the same sum none does."""
    found: list[Counts] = []
    above = 0  # how many of those found have a larger sum
    last = None
    for total, one in sorted(((sum(one), one) for one in seen), reverse=True):
        if total != last:
            above, last = len(found), total
        if not any(all(map(ge, other, one)) for other in found[:above]):
            found.append(one)
    return tuple(sorted(found))
