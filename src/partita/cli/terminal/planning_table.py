"""The answer of the planner as text: the best plan, a table of the ten best, and why others lose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from partita.cli.arguments.planning import Question
from partita.cli.planning import as_option, options_of, seconds
from partita.cli.terminal.console import count, out, plural, size
from partita.core.model.spec import ModelSpec
from partita.core.plan import layout_of
from partita.cost.work import Estimate, MemoryUse
from partita.planner import Features, Loser, Result, seconds_of, unsupported

if TYPE_CHECKING:
    from rich.table import Table

PARTS = {
    "compute": "computing", "tp": "messages between tensor ranks", "pp": "messages between stages",
    "dp": "sums over replicas", "optimizer": "the optimizer", "bubble": "waiting in the pipeline", "other": "fixed costs",
}  # fmt: skip
"""The parts of a step in words."""


def show(spec: ModelSpec, question: Question, result: Result, features: Features) -> None:
    """Print the answer."""
    console, winner, work = out(), result.plans[0], question.work
    console.print(f"{spec.architecture or spec.family}: {count(spec.parameters)} parameters", style="bold")
    what = (
        f"training {plural(work.batch_size, 'sequence')} of {plural(work.sequence_length, 'token')} a step"
        if work.purpose == "train"
        else f"decoding {plural(work.sequences, 'sequence')} of up to {plural(work.context, 'token')}"
    )
    console.print(
        f"{what} on {plural(question.ranks, 'rank')} of {question.hardware.name}, with the kernels {question.hardware.kernels}",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    console.print(f"\nBest: {options_of(winner.arrangement)}", style="bold", soft_wrap=True)
    console.print(f"layout {layout_of(winner.arrangement.layers, winner.arrangement.mesh.pp)}", soft_wrap=True)
    for line in _facts(winner, question):
        console.print(line, soft_wrap=True)
    missing = unsupported(winner.arrangement, features)
    if missing:
        console.print(f"Partita does not execute {' and '.join(missing)}: another engine is needed.", style="yellow")
    console.print()
    console.print(_table(result.plans, question, console.width))
    lines = list(_losers(result, question))
    if lines:
        console.print("\nWhy others lose", style="bold")
        for line in lines:
            console.print(line, soft_wrap=True)
    if result.external is not None:
        needed = " ".join(unsupported(result.external.arrangement, features))
        console.print(
            f"An engine with {needed}: {_compared(result.external, winner, question)} "
            f"({options_of(result.external.arrangement)})",
            style="dim", soft_wrap=True,
        )  # fmt: skip


def _facts(one: Estimate, question: Question) -> Iterator[str]:
    rank = max(range(len(one.memory)), key=lambda r: one.memory[r].total / one.limit[r])
    if question.work.purpose == "train":
        yield (
            f"{seconds(one.step_s)} a step, {one.tokens_per_s:,.0f} tokens/s, {one.mfu:.1%} of the peak (MFU), "
            f"{one.bubble:.1%} waiting in the pipeline"
        )
    else:
        yield (
            f"{seconds(one.step_s)} a token, {one.tokens_per_s:,.0f} tokens/s; the prompts take {seconds(one.prefill_s)}"
        )
    parts = sorted(((value, name) for name, value in one.parts_s.items() if value > 0.001 * one.step_s), reverse=True)
    yield "of which " + ", ".join(f"{PARTS.get(name, name)} {seconds(value)}" for value, name in parts)
    yield f"rank {rank} is the fullest: {_memory(one.memory[rank])}, {size(one.memory[rank].total)} of {size(one.limit[rank])}"


def _memory(use: MemoryUse) -> str:
    parts = ((part.name, getattr(use, part.name)) for part in fields(use))
    return ", ".join(f"{name} {size(number)}" for name, number in parts if number)


def _table(plans: tuple[Estimate, ...], question: Question, width: int) -> Table:
    """A row for each plan. Where this is too wide, the parts of memory and what is the same in all rows are left out."""
    rows = [_row(one, question) for one in plans]
    optional = {"cp": "1", "ep": "1"}
    kinds = [name for name in rows[0] if any(row[name] != optional.get(name, "0") for row in rows)]
    needed = sum(max(len(name), *(len(row[name]) for row in rows)) + 2 for name in kinds)
    if needed > width:
        kinds = [name for name in kinds if name not in SHORT.values() and len({row[name] for row in rows}) > 1]
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name in kinds:
        table.add_column(name, no_wrap=True, justify="left" if name in ("schedule", "recompute") else "right")
    for row in rows:
        table.add_row(*(row[name] for name in kinds))
    return table


SHORT = {
    "weights": "weights", "gradients": "grads", "optimizer": "optim", "activations": "activ", "cache": "cache",
    "buffers": "buff",
}  # fmt: skip
"""The parts of memory as heads of columns."""


def _row(one: Estimate, question: Question) -> dict[str, str]:
    """A plan's column by the head: sizes, settings, time, and the memory of its fullest rank by part."""
    made, mesh = one.arrangement, one.arrangement.mesh
    row = {"tp": str(mesh.tp), "pp": str(mesh.pp), "dp": str(mesh.dp)}
    row |= {axis: str(getattr(mesh, axis)) for axis in ("cp", "ep")}
    if question.work.purpose == "train":
        row |= {
            "vpp": str(made.vpp),
            "schedule": made.schedule if mesh.pp > 1 else "-",
            "micro": str(made.microbatches),
        }
        row |= {"zero": str(made.zero), "recompute": made.recompute, "step": seconds(one.step_s)}
        row |= {"MFU": f"{one.mfu:.1%}", "bubble": f"{one.bubble:.1%}"}
    else:
        row |= {"token": seconds(one.step_s), "prompts": seconds(one.prefill_s), "tokens/s": f"{one.tokens_per_s:,.0f}"}
    fullest = max(set(one.memory), key=lambda use: use.total)
    row |= {short: _short(getattr(fullest, name)) for name, short in SHORT.items()}
    return {**row, "total": _short(fullest.total)}


