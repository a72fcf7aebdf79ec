"""Commands whose options are a dataclass: each field is a typer option or argument."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from partita.cli.terminal.help import HelpCommand

VALUE_ALONE = {"--checkpointing": "full", "--zero": "1"}
"""The value of an option that is given without one."""

NEGATED = {"--no-checkpointing": "--checkpointing=none", "--no-zero": "--zero=0"}
"""What stands for an option that takes a value and is negated."""

LONGEST_CHOICE = 12
"""Choices are a metavar of their own if they are no longer than this together."""


class _Command(HelpCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, completed(args))


def completed(args: Sequence[str]) -> list[str]:
    """The arguments with the values that options have where they are given without one."""
    made: list[str] = []
    for arg, following in zip_longest(args, args[1:], fillvalue="-"):
        arg = NEGATED.get(arg, arg)
        made.append(f"{arg}={VALUE_ALONE[arg]}" if arg in VALUE_ALONE and following.startswith("-") else arg)
    return made


def add_command(
    app: typer.Typer,
    body: Callable[[Any], None],
    options: type,
    *,
    name: str,
    epilog: str | None = None,
    hidden: bool = False,
) -> None:
    """Add to `app` a command that calls `body` with the `options` of the command line.

    Args:
        app: The typer app.
        body: The function of the command; its docstring is the help text.
        options: A dataclass whose fields are annotated with `typer.Option` and `typer.Argument`. A field `given` receives the
            names of the options that are given on the command line, rather than being defaults.
        name: Name of the command.
        epilog: The text below the help.
        hidden: Whether `--help` leaves the command out.
    """
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=_with_metavar(field.name, hints[field.name]),
        )
        for field in dataclasses.fields(options)
        if field.name != "given"
    ]

    def command(ctx: typer.Context, **values: Any) -> None:
        given = {
            n for n in values if (source := ctx.get_parameter_source(n)) is not None and source.name == "COMMANDLINE"
        }
        body(options(**values, **({"given": frozenset(given)} if _wants_given(options) else {})))

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    command.__doc__ = body.__doc__
    command.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (context, *parameters)}
    app.command(name, cls=_Command, epilog=epilog, hidden=hidden)(command)


def _with_metavar(name: str, hint: Any) -> Any:
    """The annotation of an option, with a metavar if it has none: N for numbers, the choices if they are few and short."""
    base, info = get_args(hint)[:2]
    kinds = {kind for kind in (base, *get_args(base), *(k for a in get_args(base) for k in get_args(a))) if kind}
    if info.metavar is not None or bool in kinds:
        return hint
    info = copy.copy(info)
    choices = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if choices:
        values = [str(choice.value) for choice in choices[0]]
        joined = "|".join(values)
        info.metavar = joined if len(joined) <= LONGEST_CHOICE else name.rpartition("_")[2].upper()
        if info.metavar != joined:
            info.help = f"{info.help} One of {', '.join(values)}."
    else:
        info.metavar = "N" if int in kinds else "X" if float in kinds else "PATH" if Path in kinds else "TEXT"
    return Annotated[base, info]


def _wants_given(options: type) -> bool:
    return "given" in options.__dataclass_fields__  # type: ignore[attr-defined]
