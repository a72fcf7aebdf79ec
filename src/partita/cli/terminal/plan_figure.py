"""A plan as a picture: a bar for each rank, with the bytes of each part of the model that it holds."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.cli.layout import describe
from partita.cli.terminal.console import count, runs, size
from partita.core.model.spec import ModelSpec
from partita.core.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS: dict[str, str] = {
    "towers": "#8c6bb1", "embedding": "#4472b4", "attention": "#dd8526", "MLP": "#5c9e5c", "experts": "#2f7d7d",
    "norms and others": "#a0a0a0", "head": "#c25b4c",
}  # fmt: skip
"""The parts of a model in the order of their bars, with their colours."""

_ATTENTION = re.compile(r"attn|attention|mixer|mamba|conv|time_mix|recurrent|linear_attn|ssm")
_MLP = re.compile(r"mlp|feed_forward|ffn|\bfc\d|dense|c_fc|gate_proj|up_proj|down_proj|channel_mix")

MAX_ROWS = 32
"""With more ranks, those that hold the same amount share a bar."""

_VISIBLE = 0.001
"""The least share of the picture's width of what its legend explains."""

_WIDTH, _ROW = 11.0, 0.3  # inches: width of the picture, and height of a bar
_TOP, _BOTTOM, _LEFT, _RIGHT = 0.95, 1.0, 1.15, 0.3  # inches around the bars


def part_of(spec: ModelSpec, name: str, *, is_before: bool) -> str:
    """The part of the model (see `PARTS`) that tensor `name` belongs to; `is_before` if it is before the layers."""
    if spec.is_in_tower(name):
        return "towers"
    small = len(spec.tensors[name].shape) < 2
    if spec.layer_of(name) is None:
        return "norms and others" if small else "embedding" if is_before else "head"
    inner = name[len(spec.layers) + 1 :]
    if re.search(r"experts\.|router|mlp\.gate\.", inner):
        return "experts"
    if "norm" in inner.rpartition(".")[0].rpartition(".")[2]:
        return "norms and others"
    return "attention" if _ATTENTION.search(inner) else "MLP" if _MLP.search(inner) else "norms and others"


def held_bytes(plan: Plan, rank: int) -> dict[tuple[str, bool], float]:
    """Bytes that `rank` holds of each part, apart for what the ranks of a layer split and what each of them holds complete.

    The keys are (part, whether it is complete on every rank of the layer). The values come to `plan.rank_bytes(rank)`.
    """
    spec, is_split = plan.spec, plan.mesh.distinct > 1
    held: dict[tuple[str, bool], float] = {}
    for cut in plan.held_by(rank):
        is_before = spec.layer_of(cut.name) is None and plan.is_before_layers(cut.name)
        key = part_of(spec, cut.name, is_before=is_before), is_split and cut.split is None
        held[key] = (
            held.get(key, 0.0) + cut.local_numel(plan.part(cut, rank)) * spec.bits_of(spec.tensors[cut.name]) / 8
        )
    return held


def as_data(plan: Plan) -> dict[str, Any]:
    """What the ranks that hold different parts hold, as data for a picture that something else draws."""
    spec, mesh = plan.spec, plan.mesh
    ranks = []
    for row in _rows(plan):
        held = sorted(held_bytes(plan, row[0]).items(), key=lambda one: (list(PARTS).index(one[0][0]), one[0][1]))
        parts = [
            {"name": part, "is_copy": is_copy, "bytes": round(number), "size": size(number)}
            for (part, is_copy), number in held
        ]
        bytes_ = plan.rank_bytes(row[0])
        ranks.append(
            {
                "name": _row_name(row), "stage": _stage_name(plan, mesh.coordinate(row[0]).pp), "bytes": round(bytes_),
                "size": size(bytes_), "parts": parts,
            }
        )  # fmt: skip
    return {
        "title": f"{spec.architecture or spec.family}: {count(spec.parameters)} parameters, {mesh}", "ranks": ranks,
        "colours": PARTS,
    }  # fmt: skip


