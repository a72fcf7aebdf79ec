"""Options that several commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from partita.cli.arguments import inputs
from partita.cli.arguments.engine import RUN, BackendOption, EngineOption
from partita.ranks.liveness import LOST_AFTER

SPLIT, PIPELINE, WEIGHTS, OUTPUT = "Split", "Pipeline", "Weights", "Output"
"""Panels of options in `--help`."""

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Path of a Hugging Face folder, a GGUF file or a config file, or a hub id (owner/name).",
        show_default=False,
    ),
]
TensorRanks = Annotated[
    int,
    typer.Option("--tp", min=1, help="Split every layer over this many tensor parallel ranks.", rich_help_panel=SPLIT),
]
PipelineRanks = Annotated[
    int,
    typer.Option("--pp", min=1, help="Distribute the layers over this many pipeline ranks.", rich_help_panel=SPLIT),
]
Replicas = Annotated[
    int, typer.Option("--dp", min=1, help="Train this many data parallel replicas.", rich_help_panel=SPLIT)
]
ContextRanks = Annotated[
    int,
    typer.Option(
        "--cp",
        min=1,
        help="Split every sequence of training, or every prompt, request and its cache, over this many context parallel "
        "ranks.",
        rich_help_panel=SPLIT,
    ),
]
ExpertRanks = Annotated[
    int,
    typer.Option(
        "--ep",
        min=1,
        help="Distribute the experts of each layer over this many ranks, instead of splitting each expert over --tp.",
        rich_help_panel=SPLIT,
    ),
]
ExpertTensorRanks = Annotated[
    int | None,
    typer.Option(
        "--etp",
        min=1,
        help="Split each expert over this many of the ranks, beside --ep (default: as many of --tp as remain after --ep).",
        show_default=False,
        rich_help_panel=SPLIT,
    ),
]
LayoutText = Annotated[
    str | None,
    typer.Option(
        "--layout",
        help="Assign layers to stages, in the language of `partita layout` (default: evenly; by bytes where layers differ).",
        show_default=False,
        rich_help_panel=SPLIT,
    ),
]
VirtualStages = Annotated[
    int | None,
    typer.Option(
        "--vpp",
        min=1,
        help="Run this many stages on each pipeline rank (default: those of the layout or the schedule).",
        show_default=False,
        rich_help_panel=SPLIT,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="Use a plan from `partita plan --save` instead of --tp, --pp, --dp, --cp, --ep, --etp, --layout and --vpp.",
        parser=inputs.existing_file,
        show_default=False,
        rich_help_panel=SPLIT,
    ),
]
Auto = Annotated[
    bool,
    typer.Option(
        "--auto",
        help="Choose the best plan for this machine's ranks, as `partita measure` found them. Sizes that are given stay fixed.",
        rich_help_panel=SPLIT,
    ),
]
ScheduleKind = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="KIND",
        help="Run this pipeline schedule: gpipe, 1f1b, interleaved-1f1b, zb-h1, zb-h2 or zb-v; see `partita schedule --help`.",
        show_default=False,
        rich_help_panel=PIPELINE,
    ),
]
Microbatches = Annotated[
    int | None,
    typer.Option(
        "--microbatches",
        min=1,
        help="Split each replica's batch into this many micro-batches (default: 1, or enough to keep a pipeline busy).",
        show_default=False,
        rich_help_panel=PIPELINE,
    ),
]


def _set_lost_after(seconds: float | None) -> float | None:
    """Put the value into the environment, from which the ranks and their launcher read it."""
    if seconds is not None:
        os.environ[LOST_AFTER] = f"{seconds:g}"
    return seconds


LostAfter = Annotated[
    float | None,
    typer.Option(
        "--lost-after",
        min=0.0,
        metavar="SECONDS",
        callback=_set_lost_after,
        help=f"End the run when a rank is silent for this long; 0 disables this (default: {LOST_AFTER}, else 30).",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model (its config's auto_map; on MLX only its tokenizer's). Read it before "
        "you do.",
        rich_help_panel=WEIGHTS,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]


class Dtype(StrEnum):
    """The dtypes in which a model can run."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


WeightsDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        help="Dtype of the weights (default: the model's own).",
        show_default=False,
        rich_help_panel=WEIGHTS,
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        help="Do not compare the files of a training checkpoint with their checksums.",
        rich_help_panel=WEIGHTS,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Device of the model: cpu, cuda, ... (default: each rank's GPU, or the CPU if it has none).",
        show_default=False,
        rich_help_panel=RUN,
    ),
]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options that specify how a model is split; `given` has the names of those that are given on the command line."""

    tp: TensorRanks = 1
    pp: PipelineRanks = 1
    dp: Replicas = 1
    cp: ContextRanks = 1
    ep: ExpertRanks = 1
    etp: ExpertTensorRanks = None
    layout: LayoutText = None
    vpp: VirtualStages = None
    plan: PlanFile = None
    given: frozenset[str] = frozenset()


SPLIT_OPTIONS = tuple(one.name for one in fields(PlanOptions) if one.name not in ("plan", "given"))
"""The options of `PlanOptions` that a plan file replaces."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every command that runs a model."""

    device: Device = None
    trust_remote_code: TrustRemoteCode = False
    engine: EngineOption = None
    backend: BackendOption = None
    lost_after: LostAfter = None
    as_json: AsJson = False
