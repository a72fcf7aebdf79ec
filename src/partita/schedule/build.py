"""`build` makes the schedule of a kind: what each rank computes, in order.

A pattern is the (stage, kind) of a rank's actions. The micro-batches of a stage pass through it in their order, so
`_numbered` finds them by counting. A pattern that needs more micro-batches than there are is made with more, and the
actions of the surplus are dropped: no action depends on one of another micro-batch, so what is left stays valid.

Letters: p ranks, v virtual stages of a rank, m micro-batches, r a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from partita.core.layout.placement import Placement, stage_at
from partita.errors import ScheduleError
from partita.schedule.action import Action, Kind, Schedule

F, B, W, BW = Kind.F, Kind.B, Kind.W, Kind.BW
Pattern = Iterator[tuple[int, Kind]]

KINDS: dict[str, str] = {
    "gpipe": "all forwards, then all backwards (1811.06965)",
    "1f1b": "one forward, one backward, at most pp micro-batches alive (2006.09503)",
    "interleaved-1f1b": "1F1B with several virtual stages a rank, a bubble that many times smaller (2104.04473)",
    "zb-h1": "1F1B with weight gradients put off: about a third of its bubble, pp micro-batches alive (2401.10241)",
    "zb-h2": "zb-h1 with twice the warm-up: hardly a bubble in a rank's span, 2 pp - 1 micro-batches alive (2401.10241)",
    "zb-v": "two stages a rank in a V: hardly a bubble in a rank's span, as much alive as 1F1B (2401.10241)",
    "forward-only": "forwards alone, for evaluation",
}
"""The kinds of schedules, each in a line."""

MAX_PASSES = 2_000_000
"""Micro-batches times stages at most: such a schedule takes about a gigabyte."""

_SEVERAL = {"interleaved-1f1b": 2, "zb-v": 2, "forward-only": 1}  # default vpp of kinds that may have more than 1


def build(kind: str, pp: int, microbatches: int, vpp: int | None = None, *, group_size: int | None = None) -> Schedule:
    """The schedule of a kind: forwards and backwards only; `lower` adds sends and receives.

    Args:
        kind: One of `KINDS`.
        pp: Pipeline ranks.
        microbatches: Micro-batches of a step; any number, also fewer than `pp`.
        vpp: Virtual stages of a rank; None for the kind's usual number.
        group_size: For interleaved-1f1b: micro-batches that run on a virtual stage before the next one's turn, at
            least `pp`, the default (Megatron-LM's microbatch_group_size_per_vp_stage).

    Raises:
        ScheduleError: The schedule does not exist (see `check_kind`).

    Examples:
        >>> print(build("1f1b", pp=2, microbatches=3))
        0F0,0F1,0BW0,0F2,0BW1,0BW2
        1F0,1BW0,1F1,1BW1,1F2,1BW2
        <BLANKLINE>
    """
    check_kind(kind, pp, microbatches, vpp, group_size)
    v = vpp_of(kind, vpp)
    patterns = (_pattern(kind, pp, v, rank, microbatches, group_size or pp) for rank in range(pp))
    return Schedule(tuple(_numbered(pattern, microbatches) for pattern in patterns))


def orders(kind: str, pp: int, microbatches: int, vpp: int | None = None) -> Iterator[list[tuple[int, Kind]]]:
    """For each rank the stages and kinds of the actions that `build` gives it, without the numbers of their micro-batches."""
    check_kind(kind, pp, microbatches, vpp)
    v = vpp_of(kind, vpp)
    actions = v * microbatches * (3 if kind.startswith("zb") else 1 if kind == "forward-only" else 2)
    for rank in range(pp):
        pattern = list(_pattern(kind, pp, v, rank, microbatches, pp))
        has_surplus = len(pattern) > actions
        yield (
            [(stage, action) for stage, action, _ in _numbered(iter(pattern), microbatches)] if has_surplus else pattern
        )


def check_kind(kind: str, pp: int, microbatches: int, vpp: int | None = None, group_size: int | None = None) -> None:
    """Raise an error for arguments that `build` does not support.

    Raises:
        ScheduleError: The kind is unknown, a number is too small, or an argument is not for this kind.
    """
    if kind not in KINDS:
        near = get_close_matches(str(kind).lower().replace("_", "-"), KINDS, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        raise ScheduleError(f"kind {kind!r} is not known. {meant}The kinds are {', '.join(KINDS)}.")
    for name, number in (("pp", pp), ("microbatches", microbatches), ("vpp", vpp), ("group_size", group_size)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ScheduleError(f"{name} must be a whole number of at least 1, but is {number!r}.")
    if kind == "zb-v" and vpp not in (None, 2):
        raise ScheduleError(f"zb-v has two stages on every rank, but vpp is {vpp}. Leave vpp out.")
    if kind not in _SEVERAL and vpp not in (None, 1):
        raise ScheduleError(
            f"{kind} has one stage on every rank, but vpp is {vpp}. Leave it out, or use interleaved-1f1b."
        )
    if group_size is not None and kind != "interleaved-1f1b":
        raise ScheduleError(
            f"group_size ({group_size}) is for interleaved-1f1b only, and the kind is {kind}. Leave it out."
        )
    if group_size is not None and group_size < pp:
        raise ScheduleError(
            f"group_size must be at least pp ({pp}), or ranks would wait for their own outputs, but is {group_size}."
        )
    if (passes := pp * vpp_of(kind, vpp) * microbatches) > MAX_PASSES:
        raise ScheduleError(
            f"pp x vpp x microbatches must come to at most {MAX_PASSES:,}, but {pp} x {vpp_of(kind, vpp)} x {microbatches} is "
            f"{passes:,}. Use fewer microbatches."
        )


def placement_of(kind: str) -> Placement:
    """The placement of the stages of a kind on the ranks (`core.layout.placement`)."""
    return "v" if kind == "zb-v" else "loop"


def vpp_of(kind: str, vpp: int | None) -> int:
    """The virtual stages of a rank: `vpp`, or the kind's usual number."""
    return _SEVERAL.get(kind, 1) if vpp is None else vpp


def _pattern(kind: str, p: int, v: int, r: int, m: int, group_size: int) -> Pattern:
    if kind == "gpipe":
        return _one_forward_one_backward(r, m, warm_up=m)
    if kind == "1f1b" or (kind == "interleaved-1f1b" and v == 1):
        return _one_forward_one_backward(r, m, warm_up=p - 1 - r)
    if kind == "interleaved-1f1b":
        return _interleaved(p, v, r, m, group_size)
    if kind == "zb-h1":
        return _zero_bubble(r, m, warm_up=p - 1 - r, delay=r)
    if kind == "zb-h2":
        return _zero_bubble(r, m, warm_up=2 * (p - 1 - r), delay=2 * r)
    if kind == "zb-v":
        return _zero_bubble_v(p, r, m)
    return ((stage, F) for stage in _turns(p, v, r, m, group_size))


def _numbered(pattern: Pattern, microbatches: int) -> tuple[Action, ...]:
    """The actions of a pattern, each with the next micro-batch of its stage and kind; surplus micro-batches are dropped."""
    counts: dict[tuple[int, Kind], int] = {}
    actions = []
    for place in pattern:
        counts[place] = number = counts.get(place, -1) + 1
        if number < microbatches:
            actions.append(Action(place[0], place[1], number))
    return tuple(actions)


def _one_forward_one_backward(stage: int, m: int, warm_up: int) -> Pattern:
    """`warm_up` forwards, then one forward and one backward in turn, then the remaining backwards."""
    for step in range(m + warm_up):
        if step < m:
            yield stage, F
        if step >= warm_up:
            yield stage, BW


def _zero_bubble(stage: int, m: int, warm_up: int, delay: int) -> Pattern:
    """1F1B with split backwards: the weight gradient of a micro-batch comes `delay` input gradients after its own."""
    for step in range(m + warm_up + delay):
        if step < m:
            yield stage, F
        if warm_up <= step < m + warm_up:
            yield stage, B
        if step >= warm_up + delay:
            yield stage, W


def _zero_bubble_v(p: int, r: int, m: int) -> Pattern:
    """The hand-made V schedule for F = B = W (2401.10241, section 6): stage `down` before the turn, `up` after it."""
    down, up = stage_at("v", p, r, 0), stage_at("v", p, r, 1)
    m = max(m, 2 * p - 1)  # the number of micro-batches that pass `down` before the first reaches `up`
    yield from [(down, F)] * (2 * (p - r) - 1)
    yield from [(up, F), (down, F)] * r
    yield from [(up, F), (up, B), (up, W)] * (p - r)
    for step in range(m - p):
        if step < m - (2 * p - 1 - r):
            yield down, F
        yield from [(down, B), (down, W), (up, F), (up, B), (up, W)]
    yield from [(down, B), (up, B)] * r
    yield from [(down, B), (down, W)] * (p - r)
    yield from [(up, W)] * r
    yield from [(down, W)] * r


def _interleaved(p: int, v: int, r: int, m: int, group_size: int) -> Pattern:
    """1F1B over virtual stages, which take turns, one group of micro-batches at a time (Megatron-LM's order)."""
    if 0 < m % group_size < p:
        m += p - m % group_size  # a group of fewer than p would return before its first micro-batch has passed
    forwards = list(_turns(p, v, r, m, group_size))
    backwards = [(v - 1 - stage // p) * p + r for stage in forwards]
    warm_up = min(2 * (p - 1 - r) + (v - 1) * group_size, len(forwards))
    for step in range(len(forwards) + warm_up):
        if step < len(forwards):
            yield forwards[step], F
        if step >= warm_up:
            yield backwards[step - warm_up], BW


def _turns(p: int, v: int, r: int, m: int, group_size: int) -> Iterator[int]:
    """The stages of rank r in the order of their forwards: each group of micro-batches passes all virtual stages."""
    for first in range(0, m, group_size):
        for vpp_rank in range(v):
            yield from [stage_at("loop", p, r, vpp_rank)] * min(group_size, m - first)
