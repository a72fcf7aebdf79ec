"""`partita convert`: a GGUF file, pickled weights or a quantized folder as an ordinary Hugging Face folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from partita.cli.arguments.options import WEIGHTS, Dtype
from partita.cli.terminal.console import err, plural, size
from partita.cli.terminal.messages import adopt_all
from partita.cli.terminal.progress import loading


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """The options of `partita convert`."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file (of several parts, any), a folder of .bin files, a .bin file, a Hugging Face folder or hub id.",
            show_default=False,
        ),
    ]
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Write this folder.", show_default=False)]
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--dtype",
            help="Dtype of all floating-point weights (default: their own; of quantized ones that of the others, float32 in "
            "most GGUF files).",
            show_default=False,
            rich_help_panel=WEIGHTS,
        ),
    ] = None


def convert(options: ConvertOptions) -> None:
    """Write a GGUF file, pickled weights (.bin) or a quantized model as an ordinary Hugging Face folder of safetensors.

    Quantized weights are written as their values. Pickled files are read without running their code. Needs little memory.
    """
    adopt_all()
    from partita.torch.convert import convert as write

    start_s = time.monotonic()
    with loading("converting") as progress:
        made = write(options.model, options.folder, options.dtype and options.dtype.value, progress=progress)
    seconds = time.monotonic() - start_s
    err().print(
        f"{options.folder}: {plural(made.tensors, 'tensor')}, {size(made.size_bytes)} in {plural(made.files, 'file')}, "
        f"written in {seconds:.1f} s.",
        soft_wrap=True,
    )
