"""Options that several commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from partita.cli.arguments.engine import BackendOption, EngineOption
from partita.ranks.liveness import LOST_AFTER

PIPELINE = "Pipeline"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder in Hugging Face's form, a config file, or a hub id (owner/name).",
        show_default=False,
    ),
]
TensorRanks = Annotated[int, typer.Option("--tp", min=1, help="Tensor parallel ranks: each layer is cut over them.")]
PipelineRanks = Annotated[int, typer.Option("--pp", min=1, help="Pipeline ranks: the layers are dealt out over them.")]
Replicas = Annotated[int, typer.Option("--dp", min=1, help="Data parallel replicas.")]
LayoutText = Annotated[
    str | None,
    typer.Option(
        "--layout",
        help="Which layers each stage runs, as in `partita layout`; by default they are dealt out evenly.",
        show_default=False,
        rich_help_panel=PIPELINE,
    ),
]
VirtualStages = Annotated[
    int | None,
    typer.Option(
        "--vpp",
        min=1,
        help="Stages on each pipeline rank; by default as many as the layout or the schedule has.",
        show_default=False,
        rich_help_panel=PIPELINE,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="A plan that `partita plan --save` wrote, instead of --tp, --pp, --dp, --layout and --vpp.",
        exists=True,
        dir_okay=False,
        readable=True,
        show_default=False,
        rich_help_panel=PIPELINE,
    ),
]
ScheduleKind = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="KIND",
        help="Of pipelines: gpipe, 1f1b, interleaved-1f1b, zb-h1, zb-h2 or zb-v; see `partita schedule --help`.",
        show_default=False,
        rich_help_panel=PIPELINE,
    ),
]
Microbatches = Annotated[
    int | None,
    typer.Option(
        "--microbatches",
        min=1,
        help="Micro-batches of a step, for each replica (default: 1, or as many as keep a pipeline busy).",
        show_default=False,
    ),
]


def _set_lost_after(seconds: float | None) -> float | None:
    """Ranks and their launcher find it in the environment."""
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
        help=f"A rank that is silent for so long is lost, which ends the run; 0 for never. By default {LOST_AFTER}, else 30.",
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model (its config's auto_map; on MLX only its tokenizer's). Read it before "
        "you do.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Dtype(StrEnum):
    """The dtypes that a model can be run in."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


WeightsDtype = Annotated[
    Dtype | None, typer.Option("--dtype", help="Of the weights; by default the model's own.", show_default=False)
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, ...; by default each rank's GPU, or the CPU where there is none.",
        show_default=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options that say how a model is split; `given` are the names of those that stand on the command line."""

    tp: TensorRanks = 1
    pp: PipelineRanks = 1
    dp: Replicas = 1
    layout: LayoutText = None
    vpp: VirtualStages = None
    plan: PlanFile = None
    given: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every command that runs a model."""

    device: Device = None
    trust_remote_code: TrustRemoteCode = False
    engine: EngineOption = None
    backend: BackendOption = None
    lost_after: LostAfter = None
    as_json: AsJson = False
