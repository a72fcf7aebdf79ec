"""`train --resume`: the options that come from the checkpoint, and those that the command line may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.checkpoint.run_folder import RunFolder
from partita.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from partita.training.state import TrainingState

NOTED = ("config", "model", "dtype", "lora_rank")
"""Options that only start a run. A resumed run does not use them; they may be repeated unchanged."""

LAYOUT = ("tp", "pp", "dp", "layout", "vpp", "schedule", "microbatches", "group_size")
"""Options that specify how the work is distributed. If none is given, a resumed run keeps those that it started with."""

KEPT = ("data", "save_every", "keep")
"""Options that are taken from the checkpoint unless they are given again."""


def newest_state(folder: Path | None) -> tuple[Path, TrainingState]:
    """The newest checkpoint of a run whose state can be read, and its state. The checkpoint may still be incomplete.

    Raises:
        CheckpointError: The folder holds no checkpoint.
        ModelError: No folder is given.
    """
    from partita.training.state import read_state

    if folder is None:
        raise ModelError("--resume continues from the newest checkpoint in --out DIR. Give --out.")
    run = RunFolder(folder)
    why: CheckpointError | None = None
    for step in reversed(run.steps()):
        try:
            return run.step_folder(step), read_state(run.step_folder(step))
        except CheckpointError as error:
            why = why or error
    if why is not None:
        raise why
    raise CheckpointError(
        f"--out {folder} holds no checkpoint to resume from. Start the run without --resume, with --save-every."
    )


def resumed_options(
    folder: Path, state: TrainingState, options: Mapping[str, Any], given: frozenset[str]
) -> dict[str, Any]:
    """The options of a resumed run: from the command line where it may change them, else from the checkpoint.

    Args:
        folder: The checkpoint's folder.
        state: Its state.
        options: All options by their parameters' names. For adapters, `--model` may name a new path of their model.
        given: The names of those that are given on the command line.

    Raises:
        CheckpointError: The options specify a different run.
    """
    notes = state.notes
    for name in NOTED:
        if name == "model" and state.base is not None:
            continue  # The model may have moved; its contents are checked later.
        if name in given and options[name] != notes.get(name):
            raise CheckpointError(
                f"{folder}: the run started with {_option(name, notes.get(name))}, not {_option(name, options[name])}. "
                "Leave it out."
            )
    then = {**asdict(state.settings), **{name: notes[name] for name in KEPT if notes.get(name) is not None}}
    made = {name: options[name] if name in given else then.get(name, value) for name, value in options.items()}
    settings = {name: made[name] for name in asdict(state.settings) if name in made}
    state.refuse_other(settings, folder)
    return made


def resumed_layout(state: TrainingState, options: Mapping[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """The options of `LAYOUT` of a resumed run: from the command line if it gives any of them, else the run's own."""
    return {**options, **({} if given & set(LAYOUT) else state.notes.get("layout") or {})}


def _option(name: str, value: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    return f"{option} {value}" if value is not None else f"no {option}"
