"""The options of `train` that name its data, and the checks that need no framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.cli.arguments import inputs
from partita.errors import ModelError
from partita.training.data.files import DataFile, files_of
from partita.training.data.records import BLOCK_BYTES, records

PANEL = "Data"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options for the data of training."""

    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            show_default=False,
            help="Train on a file, a folder, a glob in quotes, standard input (`-`, text), or `stdlib`, the sources of Python's"
            " standard library. Files are text, JSON Lines, JSON, parquet, csv or tsv; their rows have a text, `prompt` and "
            "`completion`, or `messages`. Give it again for more sources, with `SOURCE:0.7` for a weight of each.",
            rich_help_panel=PANEL,
        ),
    ] = None
    text_column: Annotated[
        str, typer.Option("--text-column", metavar="NAME", help="The column of texts.", rich_help_panel=PANEL)
    ] = "text"
    packing: Annotated[
        bool,
        typer.Option(
            "--packing",
            help="Put several documents in a row, each with its own attention and positions.",
            rich_help_panel=PANEL,
        ),
    ] = False
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            min=1,
            help="Passes over the data, instead of --steps.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            "--eval-data",
            metavar="SOURCE",
            help="Compute the loss on this data too, after the last step.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None
    eval_every: Annotated[
        int | None,
        typer.Option(
            "--eval-every",
            min=1,
            metavar="STEPS",
            help="Compute it every N steps as well.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None
    show_sample: Annotated[
        int | None,
        typer.Option(
            "--show-sample",
            min=1,
            metavar="N",
            help="Print the first N rows of training, with what is trained on between ❮ and ❯, instead of training.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None


@dataclass(frozen=True)
class DataSources:
    """The sources of a run.

    Attributes:
        sources: What to train on.
        weights: The weight of each, if they have weights.
        text_column: The column of texts in tables.
        evaluated: What to evaluate on.
        shown: Number of rows to print instead of training; None to train.
    """

    sources: list[str]
    weights: list[float] | None
    text_column: str
    evaluated: list[str]
    shown: int | None = None


def read_sources(notes: dict[str, Any], eval_every: int | None) -> DataSources:
    """The sources that the options in `notes` name. Pipes and standard input are kept in files.

    Raises:
        ModelError: There is no data, or some of it cannot be read or used.
    """
    given: Sequence[str] = [one for one in notes["data"] or () if one]
    parsed = [_weighted(one) for one in given]
    weights = [weight for _, weight in parsed if weight is not None]
    if weights and len(weights) < len(parsed):
        lacking = next(source for source, weight in parsed if weight is None)
        raise ModelError(
            f"--data {lacking} has no weight, but others have one. Give `{lacking}:WEIGHT`, or no weights."
        )
    evaluated = [inputs.kept(one, "--eval-data") for one in notes["eval_data"] or ()]
    if eval_every is not None and not evaluated:
        raise ModelError("--eval-every needs data to evaluate on. Give --eval-data, or leave it out.")
    sources = [inputs.kept(source, "--data") for source, _ in parsed]
    for source in [*sources, *evaluated]:
        _check(files_of(source), notes["text_column"])
    return DataSources(sources, weights or None, notes["text_column"], evaluated)


def _weighted(source: str) -> tuple[str, float | None]:
    """A source and its weight, which follows the last colon unless a file has that name."""
    name, colon, text = source.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        return source, None
    if not colon or not name or Path(source).exists():
        return source, None
    if not 0 < weight < float("inf"):
        raise ModelError(
            f"--data {source}: a weight must be a number above 0, but is {text}. Leave the source out, or raise it."
        )
    return name, weight


def _check(files: Sequence[DataFile], text_column: str) -> None:
    """Raise errors in text and JSON before ranks start: in the first files completely, then at the beginning of each."""
    left = BLOCK_BYTES
    for file in files:
        if file.format not in ("text", "json"):
            continue
        left -= file.size_bytes
        for _ in records(file, text_column):
            if left < 0:
                break
