"""A plan as a text picture: the map of its ranks, and how the tensors of a layer are split."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from partita.cli.layout import describe
from partita.cli.terminal.console import count, layer_ids, out, plural, runs, size
from partita.core.plan import Plan
from partita.core.sharding.cuts import TensorPlan
from partita.core.sharding.split import Split

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")
"""The colours of the tensor ranks, in turn."""

BAR_WIDTH = 36
"""Columns for the picture of a tensor's split."""

NARROW = 110
"""On a terminal with fewer columns the splits are drawn smaller, without the shapes of the parts."""

WIDE_TP = 4
"""With more tensor ranks than this, ranks that hold the same amount share a field of the map."""


def show(plan: Plan, *, all_tensors: bool) -> None:
    """Print the model in one line, the map of ranks, totals, and the splits of a layer (or of every kind of layer)."""
    spec, mesh, console = plan.spec, plan.mesh, out()
    console.print(
        f"{spec.architecture or spec.family}: {count(spec.parameters)} parameters", style="bold", soft_wrap=True
    )
    kind = f"{spec.dtype}, quantized" if spec.is_packed else spec.dtype
    facts = [f"{size(spec.parameter_bytes)} in {kind}", plural(spec.num_layers, "layer")]
    facts += [plural(spec.num_heads, "head"), plural(spec.num_kv_heads, "KV head")] if spec.num_heads else []
    console.print(", ".join(facts), style="dim", soft_wrap=True)
    console.print(f"{mesh} = {plural(mesh.size, 'rank')}; layout {plan.layout}\n", style="dim", soft_wrap=True)
    console.print(_map(plan))
    console.print(_totals(plan), soft_wrap=True)
    for table in _cut_tables(plan, all_kinds=all_tensors):
        console.print()
        console.print(table)
    if not plan.rules.proven:
        console.print(
            "\nThe tests do not prove these rules for this family: the engine checks them on a small model of it before use.",
            style="yellow", soft_wrap=True,
        )  # fmt: skip


# --- the map of ranks ---------------------------------------------------------------------------------------------------


def _map(plan: Plan) -> Table:
    """A row for each pipeline rank, a column for each tensor rank (or for all that hold the same amount)."""
    from rich import box
    from rich.table import Table

    mesh = plan.mesh
    groups = _columns(plan)
    table = Table(box=box.SQUARE, show_lines=True, header_style="bold")
    table.add_column("")
    for group in groups:
        table.add_column(f"tp {_range(group)}", justify="center", no_wrap=True)
    table.add_column("layers")
    for pp in range(mesh.pp):
        cells = []
        for group in groups:
            rank = mesh.rank(pp=pp, tp=group[0])
            held = f"{count(plan.rank_parameters(rank))}, {size(plan.rank_bytes(rank))}"
            last = mesh.rank(pp=pp, tp=group[-1])
            label = f"rank {rank}" if len(group) == 1 else f"ranks {rank}-{last}, each"
            cells.append(_coloured(f"{label}\n{held}", group[0] if len(group) == 1 else None))
        table.add_row(f"pp {pp}", *cells, "\n".join(_stage_lines(plan, pp)))
    return table


def _columns(plan: Plan) -> list[list[int]]:
    """The tensor ranks in each column of the map."""
    mesh = plan.mesh
    if mesh.tp <= WIDE_TP:
        return [[tp] for tp in range(mesh.tp)]

    def held(tp: int) -> tuple[int, ...]:
        return tuple(plan.rank_bytes(mesh.rank(pp=pp, tp=tp)) for pp in range(mesh.pp))

    return [list(group) for _, group in groupby(range(mesh.tp), key=held)]


def _stage_lines(plan: Plan, pp: int) -> Iterator[str]:
    stages = plan.stages(pp)
    for vpp, stage in enumerate(stages):
        text = describe(embedding=stage.embedding, layers=stage.layers, mtp_layers=stage.mtp_layers, loss=stage.loss)
        yield f"vpp {vpp}: {text}" if len(stages) > 1 else text


def _totals(plan: Plan) -> str:
    mesh, spec = plan.mesh, plan.spec
    one_replica = range(mesh.pp * mesh.tp)
    held = [plan.rank_parameters(rank) for rank in one_replica]
    lines = []
    if mesh.dp > 1:
        lines.append(f"This is replica 0 of {mesh.dp}; replica d holds the same on ranks {len(held)} * d + these.")
    if len(held) > 1:
        most = max(one_replica, key=plan.rank_bytes)
        copies = sum(held) - spec.parameters
        lines.append(
            f"Total: {count(sum(held))} parameters, of which {count(copies)} ({copies / spec.parameters:.2%}) are copies. "
            f"Rank {most} holds the most: {size(plan.rank_bytes(most))}."
        )
    return "\n".join(lines) or f"One rank holds the unsplit model: {size(plan.rank_bytes(0))}."


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
        key = tuple((_inner_name(plan, cut), cut.shape, cut.dim, cut.split) for cut in cuts)
        kinds.setdefault(key, []).append(layer)
    if plan.mesh.tp == 1 and not all_kinds:
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
    from rich import box
    from rich.table import Table

    narrow = out().width < NARROW
    over = f", split over tp {plan.mesh.tp}" if plan.mesh.tp > 1 else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{title}{over}", title_justify="left", title_style="bold")
    table.add_column("tensor", overflow="fold", min_width=20)
    for head in ("shape", "split", "ranks along the dimension", *([] if narrow else ["shape per rank"])):
        table.add_column(head, no_wrap=True)
    for cut in cuts:
        if cut.split is None or cut.dim is None:
            how, bar, part = "", _plain("unsplit on every rank" if plan.mesh.tp > 1 else ""), ""
        else:
            how, bar, part = _dim_name(cut), _bar(cut.split, BAR_WIDTH // (1 + narrow)), _parts(cut, plan.mesh.tp)
        name = _inner_name(plan, cut) + (" (tied)" if plan.spec.tensors[cut.name].tied_to else "")
        table.add_row(name, _shape(cut.shape), how, bar, *([] if narrow else [part]))
    return table


def _dim_name(cut: TensorPlan) -> str:
    if len(cut.shape) == 2:
        return "columns" if cut.dim else "rows"
    return f"dim {cut.dim}" if len(cut.shape) > 1 else "entries"


def _parts(cut: TensorPlan, tp: int) -> str:
    shapes = [cut.local_shape(rank) for rank in range(tp)]
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
