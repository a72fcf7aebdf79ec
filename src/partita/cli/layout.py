"""`partita layout`: the stages of a pipeline layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from partita.cli.arguments.options import AsJson
from partita.cli.terminal.console import layer_ids, out, plural, print_json
from partita.core.layout.layout import LayerType, Layout

MAX_ROWS = 400
"""The largest number of stages that are printed; JSON has all of them."""


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """The options of `partita layout`."""

    text: Annotated[
        str,
        typer.Argument(
            metavar="LAYOUT",
            help="E embedding, t decoder layer, m multi-token-prediction layer, L loss; | ends a stage; "
            "x*n and (...)*n repeat.",
            show_default=False,
        ),
    ]
    pp: Annotated[int, typer.Option("--pp", help="Pipeline ranks.", show_default=False)]
    as_json: AsJson = False


def layout(options: LayoutOptions) -> None:
    """Show the stages of a pipeline layout and the ids of their layers."""
    made = Layout(options.text, options.pp)
    if options.as_json:
        print_json(
            {
                "layout": str(made),
                "pp": options.pp,
                "vpp": made.virtual_pipeline_model_parallel_size,
                "num_layers": made.flatten_layout.count(LayerType.decoder),
                "mtp_num_layers": made.flatten_layout.count(LayerType.mtp),
                "stages": list(_stages(made)),
            }
        )
        return
    _show(made)


def _stages(made: Layout) -> Iterator[dict[str, Any]]:
    pp = made.pipeline_model_parallel_size
    for index, kinds in enumerate(made.stages):
        vpp_rank, pp_rank = divmod(index, pp)
        yield {
            "stage": index,
            "pp_rank": pp_rank,
            "vpp_rank": vpp_rank,
            "embedding": LayerType.embedding in kinds,
            "layers": made.get_layer_id_list(LayerType.decoder, vpp_rank, pp_rank),
            "mtp_layers": made.get_layer_id_list(LayerType.mtp, vpp_rank, pp_rank),
            "loss": LayerType.loss in kinds,
        }


def _show(made: Layout) -> None:
    from rich import box
    from rich.table import Table

    pp, vpp = made.pipeline_model_parallel_size, made.virtual_pipeline_model_parallel_size
    decoders, mtp = (made.flatten_layout.count(kind) for kind in (LayerType.decoder, LayerType.mtp))
    console = out()
    console.print(str(made), style="bold", soft_wrap=True)
    facts = [f"{plural(made.num_stages, 'stage')} = {plural(pp, 'pipeline rank')} x {vpp} virtual"]
    facts += [plural(decoders, "decoder layer"), *([plural(mtp, "mtp layer")] if mtp else [])]
    console.print(", ".join(facts) + "\n", style="dim")
    console.print(made.pretty_repr() + "\n", soft_wrap=True)
    table = Table("stage", "PP rank", "VPP rank", "layers", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[:3]:
        column.justify = "right"
    for row in _stages(made):
        if row["stage"] == MAX_ROWS:
            table.add_row("...", "", "", f"{made.num_stages - MAX_ROWS:,} more stages: --json lists them all")
            break
        table.add_row(str(row["stage"]), str(row["pp_rank"]), str(row["vpp_rank"]), describe(**row))
    console.print(table)


def describe(*, embedding: bool, layers: list[int] | tuple[int, ...], mtp_layers: Any, loss: bool, **_: Any) -> str:
    """A stage in words: `embedding, layers 0-2`."""
    parts = [
        "embedding" if embedding else "",
        layer_ids(layers),
        layer_ids(mtp_layers, "mtp layer"),
        "loss" if loss else "",
    ]
    return ", ".join(part for part in parts if part) or "(empty stage)"
