"""One picture of a run: how many times our time, or our bytes, each contestant takes."""

from __future__ import annotations

from pathlib import Path

from bench.results import Run, Table

MET, MISSED, PLAIN, OWN = "#2a9d5c", "#c8423b", "#8a94a6", "#1f3a5f"


def draw(run: Run, path: Path) -> None:
    """Write a picture: one panel a table, a bar a contestant, a line where ours is."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    heights = [len(table.rows) + 1.5 for table in run.tables]
    columns: tuple[list[int], list[int]] = ([], [])
    for place in range(len(run.tables)):
        min(columns, key=lambda column: sum(heights[i] for i in column)).append(place)
    tall = 0.5 + max(sum(heights[place] for place in column) for column in columns)
    figure = plt.figure(figsize=(16, 0.27 * tall))
    for column, places in enumerate(columns):
        top = 1.0
        for place in places:
            height = heights[place] / tall
            axes = figure.add_axes((0.17 + 0.5 * column, top - height + 0.35 / tall, 0.31, height - 1.4 / tall))
            _panel(axes, run.tables[place])
            top -= height
    figure.savefig(path)
    plt.close(figure)


def _panel(axes: object, table: Table) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    rows = table.rows[::-1]
    shades = [
        OWN if row.ratio_low == row.ratio_high == 1 else {True: MET, False: MISSED, None: PLAIN}[row.met]
        for row in rows
    ]
    bars = axes.barh(range(len(rows)), [row.ratio for row in rows], color=shades, height=0.72)
    errors = [[max(0.0, r.ratio - r.ratio_low) for r in rows], [max(0.0, r.ratio_high - r.ratio) for r in rows]]
    axes.errorbar(
        [row.ratio for row in rows], range(len(rows)), xerr=errors, fmt="none", ecolor="#30343b", elinewidth=0.7
    )
    axes.bar_label(bars, [f"{row.ratio:.2f}" for row in rows], padding=14, fontsize=7)
    axes.set_yticks(range(len(rows)), [row.contestant for row in rows], fontsize=7)
    axes.axvline(1.0, color=OWN, linewidth=0.8)
    axes.set_xlim(0, 1.2 * max(row.ratio_high for row in rows))
    axes.tick_params(axis="x", labelsize=6, length=2)
    axes.set_title(table.title, fontsize=7.5, loc="left", pad=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
