"""The costs of a measured step, as input for the simulator."""

from __future__ import annotations

from statistics import median

from partita.schedule.action import Action, Kind
from partita.schedule.simulate import Costs
from partita.schedule.timeline import Timeline


def measured_costs(timeline: Timeline) -> Costs:
    """The median duration of each kind of action on each stage, and the median latency of a hop.

    A fused backward counts half as input and half as weight gradient. The latency is taken from transfers for which the
    receiver was waiting.
    """
    spans: dict[Action, tuple[float, float]] = {}
    durations: dict[tuple[Kind, int], list[float]] = {}
    idle_since: dict[Action, float] = {}
    for row, starts, ends in zip(timeline.schedule.ranks, timeline.starts, timeline.ends, strict=True):
        last = 0.0
        for action, start, end in zip(row, starts, ends, strict=True):
            if action.is_compute:
                spans[action] = (start, end)
                idle_since[action] = last
                durations.setdefault((action.kind, action.stage), []).append(end - start)
            last = end
    stages = range(timeline.schedule.num_stages)
    typical = {key: median(values) for key, values in durations.items()}

    def cost(kind: Kind) -> tuple[float, ...]:
        return tuple(typical.get((kind, stage), typical.get((Kind.BW, stage), 0.0) / 2) for stage in stages)

    forward = tuple(typical.get((Kind.F, stage), 0.0) for stage in stages)
    return Costs(forward, cost(Kind.B), cost(Kind.W), _latency(timeline, spans, idle_since))


def _latency(timeline: Timeline, spans: dict[Action, tuple[float, float]], idle_since: dict[Action, float]) -> float:
    rank_of = timeline.schedule.rank_of
    gaps = []
    for action, (start, _) in spans.items():
        step = -1 if action.kind is Kind.F else 1
        source = action.stage + step
        if action.kind is Kind.W or not 0 <= source < len(rank_of) or rank_of[source] == rank_of[action.stage]:
            continue
        kinds = (Kind.F,) if action.kind is Kind.F else (Kind.B, Kind.BW)
        sent = next((spans[key] for kind in kinds if (key := Action(source, kind, action.microbatch)) in spans), None)
        if sent is not None and idle_since[action] <= sent[1] <= start:
            gaps.append(start - sent[1])
    return median(gaps) if gaps else 0.0