def _short(number: float) -> str:
    """A number of bytes in few columns: 14.9G."""
    for exponent, unit in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if number >= 1024**exponent:
            return f"{number / 1024**exponent:.1f}{unit}"
    return str(round(number))


def _losers(result: Result, question: Question) -> Iterator[str]:
    winner = result.plans[0]
    for loser in result.losers:
        yield f"{as_option(loser.change):24} {_why(loser, winner, question)}"


def _why(loser: Loser, winner: Estimate, question: Question) -> str:
    if loser.estimate is not None:
        why, its = _compared(loser.estimate, winner, question), loser.estimate.parts_s
        more = {name: its.get(name, 0.0) - winner.parts_s.get(name, 0.0) for name in PARTS}
        worst = max(more, key=more.__getitem__)
        if more[worst] > 0 and question.optimize != "memory":
            return f"{why}: {PARTS[worst]} takes {seconds(more[worst])} more"
        return why
    closest = loser.closest
    if closest is not None:
        rank = max(range(len(closest.memory)), key=lambda r: closest.memory[r].total / closest.limit[r])
        return f"does not fit: {size(closest.memory[rank].total)} of {size(closest.limit[rank])} on rank {rank}"
    assert loser.least is not None
    return f"does not fit: at least {size(loser.least.bytes)} of {size(loser.least.limit)}"


def _compared(other: Estimate, winner: Estimate, question: Question) -> str:
    """How much slower or faster another plan is, or how much more or less memory it needs."""
    if question.optimize == "memory":
        mine, its = (float(max(use.total for use in one.memory)) for one in (winner, other))
        return f"{size(its)} instead of {size(mine)}"
    mine, its = (seconds_of(question.work, one) for one in (winner, other))
    ranks = ""
    if question.optimize == "cost":
        mine, its = mine * winner.arrangement.mesh.size, its * other.arrangement.mesh.size
        ranks = " x ranks"
    return f"{abs(its / mine - 1):.1%} {'slower' if its >= mine else 'faster'}{ranks}"
