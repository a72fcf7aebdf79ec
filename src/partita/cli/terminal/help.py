"""`--help`: panels of options with short metavars, readable at 80 columns."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperGroup

from partita.cli.terminal.console import out, write

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

WIDTH = 80
"""The largest number of columns of a help text."""

LABEL_WIDTH = 26
"""Longer names of options stand on a line of their own."""

ARGUMENTS, GENERAL = "Arguments", "General"
"""The panels of arguments, which is the first, and of options without a panel, which is the last."""


class HelpCommand(TyperCommand):
    """A command with this module's help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help text, and leave nothing for typer to print."""
        write(help_text(self, ctx))


class HelpGroup(TyperGroup):
    """A group of commands with this module's help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help text, and leave nothing for typer to print."""
        write(help_text(self, ctx))


def help_text(command: Any, ctx: Any) -> str:
    """The help of a command or a group of commands, at most `WIDTH` columns wide, in the colours that stdout can show."""
    from rich.console import Console

    shown = out()
    console = Console(
        file=io.StringIO(), width=min(shown.width, WIDTH), highlight=False, emoji=False, legacy_windows=False,
        force_terminal=shown.is_terminal, color_system="standard" if shown.color_system else None, no_color=shown.no_color,
        safe_box=shown.encoding.startswith("utf"),
    )  # fmt: skip
    for part in _parts(command, ctx, ascii_only=not shown.encoding.startswith("utf")):
        console.print(part)
    lines: list[str] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def _parts(command: Any, ctx: Any, *, ascii_only: bool) -> Iterator[RenderableType]:
    params = [param for param in command.get_params(ctx) if not getattr(param, "hidden", False)]
    yield f"[bold]Usage:[/bold] {_usage(ctx.command_path, command, params)}\n"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield " ".join(paragraph.split()) + "\n"
    rows: dict[str, list[tuple[Text, Text]]] = {ARGUMENTS: []}
    for param in params:
        rows.setdefault(_panel_of(param), []).append((_label(param), _description(param)))
    if GENERAL in rows:
        rows[GENERAL] = rows.pop(GENERAL)
    commands = [command.get_command(ctx, name) for name in getattr(command, "commands", ())]
    named = [(_text(one.name, "bold cyan"), _text(_first_paragraph(one.help))) for one in commands if not one.hidden]
    if named:
        yield _panel("Commands", named, _width(named), ascii_only=ascii_only)
    width = _width(row for found in rows.values() for row in found)
    for title, found in rows.items():
        if found:
            yield _panel(title, found, width, ascii_only=ascii_only)
    if command.epilog:
        yield "\n" + command.epilog


def _width(rows: Iterable[tuple[Text, Text]]) -> int:
    return max((len(label) for label, _ in rows if len(label) <= LABEL_WIDTH), default=LABEL_WIDTH)


def _usage(path: str, command: Any, params: Iterable[Any]) -> str:
    pieces = [path, r"\[OPTIONS]"]
    if getattr(command, "commands", None):
        pieces.append(r"COMMAND \[ARGS]...")
    pieces += [(param.metavar if param.required else rf"\[{param.metavar}]") for param in params if _is_argument(param)]
    return " ".join(pieces)


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _panel_of(param: Any) -> str:
    return getattr(param, "rich_help_panel", None) or (ARGUMENTS if _is_argument(param) else GENERAL)


def _label(param: Any) -> Text:
    if _is_argument(param):
        return _text(param.metavar, "bold cyan")
    names = ", ".join(sorted((*param.opts, *param.secondary_opts), key=len))
    label = _text(names, "bold cyan")
    if param.metavar:
        label.append(f" {param.metavar}", style="yellow")
    return label


def _description(param: Any) -> Text:
    """The help of an option, with its default before the last period."""
    from rich.text import Text

    text = Text("\n").join(Text.from_markup(" ".join(part.split())) for part in (param.help or "").split("\n\n"))
    default = param.default
    note = ""
    if param.required:
        note = "required"
    elif getattr(param, "show_default", False) and default is not None and default is not False:
        note = f"default: {default.value if isinstance(default, Enum) else default}"
    if note:
        ends = text.plain.endswith(".")
        text.right_crop(1 if ends else 0)
        text.append(f" ({note})", style="dim").append("." if ends else "")
    return text


def _panel(title: str, rows: Iterable[tuple[Text, Text]], width: int, *, ascii_only: bool) -> RenderableType:
    """Rows of a label and its description; a longer label than `width` stands above its description."""
    from rich import box
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table

    lines: list[RenderableType] = []
    for label, description in rows:
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(width=width, no_wrap=True)
        table.add_column(ratio=1)
        is_long = len(label) > width
        table.add_row("" if is_long else label, description)
        lines += [label, table] if is_long else [table]
    shape = box.ASCII if ascii_only else box.ROUNDED
    return Panel(Group(*lines), title=title, title_align="left", box=shape, border_style="dim")


def _first_paragraph(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def _text(text: str | None, style: str = "") -> Text:
    from rich.text import Text

    return Text(text or "", style=style)
