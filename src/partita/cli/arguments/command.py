"""Commands whose options are a dataclass: each field is a typer option or argument."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import typer


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
            annotation=hints[field.name],
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
    app.command(name, epilog=epilog, hidden=hidden)(command)


def _wants_given(options: type) -> bool:
    return "given" in options.__dataclass_fields__  # type: ignore[attr-defined]
