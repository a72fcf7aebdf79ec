"""`train --resume`: the options that come from the checkpoint, and those that the command line may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.checkpoint.run_folder import RunFolder
from partita.cli.arguments.engine import EngineChoice, is_installed
from partita.cli.arguments.options import SPLIT_OPTIONS
from partita.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from partita.training.state import TrainingState

LORA = ("lora_alpha", "lora_dropout", "lora_targets", "lora_rslora", "lora_dora")
"""Options of adapters besides their rank."""

NOTED = ("config", "model", "dtype", "lora_rank", *LORA)
"""Options that only start a run. A resumed run does not use them; they may be repeated unchanged."""

LAYOUT = (*SPLIT_OPTIONS, "schedule", "microbatches", "group_size")
"""Options that specify how the work is distributed. If none is given, a resumed run keeps those that it started with."""

KEPT = (
    "data", "text_column", "eval_data", "eval_every", "save_every", "keep", "engine", "zero", "checkpointing", "compile",
    "report_to", "peak_flops",
)  # fmt: skip
"""Options that are taken from the checkpoint unless they are given again."""

TORCH_ONLY: Mapping[str, tuple[object, ...]] = {
    "zero": (True, 2, 3), "checkpointing": ("selective",), "compile": (True,),
}  # fmt: skip
"""Values of options of `KEPT` that MLX does not have; a run that continues there leaves them out."""

_WHY_NOT: Mapping[str, str] = {
    "config": "its weights are those of the checkpoint",
    "model": "its weights are those of the checkpoint",
    "dtype": "its weights and the optimizer's state have their dtype",
    "lora_rank": "its adapters have their rank",
    **dict.fromkeys(LORA, "its adapters were created with it"),
}
"""Why an option of `NOTED` cannot change."""


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
                f"{folder}: the run started with {_option(name, notes.get(name))}, not {_option(name, options[name])}, and "
                f"{_WHY_NOT[name]}. Leave it out."
            )
    then = {**asdict(state.settings), **{name: notes[name] for name in KEPT if notes.get(name) is not None}}
    made = {name: options[name] if name in given else then.get(name, value) for name, value in options.items()}
    settings = {name: made[name] for name in asdict(state.settings) if name in made}
    state.refuse_other(settings, folder)
    return made


def resumed_layout(state: TrainingState, options: Mapping[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """The options of `LAYOUT` of a resumed run: from the command line if it gives any of them, else the run's own."""
    return {**options, **({} if given & set(LAYOUT) else state.notes.get("layout") or {})}


def kept_engine(state: TrainingState) -> EngineChoice | None:
    """The engine of the run, if the checkpoint names it and it is installed."""
    name = state.notes.get("engine")
    return EngineChoice(name) if name in ("torch", "mlx") and is_installed(name) else None


def changes(state: TrainingState, now: Mapping[str, Any], given: frozenset[str]) -> list[str]:
    """Lines about the options that differ from the run's: `--tp 1 (the run used 2)`.

    Args:
        state: The state of the checkpoint.
        now: The options of the resumed run, by their parameters' names; only those that the checkpoint has are compared.
        given: The names of those that are given on the command line.
    """
    then = {**state.notes, **(state.notes.get("layout") or {}), "steps": state.settings.steps}
    lines = []
    for name in ("engine", *LAYOUT, *(one for one in KEPT if one != "engine"), "steps"):
        if name not in then or then[name] == now[name] or not (_is_set(then[name]) or _is_set(now[name])):
            continue
        line = f"{_option(name, now[name])} (the run used {_value(then[name])})"
        if name == "steps" and state.settings.lr_schedule != "constant":
            line += ": the learning rate now decays over all of them"
        elif name in LAYOUT and name not in given:
            line += ": options of the layout replace all of the run's own"
        lines.append(line)
    return lines


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "its default" if value is None else "it" if value is True else "none" if value is False else str(value)


def _option(name: str, value: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, (list, tuple)):
        return " ".join(f"{option} {one}" for one in value)
    return option if value is True else f"no {option}" if value is None or value is False else f"{option} {value}"
