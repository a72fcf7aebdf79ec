"""Showing a run: tables in the terminal, and the same in docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from bench.picture import draw
from bench.results import Row, Run, Table

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.svg"
DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: begin (python -m bench --write-docs) -->", "<!-- results: end -->"


def show(console: Console, table: Table) -> None:
    """Print one table."""
    grid = RichTable(title=table.title, title_justify="left", title_style="bold")
    grid.add_column("contestant")
    for name in (table.unit, "10% to 90%", "x ours", "10% to 90%", "rounds"):
        grid.add_column(name, justify="right")
    grid.add_column("target")
    for row in table.rows:
        style = {True: "green", False: "red", None: ""}[row.met]
        grid.add_row(*_cells(row), style=style)
    console.print(grid)
    for name, why in table.left_out.items():
        console.print(f"not measured: {name}: {why}", markup=False, soft_wrap=True)


def write_docs(run: Run) -> Path:
    """Put the run's tables between the marks in docs/benchmarks.md."""
    before, _, rest = DOCS.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest:
        raise SystemExit(f"{DOCS} has no line {BEGIN}")
    DOCS.write_text(f"{before}{BEGIN}\n\n{_markdown(run)}\n{END}{after}")
    draw(run, PICTURE)
    return DOCS


def _markdown(run: Run) -> str:
    facts = run.machine
    lines = [
        (
            f"{facts['date']}, `{facts['command']}`: {facts['cores']} cores of {facts['processor']}, {facts['system']}, "
            f"Python {facts['python']}, torch {facts['torch']}, transformers {facts['transformers']}. "
            f"Load average before it began: {facts['load_before']}."
        ),
        "",
        f"![How many times our time or our bytes each contestant takes]({PICTURE.name})",
        "",
    ]
    for table in run.tables:
        lines += [f"**{table.title}**", ""]
        lines += [f"| contestant | {table.unit} | 10% to 90% | x ours | 10% to 90% | rounds | target |"]
        lines += ["|---|--:|--:|--:|--:|--:|---|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in table.rows]
        lines += [""]
        lines += [f"Not measured: {name}: {why}.\n" for name, why in table.left_out.items()]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    if row.target is None:
        target = ""
    else:
        target = f"{row.target.words}: {'met' if row.met else 'missed'}"
    return [
        row.contestant,
        _number(row.median),
        f"{_number(row.low)} to {_number(row.high)}",
        f"{row.ratio:.2f}",
        f"{row.ratio_low:.2f} to {row.ratio_high:.2f}",
        str(row.rounds),
        target,
    ]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
