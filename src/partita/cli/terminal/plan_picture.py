"""A plan as a text picture: the map of its ranks, and how the tensors of a layer are split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from partita.cli.layout import describe
from partita.cli.terminal.console import count, layer_ids, out, plural, runs, size
from partita.core.mesh import Mesh
from partita.core.model.quantization import quantization_name
from partita.core.model.spec import ModelSpec
from partita.core.plan import Plan
from partita.core.sharding.cuts import TensorPlan
from partita.core.sharding.split import Split

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")
"""The colours of the tensor ranks, in turn."""

BAR_WIDTH = 36
"""Columns for the picture of a tensor's split."""

WIDE_TP = 4
"""With more tensor ranks than this, ranks that hold the same amount share a field of the map."""


MAX_NAMED, NAMED_SHARE = 4, 0.95
"""The largest number of kinds of tensors that a warning names, and the share of the parameters at which it stops."""

_UNBOUNDED = 10_000
"""Columns that every table fits."""


def show(plan: Plan, *, all_tensors: bool) -> None:
    """Print the model in one line, the map of ranks, totals, and the splits of a layer (or of every kind of layer)."""
    spec, mesh, console = plan.spec, plan.mesh, out()
    console.print(f"{spec.architecture or spec.family}: {count(spec.parameters)} parameters", style="bold")
    facts = [_sizes(spec), plural(spec.num_layers, "layer")]
    facts += [plural(spec.num_heads, "head"), plural(spec.num_kv_heads, "KV head")] if spec.num_heads else []
    console.print(", ".join(facts), style="dim")
    for line in _layout_lines(f"{mesh} = {plural(mesh.size, 'rank')}; layout ", str(plan.layout), console.width):
        console.print(line, style="dim")
    console.print()
    console.print(_map(plan, console))
    console.print(_totals(plan))
    warning = replication_warning(plan)
    if warning:
        console.print(warning, style="yellow")
    for table in _cut_tables(plan, all_kinds=all_tensors):
        console.print()
        console.print(table)
    if not plan.rules.proven:
        console.print(
            "\nThe tests do not prove these rules for this family: the engine checks them on a small model of it before use.",
            style="yellow",
        )


def replication_warning(plan: Plan) -> str:
    """The line to print if tensor ranks split less than half of the model: how much, which tensors, what helps; else empty."""
    if not plan.is_mostly_replicated:
        return ""
    spec, mesh = plan.spec, plan.mesh
    kinds: dict[str, int] = {}
    for name in plan.replicated:
        kind = _inner_name(plan, plan.cuts[name])
        kinds[kind] = kinds.get(kind, 0) + spec.tensors[name].numel
    largest = sorted(kinds, key=lambda kind: -kinds[kind])
    enough = (n for n in range(1, MAX_NAMED) if sum(kinds[k] for k in largest[:n]) > NAMED_SHARE * sum(kinds.values()))
    *others, last = largest[: next(enough, MAX_NAMED)]
    named = f"{', '.join(others)} and {last}" if others else last
    stages = min(mesh.pp * mesh.tp, spec.num_layers)
    helps = f" Use --pp {stages} instead, which distributes the layers." if stages > mesh.pp else ""
    return (
        f"--tp {mesh.tp} does not split {count(plan.replicated_parameters)} of {count(spec.parameters)} parameters "
        f"({plan.replicated_parameters / spec.parameters:.0%}): every tensor rank holds {named} unsplit.{helps}"
    )


def _sizes(spec: ModelSpec) -> str:
    name = quantization_name(spec)
    if name is None:
        return f"{size(spec.parameter_bytes)} in {spec.dtype}"
    packed, unpacked = size(spec.parameter_bytes), size(spec.unpacked_bytes)
    return f"{packed} on disk and in memory ({name}), {unpacked} if unpacked to {spec.dtype}"


def _layout_lines(head: str, layout: str, width: int) -> Iterator[str]:
    """A layout in lines of at most `width`, broken behind bars; a layout may contain blanks, so that it can be copied."""
    line = head
    for piece in re.findall(r"[^|]*\|\)?(?:\*\d+)?|[^|]+$", layout):
        if len(line) + len(piece) > width and line.strip():
            yield line.rstrip()
            line = "  "
        line += piece
    yield line


