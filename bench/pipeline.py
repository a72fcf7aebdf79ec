"""A training step of a small Llama at pp 2, forward and backward of all micro-batches, schedule by schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

from bench.contest import Contest, Samples, compete
from bench.pipeline_step import ALONE, FLOOR, MICROBATCHES, PEERS, RANKS, name_of, set_up, timeline
from bench.ranks import Ranks
from bench.results import Setting, Table, Target, summarize
from partita.schedule import Costs, Timeline, build, measured_costs, simulate


def run(setting: Setting) -> list[Table]:
    """A step of each kind of schedule beside its peers, and what the simulator makes of its costs."""
    length, rounds, budget_s, predictions = (16, 2, 10.0, 2) if setting.quick else (128, 6, 150.0, 10)
    work = f"Training step at pp {RANKS}, {MICROBATCHES} micro-batches of {length} tokens"
    contest = Contest(set_up, (length,), budget_s=budget_s, rounds=rounds)
    with setting.work(work) as progress, setting.ranks(RANKS) as ranks:
        samples = compete(ranks, contest, lambda fraction: progress(0.8 * fraction))
        makespans = _makespans(ranks, predictions, lambda fraction: progress(0.8 + 0.2 * fraction))
    return [*(_steps(kind, work, samples) for kind in PEERS), _predictions(work, makespans)]


def _steps(kind: str, work: str, samples: Samples) -> Table:
    """Our step of `kind` beside its peer's, and beside the best that the schedule allows."""
    ours, peer = name_of(kind), PEERS[kind]
    names = (ours, peer, FLOOR, ALONE) if kind == "1f1b" else (ours, peer, ALONE)
    share = ideal_share(kind)
    mine = Samples({name: samples.values[name] for name in names})
    for seconds in samples.values[ALONE]:
        mine.add(f"ideal: {share} of one process", seconds * share)
    targets = {peer: Target(1.0, "ours no slower")}
    if kind == "1f1b":
        targets = {peer: Target(1 / 0.95, "ours at most 0.95 x its time")}
        targets[f"ideal: {share} of one process"] = Target(1 / 1.05, "ours at most 1.05 x")
    return summarize(f"pipeline-{kind}", f"{work}, {kind}", "ms a step", 1e3, mine, ours, targets)


def ideal_share(kind: str) -> Fraction:
    """What a step takes, of one process's time, where all actions cost the same and messages nothing."""
    schedule = build(kind, RANKS, MICROBATCHES)
    return Fraction(round(simulate(schedule, Costs()).makespan), 3 * MICROBATCHES * schedule.num_stages)


def _makespans(ranks: Ranks, rounds: int, progress: Callable[[float], None]) -> dict[str, Samples]:
    """By kind: how long a step took, and how long the simulator said by the costs of the step before."""
    found = {kind: Samples() for kind in PEERS}
    before: dict[str, Timeline] = {}
    for done in range(rounds + 1):
        for kind, samples in found.items():
            measured = ranks.call(timeline, kind)[0]
            if kind in before:
                predicted = simulate(measured.schedule, measured_costs(before[kind]))
                samples.add(f"{kind}, measured", measured.makespan)
                samples.add(f"{kind}, predicted", predicted.makespan)
            before[kind] = measured
        progress(done / rounds)
    return found


def _predictions(work: str, makespans: Mapping[str, Samples]) -> Table:
    rows = []
    for kind, samples in makespans.items():
        close = {f"{kind}, predicted": Target(0.9, "within 10% of the measured", most=1.1)}
        rows += summarize("", "", "ms", 1e3, samples, f"{kind}, measured", close).rows
    return Table("pipeline-predictions", f"{work}: makespans, measured and simulated", "ms", tuple(rows))
