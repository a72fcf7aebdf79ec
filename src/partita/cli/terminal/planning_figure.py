"""A chosen plan as a picture: the memory of its ranks as stacked bars, and the timeline of a step."""

from __future__ import annotations

from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from partita.cli.arguments.planning import Question
from partita.cli.planning import options_of, seconds
from partita.cli.terminal.console import count, size
from partita.core.model.spec import ModelSpec
from partita.cost.model import ModelCost
from partita.cost.time import step
from partita.cost.work import Estimate, MemoryUse
from partita.schedule import Costs, Timeline, build, simulate
from partita.schedule.draw import draw_timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "weights": "#4472b4", "gradients": "#5c9e5c", "optimizer": "#dd8526", "activations": "#c25b4c", "cache": "#8c6bb1",
    "buffers": "#a0a0a0",
}  # fmt: skip
"""The colours of the parts of memory."""

MAX_BARS, MAX_ACTIONS = 32, 4_000
"""Bars at most; a timeline with more actions shows fewer micro-batches."""

_WIDTH, _BAR, _LEFT, _RIGHT, _TOP, _BETWEEN, _BOTTOM = 11.0, 0.28, 1.15, 0.3, 1.0, 1.0, 0.6  # inches


def draw(spec: ModelSpec, question: Question, plan: Estimate, path: Path) -> None:
    """Write the picture into a .svg or .png file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(_rows(plan))
    timeline, shown = _timeline(spec, question, plan)
    bars = max(1.2, len(rows) * _BAR)
    steps = min(4.0, max(2, plan.arrangement.mesh.pp) * 0.3) if timeline is not None else 0.0
    total = _TOP + bars + _BOTTOM + (steps + _BETWEEN if timeline is not None else 0.0)
    figure = Figure(figsize=(_WIDTH, total))
    FigureCanvasAgg(figure)
    left, width = _LEFT / _WIDTH, 1 - (_LEFT + _RIGHT) / _WIDTH
    axes = figure.add_axes((left, 1 - (_TOP + bars) / total, width, bars / total))
    _draw_memory(axes, rows)
    if timeline is not None:
        below = figure.add_axes((left, _BOTTOM / total, width, steps / total))
        draw_timeline(below, timeline, timeline.makespan, steps)
        below.set_title(shown, loc="left", fontsize=9, pad=4)
        below.set_xlabel("seconds", fontsize=9)
    model = f"{spec.architecture or spec.family}: {count(spec.parameters)} parameters"
    title = f"{model} on {question.ranks} x {question.hardware.name}"
    figure.text(left, 1 - 0.28 / total, title, fontsize=12, fontweight="bold", va="center")
    unit = "step" if question.work.purpose == "train" else "token"
    facts = f"{options_of(plan.arrangement)}: {seconds(plan.step_s)} a {unit}"
    figure.text(left, 1 - 0.52 / total, facts, fontsize=9, color="0.3", va="center")
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _rows(plan: Estimate) -> list[tuple[str, MemoryUse, int]]:
    """Name, bytes and limit of each bar: neighbouring ranks of a replica that hold the same share one if there are many."""
    mesh = plan.arrangement.mesh
    replica = len(plan.memory) // mesh.dp
    each = [(rank, plan.memory[rank], plan.limit[rank]) for rank in range(replica)]
    if replica <= MAX_BARS:
        return [(f"rank {rank}", use, limit) for rank, use, limit in each]
    found = []
    for (use, limit), alike in groupby(each, key=lambda one: one[1:]):
        ranks = [rank for rank, _, _ in alike]
        found.append((f"ranks {ranks[0]}-{ranks[-1]}", use, limit))
    return found


def _draw_memory(axes: Axes, rows: list[tuple[str, MemoryUse, int]]) -> None:
    from matplotlib.patches import Patch

    unit = 1024.0**3 if max(limit for _, _, limit in rows) >= 1024**3 else 1024.0**2
    for y, (_, use, limit) in enumerate(rows):
        x = 0.0
        for part in fields(MemoryUse):
            width = getattr(use, part.name) / unit
            axes.barh(y, width, left=x, height=0.74, color=COLOURS[part.name], edgecolor="white", linewidth=0.4)
            x += width
        axes.text(x, y, f" {size(use.total)}", fontsize=8, va="center")
        axes.plot([limit / unit] * 2, [y - 0.45, y + 0.45], color="0.2", linewidth=1.2)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(max(use.total, limit) for _, use, limit in rows) / unit * 1.12)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.tick_params(labelsize=8, length=0, axis="y")
    axes.tick_params(labelsize=8, length=3, axis="x")
    axes.set_xlabel(
        "GiB of a rank; the line is its limit" if unit > 1e9 else "MiB of a rank; the line is its limit", fontsize=9
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    used = [part.name for part in fields(MemoryUse) if any(getattr(use, part.name) for _, use, _ in rows)]
    handles = [Patch(facecolor=COLOURS[name], label=name) for name in used]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(used), fontsize=8, frameon=False)


def _timeline(spec: ModelSpec, question: Question, plan: Estimate) -> tuple[Timeline | None, str]:
    """The timeline of a training step's pipeline, and what it shows."""
    made, work = plan.arrangement, question.work
    if work.purpose != "train":
        return None, ""
    found = step(ModelCost.of(spec), work, made, question.hardware)
    each = 3 * made.mesh.pp * made.vpp
    number = min(made.microbatches, max(made.mesh.pp, MAX_ACTIONS // each))
    f, b, w = (tuple(getattr(one, name) for one in found.stages) for name in ("f", "b", "w"))
    costs = Costs(f, b, w, found.comm_s)
    schedule = build(made.schedule, made.mesh.pp, number, made.vpp if made.vpp > 1 else None)
    part = "" if number == made.microbatches else f"the first {number} of "
    return simulate(schedule, costs), f"{made.schedule}: {part}{made.microbatches} micro-batches"
