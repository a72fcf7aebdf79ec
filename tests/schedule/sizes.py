"""The schedules that the tests sweep over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hypothesis import strategies as st

from partita.schedule import KINDS, Schedule, build

MAX_PP, MAX_VPP, MAX_MICROBATCHES = 8, 4, 24


class Case(NamedTuple):
    kind: str
    pp: int
    microbatches: int
    vpp: int
    group_size: int | None = None

    def build(self) -> Schedule:
        return build(self.kind, self.pp, self.microbatches, self.vpp, group_size=self.group_size)


def vpps(kind: str) -> tuple[int, ...]:
    if kind == "zb-v":
        return (2,)
    return tuple(range(1, MAX_VPP + 1)) if kind in ("interleaved-1f1b", "forward-only") else (1,)


def group_sizes(kind: str, pp: int) -> tuple[int | None, ...]:
    return (None, pp + 1, 2 * pp, 3 * pp + 2) if kind == "interleaved-1f1b" else (None,)


def every_case(kind: str, microbatches: range = range(1, MAX_MICROBATCHES + 1)) -> Iterator[Case]:
    for pp in range(1, MAX_PP + 1):
        for vpp in vpps(kind):
            for m in microbatches:
                for group_size in group_sizes(kind, pp):
                    yield Case(kind, pp, m, vpp, group_size)


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(KINDS), max_pp: int = MAX_PP, max_m: int = 24) -> Case:
    kind = draw(st.sampled_from(kinds))
    pp = draw(st.integers(1, max_pp))
    vpp, group_size = draw(st.sampled_from(vpps(kind))), draw(st.sampled_from(group_sizes(kind, pp)))
    return Case(kind, pp, draw(st.integers(1, max_m)), vpp, group_size)