# --- the map of ranks ---------------------------------------------------------------------------------------------------


def _map(plan: Plan, console: Console) -> Table:
    """A row for each pipeline rank, a column for each rank of a layer (or for all that hold the same amount).

    Where this is too wide, each group of ranks has a row.
    """
    from rich import box
    from rich.table import Table

    mesh = plan.mesh
    groups = _columns(plan)
    table = Table(box=box.SQUARE, show_lines=True, header_style="bold")
    table.add_column("")
    for group in groups:
        table.add_column(_place(mesh, group), justify="center", no_wrap=True)
    table.add_column("layers")
    for pp in range(mesh.pp):
        cells = [
            _coloured(f"{label}\n{held}", group[0] if len(group) == 1 else None)
            for group in groups
            for label, held in [_held(plan, pp, group)]
        ]
        table.add_row(f"pp {pp}", *cells, "\n".join(_stage_lines(plan, pp)))
    return table if _fits(table, console) else _list(plan)


def _fits(table: Table, console: Console) -> bool:
    """Whether every line of a table fits without being folded."""
    return console.measure(table, options=console.options.update(max_width=_UNBOUNDED)).maximum <= console.width


def _list(plan: Plan) -> Table:
    """A row for each pipeline rank and each group of its ranks that hold the same amount."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    places = "tp" if plan.mesh.distinct == plan.mesh.tp else "place"
    for head in ("pp", places, "ranks", "each holds"):
        table.add_column(head, no_wrap=True)
    table.add_column("layers")
    for pp in range(plan.mesh.pp):
        for index, group in enumerate(_columns(plan, always=True)):
            label, held = _held(plan, pp, group)
            ranks = label.split()[1].rstrip(",")
            layers = "" if index else "\n".join(_stage_lines(plan, pp))
            table.add_row("" if index else str(pp), _range(group), ranks, held, layers)
    return table


def _held(plan: Plan, pp: int, group: list[int]) -> tuple[str, str]:
    """The ranks at some places of a stage, and what each holds."""
    ranks = [plan.mesh.distinct_ranks(pp)[place] for place in group]
    rank = ranks[0]
    label = f"rank {rank}" if len(group) == 1 else f"ranks {_range(ranks)}, each"
    return label, f"{count(plan.rank_parameters(rank))}, {size(plan.rank_bytes(rank))}"


def _columns(plan: Plan, *, always: bool = False) -> list[list[int]]:
    """The ranks of a stage in each column of the map, as places in their order.

    With `always`, ranks that hold the same share a column also if they are few.
    """
    mesh = plan.mesh
    if mesh.distinct <= WIDE_TP and not always:
        return [[place] for place in range(mesh.distinct)]

    def held(place: int) -> tuple[int, ...]:
        return tuple(plan.rank_bytes(mesh.distinct_ranks(pp)[place]) for pp in range(mesh.pp))

    return [list(group) for _, group in groupby(range(mesh.distinct), key=held)]


def _place(mesh: Mesh, group: list[int]) -> str:
    """The coordinates of some places of a stage."""
    if mesh.distinct == mesh.tp:
        return f"tp {_range(group)}"
    first, last = (mesh.coordinate(mesh.distinct_ranks(0)[place]) for place in (group[0], group[-1]))
    names = [name for name in ("dp", "cp", "tp") if mesh.axis_size(name) > 1]
    ends = [" ".join(f"{name} {getattr(here, name)}" for name in names) for here in (first, last)]
    return " to ".join(dict.fromkeys(ends))


def _stage_lines(plan: Plan, pp: int) -> Iterator[str]:
    stages = plan.stages(pp)
    for vpp, stage in enumerate(stages):
        text = describe(embedding=stage.embedding, layers=stage.layers, mtp_layers=stage.mtp_layers, loss=stage.loss)
        yield f"vpp {vpp}: {text}" if len(stages) > 1 else text


def _totals(plan: Plan) -> str:
    mesh, spec = plan.mesh, plan.spec
    shown = [rank for pp in range(mesh.pp) for rank in mesh.distinct_ranks(pp)]
    held = [plan.rank_parameters(rank) for rank in shown]
    lines = []
    if mesh.distinct == mesh.tp and mesh.dp > 1:
        replica = mesh.size // mesh.dp
        lines.append(f"This is replica 0 of {mesh.dp}; replica d holds the same on ranks {replica} * d + these.")
    if mesh.distinct == mesh.tp and mesh.cp > 1:
        lines.append(f"The {mesh.cp} context ranks of a stage hold the same.")
    if mesh.tp < mesh.distinct < mesh.stage_size:
        lines.append(
            f"The other ranks hold the same: each part is on {mesh.stage_size // mesh.distinct} sets of ranks."
        )
    if len(held) > 1:
        most = max(shown, key=plan.rank_bytes)
        copies = sum(held) - spec.parameters
        lines.append(
            f"Total: {count(sum(held))} parameters, of which {count(copies)} ({copies / spec.parameters:.2%}) are copies. "
            f"Rank {most} holds the most: {size(plan.rank_bytes(most))}{_unpacked(plan, most)}."
        )
    return "\n".join(lines) or f"One rank holds the unsplit model: {size(plan.rank_bytes(0))}{_unpacked(plan, 0)}."


def _unpacked(plan: Plan, rank: int) -> str:
    """What a rank holds of a quantized model if its engine unpacks the weights."""
    return f" ({size(plan.rank_bytes(rank, unpacked=True))} unpacked)" if plan.spec.is_packed else ""


# --- the splits of tensors----------------------------------------------------------------------------------------------


def _cut_tables(plan: Plan, *, all_kinds: bool) -> Iterator[Table]:
    """A table for each kind of layer, or for the most frequent one, and one for the tensors outside the layers."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    inside: dict[int, list[TensorPlan]] = {}
    outside = []
    for cut in plan.cuts.values():
        layer = plan.spec.layer_of(cut.name)
        if layer is None:
            outside.append(cut)
        else:
            inside.setdefault(layer, []).append(cut)
    for layer, cuts in inside.items():
        key = tuple((_inner_name(plan, cut), cut.shape, cut.dim, cut.split, cut.inner) for cut in cuts)
        kinds.setdefault(key, []).append(layer)
    if plan.mesh.distinct == 1 and not all_kinds:
        return
    shown = sorted(kinds.values(), key=len, reverse=True)[: None if all_kinds else 1]
    for ids in sorted(shown):
        alike = f" ({len(ids)} identical)" if len(ids) > 1 else ""
        yield _cut_table(plan, inside[ids[0]], f"{layer_ids(ids)}{alike}")
    if outside:
        yield _cut_table(plan, outside, "outside the layers")


