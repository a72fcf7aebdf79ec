"""Options of what runs a serving loop: how many requests at once, and the memory for their keys and values."""

from __future__ import annotations

from typing import Annotated

import typer

from partita.cli.arguments.inputs import parse_bytes

CACHE = "Requests and cache"
"""A panel of options in `--help`."""

MaxSequences = Annotated[
    int, typer.Option(min=1, help="Answer at most this many requests at once; others wait.", rich_help_panel=CACHE)
]
PrefillChunk = Annotated[
    int,
    typer.Option(min=1, help="Compute at most this many prompt tokens between two tokens of answers.", rich_help_panel=CACHE),
]  # fmt: skip
ExactRows = Annotated[
    bool,
    typer.Option(
        "--exact-rows",
        help="Keep the rounding of an answer independent of other requests. Answers take longer, and prompts are computed "
        "without reusing earlier ones.",
        rich_help_panel=CACHE,
    ),
]
CacheBytes = Annotated[
    int | None,
    typer.Option(
        metavar="BYTES",
        help="Memory of each rank for keys and values, as in 4GiB (default: its share of what is free after loading, less "
        "a tenth of the machine's or device's memory; at most what the requests can use).",
        parser=parse_bytes,
        show_default=False,
        rich_help_panel=CACHE,
    ),
]
