"""The settings of a plan file, as options of `partita train`."""

from __future__ import annotations

from collections.abc import Set as SetOf
from typing import Any

from partita.core.plan_settings import PlanSettings
from partita.errors import PlanError
from partita.notes import note
from partita.planner.engines import ENGINES
from partita.ranks.environment import EngineName

_CHECKPOINTING = {"none": False, "selective": "selective", "full": True}


def use_settings(
    settings: PlanSettings, engine: EngineName, given: SetOf[str], places: dict[str, Any], run: dict[str, Any],
    notes: dict[str, Any],
) -> None:  # fmt: skip
    """Put the settings of a plan in the place of options that the command line does not give, and report those that it does.

    Args:
        settings: The settings.
        engine: The engine that executes the plan.
        given: The names of the options that are given.
        places: The options of the schedule; changed.
        run: The settings of training; changed.
        notes: The options that are kept with checkpoints; changed.

    Raises:
        PlanError: The engine does not execute a setting.
    """
    check_settings(settings, engine, given)
    asked = settings.given
    options: dict[str, tuple[str, dict[str, Any], Any]] = {
        "schedule": ("schedule", places, asked.get("schedule")),
        "microbatches": ("microbatches", places, asked.get("microbatches")),
        "batch_size": ("batch_size", run, asked.get("batch_size")),
        "sequence_length": ("sequence_length", run, asked.get("sequence_length")),
        "zero": ("zero", notes, bool(asked.get("zero"))),
        "recompute": ("checkpointing", notes, _CHECKPOINTING.get(asked.get("recompute", "none"))),
        "dtype": ("dtype", notes, asked.get("dtype")),
    }
    for name, (option, target, value) in options.items():
        if name not in asked:
            continue
        if option in given:
            if target[option] != value:
                note(f"--{option.replace('_', '-')} replaces {name} {asked[name]} of the plan.")
        else:
            target[option] = value


def check_settings(settings: PlanSettings, engine: EngineName, given: SetOf[str] = frozenset()) -> None:
    """Raise `PlanError` for a setting that `engine` does not execute, unless an option replaces it."""
    features = ENGINES[engine]
    wanted = {
        "zero": (settings.zero or 0, features.zero, "zero"),
        "recompute": (settings.recompute or "none", features.recompute, "checkpointing"),
        "sequence_parallel": (settings.sequence_parallel or False, features.sequence_parallel, ""),
        "overlap_gradients": (settings.overlap_gradients or False, features.overlap_gradients, ""),
    }
    for name, (value, known, option) in wanted.items():
        if value not in known and option not in given:
            instead = f"Give --{option}, or make" if option else "Make"
            raise PlanError(
                f"the plan has {name} {str(value).lower()}, which the {engine} engine does not execute in training (it has "
                f"{', '.join(str(one).lower() for one in known)}). {instead} another plan."
            )