def _inner_name(plan: Plan, cut: TensorPlan) -> str:
    if plan.spec.layer_of(cut.name) is None:
        return cut.name
    return cut.name[len(plan.spec.layers) + 1 :].partition(".")[2]


def _cut_table(plan: Plan, cuts: list[TensorPlan], title: str) -> Table:
    """A row for each tensor. On a narrow terminal the splits are drawn smaller, without the shapes of the parts."""
    console = out()
    table = _fill(plan, cuts, title, 0)
    return table if _fits(table, console) else _fill(plan, cuts, title, console.width)


def _fill(plan: Plan, cuts: list[TensorPlan], title: str, width: int) -> Table:
    """The table of `_cut_table` of at most `width` columns; 0 for any width."""
    from rich import box
    from rich.table import Table

    mesh = plan.mesh
    axes = [("tp", mesh.tp), *([("ep", mesh.ep)] if any(cut.axis == "ep" for cut in cuts) else [])]
    axes += [("etp", mesh.expert_tp)] if mesh.ep > 1 and any(cut.axis == "ep" for cut in cuts) else []
    over = " and ".join(f"{axis} {size}" for axis, size in axes if size > 1)
    over = f", split over {over}" if over else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{title}{over}", title_justify="left", title_style="bold")
    heads = ["shape", "split", "ranks"] if width else ["shape", "split", "ranks along the dimension", "shape per rank"]
    heads = heads if mesh.distinct > 1 else heads[:1]
    for head in ("tensor", *heads):
        table.add_column(head, no_wrap=True)
    rows = [(name, cells[: len(heads)]) for name, cells in (_row(plan, cut, narrow=width > 0) for cut in cuts)]
    others = sum(max(len(head), *(len(cells[i]) for _, cells in rows)) + 3 for i, head in enumerate(heads))
    for name, cells in rows:
        table.add_row(_folded(name, width - others - 4) if width else name, *cells)
    return table


