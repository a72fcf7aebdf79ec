"""Checkpoints at tp 2: writing and reading them, beside torch's distributed checkpoint and safetensors in one process.

Contestants write the same state in turns, from the same ranks, into folders that are not there. Reading is measured on fresh
ranks each time: from files in the page cache into memory that was never touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import checkpoint_read as reading
from bench import checkpoint_write as writing
from bench import checkpoints
from bench.contest import OnRound, Samples
from bench.ranks import Ranks
from bench.results import Setting, Table, Target, summarize

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 16000}
MIB = 1 << 20
BUFFER_BYTES = 8 * MIB
BUDGET_S = 25.0

OURS = writing.OURS
WAITED = "Partita, waited for"
DCP_WAITED = "torch DCP save"
ONE_BUFFER = "limit: one buffer of 8 MiB"
OWN_AND_BUFFER = "limit: own part + one buffer of 8 MiB"
OWN_AND_HEADERS = "limit: own part + 1 MiB"

NO_SLOWER, NO_MORE = Target(1.0, "ours no slower"), Target(1.0, "ours no more")
NO_LONGER = Target(1.0, "ours no longer")
SPEEDS = {writing.DCP: NO_SLOWER, writing.COPY: Target(0.8, "ours at least 0.8 of its bandwidth")}

WRITERS = [OURS, writing.DCP, writing.COPY, writing.FLOOR]


class _Turns:
    """What the contestants took, fact by fact: the worst rank's."""

    def __init__(self) -> None:
        self.facts: dict[str, Samples] = {}

    def add(self, name: str, told: Sequence[dict[str, float] | None]) -> None:
        """One turn, as the ranks tell it; those that waited tell nothing."""
        facts = [fact for fact in told if fact is not None]
        for key in facts[0]:
            self.facts.setdefault(key, Samples()).add(name, max(fact[key] for fact in facts))

    def of(self, fact: str, *names: str) -> Samples:
        """The samples of some contestants."""
        return Samples({name: self.facts[fact].values[name] for name in names})


def run(setting: Setting) -> list[Table]:
    """Seconds, hold-ups of training, growth of a rank's resident memory, and bytes."""
    source = setting.folder / "checkpoint"
    with setting.ranks(1) as ranks:
        size_mib = 4 * ranks.call(_make, source)[0] // MIB
    return [
        *_weights(setting, source, size_mib),
        _alone(setting, source, size_mib),
        *_run_of_training(setting, source, size_mib),
    ]


def _make(folder: Path) -> int:
    return checkpoints.make(folder, **SIZES)


def _weights(setting: Setting, source: Path, size_mib: int) -> list[Table]:
    """Weights alone, at tp 2: on disk when the turn ends, and left to the system."""
    title, place = f"Writing {size_mib} MiB of weights at tp 2", setting.folder / "written"
    with setting.ranks(2) as ranks:
        own = max(ranks.call(writing.set_up, source, None))
        synced = _write(setting, title, ranks, WRITERS, source, lambda name: place, is_durable=True)
        cached = _write(setting, f"{title}, no fsync", ranks, WRITERS, source, lambda name: place, is_durable=False)
    growth, written = synced.of("growth", OURS, writing.DCP, writing.COPY), synced.of("written", OURS, writing.DCP)
    growth.values[ONE_BUFFER] = [BUFFER_BYTES] * len(growth.values[OURS])
    written.values[OWN_AND_HEADERS] = [own + MIB] * len(growth.values[OURS])
    return [
        _seconds("checkpoint-write", f"{title}: on disk", synced.of("seconds", *WRITERS), SPEEDS),
        _seconds("checkpoint-write-cached", f"{title}: in the page cache", cached.of("seconds", *WRITERS), SPEEDS),
        _mib("checkpoint-write-memory", f"{title}: peak growth of a rank", growth, ONE_BUFFER),
        _mib("checkpoint-write-bytes", f"{title}: written by a rank", written, OWN_AND_HEADERS),
    ]


def _alone(setting: Setting, source: Path, size_mib: int) -> Table:
    """The same by one process."""
    title, place = f"Writing {size_mib} MiB of weights by one process", setting.folder / "written"
    with setting.ranks(1) as ranks:
        ranks.call(writing.set_up, source, None)
        synced = _write(setting, title, ranks, WRITERS, source, lambda name: place, is_durable=True)
    return _seconds("checkpoint-write-alone", f"{title}: on disk", synced.of("seconds", *WRITERS), SPEEDS)


