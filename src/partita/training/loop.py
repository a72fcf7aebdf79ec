"""The loop over the steps of a run, the same on both engines: an engine passes the functions that use tensors."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from partita.errors import ModelError
from partita.ranks.liveness import doing
from partita.schedule import Timeline
from partita.training.data.samples import TrainingData
from partita.training.saving import Saver, Saves, state_of
from partita.training.settings import StepReport, TrainSettings
from partita.training.state import TrainingState, read_state


@dataclass(frozen=True)
class StepHooks:
    """The functions of an engine for a step.

    Attributes:
        backward: Computes the gradients of a step, counted from 0, and returns the mean loss of the complete batch and the
            number of its tokens; reports the times of its actions to the second argument unless it is None.
        clip: Scales the gradients down to the largest norm, and returns their norm before.
        update: Updates the trained parameters at a learning rate, and drops the gradients.
        evaluate: Returns the mean loss of the evaluation set; None without one.
    """

    backward: Callable[[int, Callable[[Timeline], None] | None], tuple[float, int]]
    clip: Callable[[], float]
    update: Callable[[float], None]
    evaluate: Callable[[], float] | None = None


def begin_run(
    settings: TrainSettings,
    data: TrainingData,
    saves: Saves | None,
    resume: str | os.PathLike[str] | None,
    *,
    collective: Callable[[], AbstractContextManager[None]],
    restore: Callable[[Path], None],
) -> TrainingState:
    """The state of a new run, or of one that resumes from the checkpoint `resume`; every rank must call this.

    Args:
        settings: The training settings.
        data: The data to train on.
        saves: The settings for checkpoints.
        resume: A checkpoint of the run.
        collective: Makes a block at whose end every rank raises what one of them raised in it.
        restore: Restores the optimizer's state from a checkpoint.

    Raises:
        CheckpointError: The checkpoint belongs to another run; on every rank.
    """
    with collective():
        run = state_of(settings, data, saves)
    if resume is None:
        return run
    folder = Path(resume)
    with collective():
        run = run.at(read_state(folder).go_on(run, folder))
    restore(folder)
    return run


def run_steps(
    run: TrainingState,
    settings: TrainSettings,
    hooks: StepHooks,
    saver: Saver | None,
    *,
    on_step: Callable[[StepReport], None] | None = None,
    on_timeline: Callable[[Timeline], None] | None = None,
) -> list[StepReport]:
    """Run the remaining steps of `run`, and save as `saver` specifies; every rank must call this.

    Returns:
        A report for each step that this call ran.

    Raises:
        ModelError: The loss or the gradient's norm is not finite.
        CheckpointError: A checkpoint cannot be written; on every rank.
    """
    reports = []
    with saver if saver is not None else nullcontext():
        for step in range(run.step, settings.steps):
            with doing(f"training step {step + 1} of {settings.steps}"):
                report = _step(step, settings, hooks, saver, on_timeline if step == settings.steps - 1 else None)
            reports.append(report)
            if on_step is not None:
                on_step(report)
            if saver is not None:
                saver.after(step + 1)
        if saver is not None:
            saver.finish(settings.steps)
    return reports


def _step(
    step: int,
    settings: TrainSettings,
    hooks: StepHooks,
    saver: Saver | None,
    on_timeline: Callable[[Timeline], None] | None,
) -> StepReport:
    start_s = time.perf_counter()
    loss, tokens = hooks.backward(step, on_timeline)
    norm = hooks.clip()
    if not math.isfinite(loss) or not math.isfinite(norm):
        if saver is not None:
            saver.wait()
        raise ModelError(
            f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}. Lower the learning rate "
            f"({settings.learning_rate}) or clip_norm ({settings.clip_norm}), or train in a wider dtype."
        )
    rate = settings.learning_rate_at(step)
    hooks.update(rate)
    seconds = time.perf_counter() - start_s
    return StepReport(step + 1, loss, rate, norm, tokens, seconds, _evaluated(step + 1, settings, hooks))


def _evaluated(step: int, settings: TrainSettings, hooks: StepHooks) -> float | None:
    """The loss of the evaluation set, if it is due after step `step`, counted from 1."""
    is_due = step == settings.steps or (settings.eval_every is not None and step % settings.eval_every == 0)
    if hooks.evaluate is None or not is_due:
        return None
    with doing(f"evaluation after step {step} of {settings.steps}"):
        return hooks.evaluate()
