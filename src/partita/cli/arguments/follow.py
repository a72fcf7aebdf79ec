"""The options of `train` that follow a run: reports, profiles and the share of the peak."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.errors import ModelError, PlanError
from partita.training.follow import Follow, Profile
from partita.training.reporting import REPORTERS, check_reporter, open_reporters

PANEL = "Reports"
PROFILE = "profile"
"""The folder of traces inside a run's folder."""


@dataclass(frozen=True, kw_only=True)
class FollowOptions:
    """Options for what is recorded of a run."""

    report_to: Annotated[
        list[str] | None,
        typer.Option(
            "--report-to",
            metavar="KIND",
            help="Write loss, gradient norm, learning rate, tokens per second, memory, MFU and evaluation loss of each step "
            "into --out: `jsonl`, `tensorboard` or `wandb` (`none` to end it). Give it again for several.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="FIRST:LAST",
            help="Write a trace of these steps for ui.perfetto.dev into --out, a file for each rank.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    peak_flops: Annotated[
        float | None,
        typer.Option(
            "--peak-flops",
            min=1.0,
            help="Operations per second of a device, for MFU (default: those of a known CUDA device).",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None


def check_follow(report_to: list[str] | None, profile: str | None, out: Path | None) -> None:
    """Raise an error, before ranks start, for reports or profiles that are not possible."""
    kinds = wanted(report_to)
    for kind in kinds:
        if kind not in REPORTERS:
            raise ModelError(f"--report-to must be one of {', '.join(REPORTERS)} or none, but is {kind!r}.")
        check_reporter(kind)
    for option, value in (("--report-to", kinds), ("--profile", profile)):
        if value and out is None:
            raise ModelError(f"{option} writes into the run's folder. Give --out.")
    if profile is not None:
        _steps(profile)


def wanted(report_to: list[str] | None) -> list[str]:
    """The kinds of `--report-to`, each once; none if it was `none`."""
    return [kind for kind in dict.fromkeys(report_to or ()) if kind != "none"]


def follow_of(notes: dict[str, Any], profile: str | None, out: Path | None, *, is_first: bool) -> Follow:
    """What is recorded of a run; only the first rank has reporters."""
    traced = Profile(*_steps(profile), out / PROFILE) if profile is not None and out is not None else None
    reporters = open_reporters(wanted(notes["report_to"]), out) if is_first and out is not None else []
    return Follow(reporters, traced, notes["peak_flops"])


def _steps(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise PlanError(
            f"--profile must be FIRST:LAST, steps counted from 1 and both included, but is {text!r}. Use `--profile 10:12`."
        )
    return first, last
