"""The options of `train` for the optimizer and its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer

OPTIMIZER = "Optimizer"


class OptimizerKind(StrEnum):
    """The optimizers; the two refused ones are told why."""

    adamw = "adamw"
    sgd = "sgd"
    muon = "muon"
    adafactor = "adafactor"
    adamw_8bit = "adamw-8bit"


class RateSchedule(StrEnum):
    """How the learning rate changes after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class AuxLossScope(StrEnum):
    """The tokens over which the auxiliary loss of routers is computed."""

    microbatch = "microbatch"
    sequence = "sequence"


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Options for the optimizer and its learning rate."""

    optimizer: Annotated[
        OptimizerKind,
        typer.Option(
            "--optimizer",
            metavar="KIND",
            help="Update the weights with `adamw`, with `sgd` and momentum, or with `muon` for the layers' matrices and AdamW "
            "for the rest (torch).",
            rich_help_panel=OPTIMIZER,
        ),
    ] = OptimizerKind.adamw
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.", rich_help_panel=OPTIMIZER)] = 3e-4
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps until the peak; --lr-schedule follows.", rich_help_panel=OPTIMIZER)
    ] = 10
    lr_schedule: Annotated[
        RateSchedule,
        typer.Option(
            "--lr-schedule",
            metavar="KIND",
            help="Decay the learning rate to a tenth of the peak by a `cosine` or a line (`linear`), leave it `constant`, or "
            "decay it by a line over the last --decay-steps (`wsd`: warm-up, stable, decay).",
            rich_help_panel=OPTIMIZER,
        ),
    ] = RateSchedule.cosine
    decay_steps: Annotated[
        int | None,
        typer.Option(
            "--decay-steps",
            min=1,
            metavar="STEPS",
            help="Steps of the decay of wsd (default: a tenth of all).",
            show_default=False,
            rich_help_panel=OPTIMIZER,
        ),
    ] = None
    weight_decay: Annotated[
        float, typer.Option(min=0.0, help="Weight decay of matrices.", rich_help_panel=OPTIMIZER)
    ] = 0.1
    beta1: Annotated[
        float, typer.Option("--beta1", min=0.0, help="AdamW's decay of the mean gradient.", rich_help_panel=OPTIMIZER)
    ] = 0.9
    beta2: Annotated[
        float,
        typer.Option("--beta2", min=0.0, help="AdamW's decay of the mean squared gradient.", rich_help_panel=OPTIMIZER),
    ] = 0.95
    epsilon: Annotated[
        float, typer.Option("--epsilon", min=0.0, help="AdamW's epsilon.", rich_help_panel=OPTIMIZER)
    ] = 1e-8
    momentum: Annotated[
        float, typer.Option("--momentum", min=0.0, help="Momentum of SGD and Muon.", rich_help_panel=OPTIMIZER)
    ] = 0.9
    clip_norm: Annotated[
        float,
        typer.Option(
            "--grad-clip",
            min=0.0,
            help="Scale gradients down to this norm of the unsplit model's gradient; 0 to leave them.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = 1.0
    aux_loss_scope: Annotated[
        AuxLossScope,
        typer.Option(
            "--aux-loss-scope",
            help="Compute the routers' auxiliary loss over each micro-batch, as transformers does, or over each sequence, "
            "which makes it independent of the layout. The config's `output_router_logits` enables this loss.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = AuxLossScope.microbatch

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """These options as fields of `TrainSettings`."""
        names = (
            "learning_rate",
            "warmup_steps",
            "decay_steps",
            "weight_decay",
            "beta1",
            "beta2",
            "epsilon",
            "momentum",
            "clip_norm",
        )
        return {
            **{name: getattr(self, name) for name in names},
            **{name: getattr(self, name).value for name in ("optimizer", "lr_schedule", "aux_loss_scope")},
        }