def _row_name(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {runs(ranks).replace(' ', '')}"


def picture(plan: Plan, path: Path) -> None:
    """Draw what the ranks that hold different parts hold into a .svg or .png file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(plan)
    height = max(2.0, len(rows) * _ROW + 0.28 * plan.mesh.pp)
    total = height + _TOP + _BOTTOM
    figure = Figure(figsize=(_WIDTH, total))
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (_LEFT / _WIDTH, _BOTTOM / total, 1 - (_LEFT + _RIGHT) / _WIDTH, height / total)
    )  # fmt: skip
    used = _draw(axes, plan, rows)
    left = _LEFT / _WIDTH
    spec, mesh = plan.spec, plan.mesh
    figure.text(
        left, 1 - 0.3 / total, f"{spec.architecture or spec.family}: {count(spec.parameters)} parameters, {mesh}",
        fontsize=12, fontweight="bold", va="center",
    )  # fmt: skip
    copies = mesh.stage_size // mesh.distinct
    replica = f"; one of {copies} equal sets of ranks" if copies > 1 else ""
    if mesh.dp == copies > 1:
        replica = f"; one of {mesh.dp} equal replicas"
    most = max(plan.rank_bytes(ranks[0]) for ranks in rows)
    figure.text(
        left, 1 - 0.58 / total,
        f"{size(spec.parameter_bytes)} unsplit, at most {size(most)} on a rank{replica}", fontsize=9, color="0.3", va="center",
    )  # fmt: skip
    _legend(figure, used, total)
    is_svg = path.suffix.lower() == ".svg"
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if is_svg else None)


def _rows(plan: Plan) -> list[list[int]]:
    """The ranks of each bar, stage by stage."""
    mesh = plan.mesh
    stages = [mesh.distinct_ranks(pp) for pp in range(mesh.pp)]
    if mesh.pp * mesh.distinct <= MAX_ROWS:
        return [[rank] for ranks in stages for rank in ranks]
    return [list(alike) for ranks in stages for _, alike in groupby(ranks, key=plan.rank_bytes)]


def _draw(axes: Axes, plan: Plan, rows: list[list[int]]) -> set[tuple[str, bool]]:
    """The bars, those of a stage below its name; returns what is visible in them."""
    unit, name = _unit(max(plan.rank_bytes(ranks[0]) for ranks in rows))
    used: set[tuple[str, bool]] = set()
    places, labels, y, before = [], [], 0.0, -1
    room = max(plan.rank_bytes(ranks[0]) for ranks in rows) / unit * 1.12
    for ranks in rows:
        pp = plan.mesh.coordinate(ranks[0]).pp
        if pp != before:
            y += 0.93
            axes.text(0, y - 0.55, _stage_name(plan, pp), fontsize=8.5, color="0.25", va="center", clip_on=True)
            before = pp
        held, x = held_bytes(plan, ranks[0]), 0.0
        for part, colour in PARTS.items():
            for is_copy in (False, True):
                width = held.get((part, is_copy), 0.0) / unit
                if width:
                    axes.barh(
                        y + 0.4, width, left=x, height=0.72, color=colour, edgecolor="white", linewidth=0.4,
                        hatch="////" if is_copy else None,
                    )  # fmt: skip
                    if width > _VISIBLE * room:
                        used.add((part, is_copy))
                x += width
        each = " each" if len(ranks) > 1 else ""
        axes.text(x + room * 0.008, y + 0.4, f"{size(plan.rank_bytes(ranks[0]))}{each}", fontsize=8, va="center")
        places.append(y + 0.4)
        labels.append(_row_name(ranks))
        y += 1.0
    axes.set_xlim(0, room)
    axes.set_ylim(y + 0.1, 0)
    axes.set_yticks(places, labels)
    axes.tick_params(labelsize=8, length=0, axis="y")
    axes.tick_params(labelsize=8, length=3, axis="x")
    axes.set_xlabel(f"weights of a rank, {name}", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    return used


def _stage_name(plan: Plan, pp: int) -> str:
    stages = plan.stages(pp)
    texts = [
        describe(embedding=stage.embedding, layers=stage.layers, mtp_layers=stage.mtp_layers, loss=stage.loss)
        for stage in stages
    ]
    if len(stages) > 1:
        texts = [f"vpp {vpp}: {text}" for vpp, text in enumerate(texts)]
    text = "; ".join(texts)
    return f"pp {pp}: {text if len(text) <= 110 else text[:107] + '...'}"


def _unit(most: float) -> tuple[float, str]:
    """The unit of the axis: the largest of which a rank holds at least one."""
    return next(
        ((1024.0**n, name) for n, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")) if most >= 1024**n), (1.0, "bytes")
    )


def _legend(figure: Any, used: set[tuple[str, bool]], total: float) -> None:
    from matplotlib.patches import Patch

    parts = [part for part in PARTS if any(part == name for name, _ in used)]
    handles = [Patch(facecolor=PARTS[part], label=part) for part in parts]
    if any(is_copy for _, is_copy in used):
        handles.append(
            Patch(facecolor="0.6", edgecolor="white", hatch="////", label="complete on every rank of a layer")
        )
    figure.legend(
        handles=handles, loc="lower center", ncols=len(handles), fontsize=9, frameon=False,
        bbox_to_anchor=(0.5, 0.06 / total), handlelength=1.6, columnspacing=1.4,
    )  # fmt: skip