def _run_of_training(setting: Setting, source: Path, size_mib: int) -> list[Table]:
    """Weights and moments: saved by a run, and read again to go on."""
    title = f"A run's checkpoint of {3 * size_mib} MiB, with moments, at tp 2"
    names = [OURS, writing.SMALL_FILES, writing.BARE, writing.DCP, writing.DCP_ASYNC, writing.COPY, writing.FLOOR]
    runs, place = setting.folder / "run", setting.folder / "written"
    ours, theirs = setting.folder / "ours", setting.folder / "theirs"
    with setting.ranks(2) as ranks:
        own = max(ranks.call(writing.set_up, source, runs))

        def where(name: str) -> Path:
            if name not in (OURS, writing.SMALL_FILES, writing.BARE):
                return place
            return runs / f"step-{ranks.call(writing.next_step)[0]:06d}"

        saved = _write(setting, title, ranks, names, source, where, is_durable=True)
        for name, kept in ((OURS, ours), (writing.DCP, theirs)):
            there = where(name)
            ranks.call(writing.write, name, there, True)
            there.rename(kept)
    seconds, held = saved.facts["seconds"].values, saved.facts["held"].values
    hold_up = {OURS: held[OURS], WAITED: seconds[OURS]}
    hold_up |= {writing.DCP_ASYNC: held[writing.DCP_ASYNC], DCP_WAITED: seconds[writing.DCP]}
    held_targets = {writing.DCP_ASYNC: NO_LONGER, WAITED: NO_LONGER}
    growth = saved.of("growth", OURS, writing.DCP, writing.DCP_ASYNC)
    growth.values[OWN_AND_BUFFER] = [own + BUFFER_BYTES] * len(growth.values[OURS])
    speeds = {**SPEEDS, writing.DCP_ASYNC: NO_SLOWER}
    still = f"{title}: training stands still"
    return [
        _seconds("checkpoint-save", f"{title}: on disk", saved.of("seconds", *names), speeds),
        summarize("checkpoint-hold", still, "ms", 1e3, Samples(hold_up), OURS, held_targets),
        _mib("checkpoint-save-memory", f"{title}: peak growth of a rank", growth, OWN_AND_BUFFER),
        *_reads(setting, f"Reading {size_mib} MiB of weights", ours, theirs, with_moments=False),
        *_reads(setting, f"Reading {3 * size_mib} MiB, with moments, to go on", ours, theirs, with_moments=True),
    ]


def _write(
    setting: Setting,
    title: str,
    ranks: Ranks,
    names: list[str],
    source: Path,
    where: Callable[[str], Path],
    *,
    is_durable: bool,
) -> _Turns:
    """Each contestant in turn writes what then is removed; before anything is timed it is read and compared."""
    turns = _Turns()

    def turn(name: str, *, counts: bool) -> None:
        place = where(name)
        told = ranks.call(writing.write, name, place, is_durable)
        if counts:
            turns.add(name, told)
        else:
            ranks.call(writing.check, name, source, place)
        ranks.call(writing.remove, place)

    with setting.work(title) as progress:
        for name in names:
            turn(name, counts=False)
        rounds, budget_s = (2, 0.0) if setting.quick else (5, BUDGET_S)
        _rounds(names, lambda name: turn(name, counts=True), progress, rounds=rounds, budget_s=budget_s)
    return turns


def _reads(setting: Setting, title: str, ours: Path, theirs: Path, *, with_moments: bool) -> list[Table]:
    title = f"{title} at tp 2 (float32, in the page cache)"
    names = [reading.OURS, reading.DCP, reading.COPY, reading.MAPPED, reading.FLOOR]
    if with_moments:
        names.insert(1, reading.VERIFIED)
    turns = _Turns()

    def turn(name: str) -> None:
        with setting.ranks(1 if name in reading.WAIT else 2) as ranks:
            turns.add(name, ranks.call(reading.read, name, ours, theirs, with_moments))

    with setting.work(title) as progress:
        _rounds(names, turn, progress, rounds=2 if setting.quick else 4)
    seconds = turns.of("seconds", *names)
    seconds.values[reading.ALONE] = turns.facts["reading"].values[reading.OURS]
    growth = Samples({OURS: turns.facts["growth"].values[reading.OURS]})
    growth.values |= turns.of("growth", reading.DCP, reading.COPY).values
    read = Samples({OURS: turns.facts["read"].values[reading.OURS], **turns.of("read", reading.DCP).values})
    read.values[OWN_AND_HEADERS] = [one + MIB for one in turns.facts["own"].values[reading.OURS]]
    name = "checkpoint-resume" if with_moments else "checkpoint-read"
    speeds = {reading.DCP: NO_SLOWER, reading.COPY: SPEEDS[writing.COPY]}
    return [
        summarize(name, title, "s", 1, seconds, reading.ALONE, speeds),
        _mib(f"{name}-memory", f"{title}: peak growth of a rank", growth, reading.DCP),
        _mib(f"{name}-bytes", f"{title}: read by a rank", read, OWN_AND_HEADERS),
    ]


def _seconds(name: str, title: str, seconds: Samples, targets: dict[str, Target]) -> Table:
    return summarize(name, title, "s", 1, seconds, OURS, targets)


def _mib(name: str, title: str, sizes: Samples, limit: str) -> Table:
    """Sizes of which ours should be no more than those of `limit`."""
    return summarize(name, title, "MiB", 1 / MIB, sizes, OURS, {limit: NO_MORE})


def _rounds(
    names: list[str], turn: Callable[[str], None], progress: OnRound, *, rounds: int, budget_s: float = 0.0
) -> None:
    """At least so many rounds of turns, until the time is over; who begins changes from round to round."""
    start, done = time.monotonic(), 0
    while done < rounds or time.monotonic() - start < budget_s:
        first = done % len(names)
        for name in names[first:] + names[:first]:
            turn(name)
        done += 1
        progress(min(1.0, done / rounds))
