"""`train --resume`: what the checkpoint says of the run, and what a command line may say otherwise."""

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
"""Options that began a run, of which a resumed one has no use; they may be given again as they were."""

LAYOUT = ("tp", "pp", "dp", "layout", "vpp", "schedule", "microbatches", "group_size")
"""Options that say how the work is distributed. Where none is given, a resumed run has those of the command that began it."""

KEPT = ("data", "save_every", "keep")
"""Options that are taken from the checkpoint unless they are given anew."""


def newest_state(folder: Path | None) -> tuple[Path, TrainingState]:
    """The newest checkpoint of a run whose state can be read, which is not to say that it is whole, and its state.

    Raises:
        CheckpointError: There is none.
        ModelError: There is no folder.
    """
    from partita.training.state import read_state

    if folder is None:
        raise ModelError("--resume goes on from the newest checkpoint in --out DIR. Give --out.")
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
        f"--out {folder} holds no checkpoint of a run to go on from. Start it without --resume, with --save-every."
    )


def resumed_options(
    folder: Path, state: TrainingState, options: Mapping[str, Any], given: frozenset[str]
) -> dict[str, Any]:
    """The options of a resumed run: what is given on the command line where it may be, else what the checkpoint says.

    Args:
        folder: The checkpoint.
        state: Its state.
        options: All options by their parameters' names; of adapters `--model` may name where their model lies now.
        given: Those that stand on the command line.

    Raises:
        CheckpointError: It would be another run.
    """
    notes = state.notes
    for name in NOTED:
        if name == "model" and state.base is not None:
            continue  # It may lie elsewhere by now, and is looked at itself.
        if name in given and options[name] != notes.get(name):
            raise CheckpointError(
                f"{folder}: the run began with {_said(name, notes.get(name))}, not {_said(name, options[name])}. Leave it out."
            )
    then = {**asdict(state.settings), **{name: notes[name] for name in KEPT if notes.get(name) is not None}}
    made = {name: options[name] if name in given else then.get(name, value) for name, value in options.items()}
    settings = {name: made[name] for name in asdict(state.settings) if name in made}
    state.refuse_other(settings, folder)
    return made


def resumed_layout(state: TrainingState, options: Mapping[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Of a resumed run the options of `LAYOUT`: as on the command line if one of them is given there, else the run's own."""
    return {**options, **({} if given & set(LAYOUT) else state.notes.get("layout") or {})}


def _said(name: str, value: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    return f"{option} {value}" if value is not None else f"no {option}"