def _row(plan: Plan, cut: TensorPlan, *, narrow: bool) -> tuple[str, list[str | Text]]:
    """The name of a tensor, and its shape, how it is split, which ranks hold what, and the shapes of their parts."""
    name = _inner_name(plan, cut) + (" (tied)" if plan.spec.tensors[cut.name].tied_to else "")
    if cut.split is None or cut.dim is None:
        return name, [_shape(cut.shape), "", _plain("on every rank" if narrow else "unsplit on every rank"), ""]
    room = BAR_WIDTH // (2 if narrow else 1)
    if cut.inner is None or cut.inner_dim is None:
        return name, [_shape(cut.shape), _dim_name(cut), _bar(cut.split, room), _parts(cut)]
    # Parts of an expert are on neighbours, so the bar shows for each range of experts the ranks that hold it.
    repeated = tuple(ranges for ranges in cut.split.by_rank for _ in range(cut.inner.parts))
    split = f"experts, and dim {cut.inner_dim} over {cut.inner.parts}"
    return name, [_shape(cut.shape), split, _bar(Split(cut.split.size, repeated), room), _parts(cut)]


def _folded(name: str, room: int) -> str:
    """A path in lines of about `room` characters, broken behind dots."""
    lines = [""]
    for piece in re.findall(r"[^.]+\.?", name):
        if lines[-1].strip() and len(lines[-1]) + len(piece) > room:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)


def _dim_name(cut: TensorPlan) -> str:
    if cut.axis == "ep":
        return "experts"
    if len(cut.shape) == 2:
        return "columns" if cut.dim else "rows"
    return f"dim {cut.dim}" if len(cut.shape) > 1 else "entries"


def _parts(cut: TensorPlan) -> str:
    assert cut.split is not None
    shapes = [cut.local_shape(part) for part in range(cut.parts)]
    kinds = dict.fromkeys(shapes)
    if len(kinds) == 1:
        return _shape(shapes[0])
    return "; ".join(f"{runs(r for r, s in enumerate(shapes) if s == kind)}: {_shape(kind)}" for kind in kinds)


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _bar(split: Split, room: int) -> Text:
    """The split dimension from its first element to its last, each piece with the ranks that hold it."""
    from rich.text import Text

    edges = sorted({edge for ranges in split.by_rank for r in ranges for edge in r} | {0, split.size})
    pieces = [split.holders(start) for start in edges[:-1]]
    width = max(max(len(_range(holders)) for holders in pieces), room // len(pieces) - 1)
    if len(pieces) * (width + 1) > room:
        pieces = [*pieces[: max(1, (room - 4) // (width + 1) - 1)], (), pieces[-1]]
    bar = Text("|")
    for holders in pieces:
        if holders:
            bar.append(f"{_range(holders):^{width}}", style=_colour(holders[0]))
        else:
            bar.append("...")
        bar.append("|")
    return bar


def _range(ranks: tuple[int, ...] | list[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else runs(ranks).replace(" ", "")


def _colour(rank: int) -> str:
    return COLOURS[rank % len(COLOURS)]


def _coloured(text: str, rank: int | None) -> Text:
    from rich.text import Text

    return Text(text, style=_colour(rank) if rank is not None else "", justify="center")


def _plain(text: str) -> Text:
    from rich.text import Text

    return Text(text, style="dim")
