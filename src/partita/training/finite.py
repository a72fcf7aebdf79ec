"""The error for a loss or gradient that is not finite: what each rank knows of it, and one message of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from partita.errors import DivergedError
from partita.ranks.agreement import Gathers
from partita.training.settings import TrainSettings


@dataclass(frozen=True)
class Fault:
    """What is not finite on a rank.

    Attributes:
        rank: Its number.
        replica: Its replica.
        microbatches: Micro-batches of that replica whose loss is not finite; only the rank with the loss knows them.
        tensor: The last tensor of the model whose gradient, before replicas are summed, is not finite: backward passes it on to
            those before.
    """

    rank: int
    replica: int
    microbatches: tuple[int, ...] = ()
    tensor: str | None = None


def diverged(
    step: int, loss: float, norm: float, settings: TrainSettings, replicas: int, faults: Sequence[Fault]
) -> DivergedError:
    """The error of step `step`, counted from 0; the same on every rank for the same faults."""
    lossy = [fault for fault in faults if fault.microbatches]
    graded = [fault for fault in faults if fault.tensor is not None]
    found = lossy or graded
    worst = next((fault for fault in reversed(graded) if fault.replica == graded[0].replica), None)
    each = settings.batch_size // replicas
    row = each // settings.microbatches
    first = step * settings.batch_size
    if lossy:
        places = sorted({(f.replica * settings.microbatches + m) * row for f in lossy for m in f.microbatches})
        spans = [(first + place, first + place + row) for place in places]
    else:
        spans = [(first + r * each, first + (r + 1) * each) for r in sorted({f.replica for f in found})]
    where = [
        f"replica {replica} ({_ranks([f.rank for f in found if f.replica == replica])})"
        for replica in sorted({fault.replica for fault in found})
    ]
    what = f"the loss is {loss}" if lossy else f"the loss is {loss} and the gradient's norm {norm}"
    tensor = (
        f"; the gradient of {worst.tensor} on rank {worst.rank} is not finite"
        if worst is not None and not lossy
        else ""
    )
    return DivergedError(
        f"step {step + 1}: {what}, on {' and '.join(where) or 'all replicas'}, in the run's samples "
        f"{_joined(spans or [(first, first + settings.batch_size)])} (counted from 0){tensor}. The weights are those of step "
        f"{step}. Lower the learning rate ({settings.learning_rate:g}) or clip_norm ({settings.clip_norm:g}), look at these "
        "samples, or train in a wider dtype."
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _joined(spans: Sequence[tuple[int, int]]) -> str:
    """Half open ranges as text, neighbours joined: `8-11, 14`."""
    merged: list[list[int]] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1][1] = stop
        else:
            merged.append([start, stop])
    return ", ".join(str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in merged)


def gathered_faults(axes: Sequence[Gathers], fault: Fault) -> list[Fault]:
    """The faults of all ranks, in the order of their numbers, on every rank."""
    values: list[Any] = [[fault.rank, fault.replica, list(fault.microbatches), fault.tensor]]
    for comm in axes:
        values = [one for some in comm.all_gather_object(values) for one in some]
    return [Fault(rank, replica, tuple(numbers), tensor) for rank, replica, numbers, tensor in values]
