"""The loop over the steps of a run, the same on both engines: an engine passes the functions that use tensors."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from partita.errors import ModelError
from partita.ranks.groups import AxisGroups, Communicator
from partita.ranks.liveness import doing
from partita.schedule import Timeline
from partita.training.data.samples import TrainingData
from partita.training.finite import Fault, diverged, gathered_faults
from partita.training.follow import Follow
from partita.training.meter import Meter
from partita.training.reporting import recording
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
        update: Updates the trained parameters in a step, counted from 0, drops the gradients, and returns the learning rate.
        fault: What is not finite on this rank, after a step whose loss or norm is not.
        meter: Measures the steps.
        traced: Creates a context that writes a trace of the steps in it into a file.
        evaluate: Returns the mean loss of the evaluation set; None without one.
    """

    backward: Callable[[int, Callable[[Timeline], None] | None], tuple[float, int]]
    clip: Callable[[], float]
    update: Callable[[int], float]
    fault: Callable[[], Fault]
    meter: Meter
    traced: Callable[[Path], AbstractContextManager[Callable[[int, Timeline], None] | None]]
    evaluate: Callable[[], float] | None = None


def begin_run(
    settings: TrainSettings,
    data: TrainingData,
    saves: Saves | None,
    resume: str | os.PathLike[str] | None,
    *,
    collective: Callable[[], AbstractContextManager[None]],
    restore: Callable[[Path], None],
    own: tuple[str, ...] = (),
) -> TrainingState:
    """The state of a new run, or of one that resumes from the checkpoint `resume`; every rank must call this.

    Args:
        settings: The training settings.
        data: The data to train on.
        saves: The settings for checkpoints.
        resume: A checkpoint of the run.
        collective: Makes a block at whose end every rank raises what one of them raised in it.
        restore: Restores the optimizer's state from a checkpoint.
        own: What the caller gave in place of the settings' own; see `TrainingState`.

    Raises:
        CheckpointError: The checkpoint belongs to another run; on every rank.
    """
    with collective():
        run = replace(state_of(settings, data, saves), own=own)
    if resume is None:
        return run
    folder = Path(resume)
    with collective():
        run = run.at(read_state(folder).go_on(run, folder))
    restore(folder)
    return run


@dataclass(frozen=True)
class Watch:
    """Who is told what of a run.

    Attributes:
        groups: This rank's groups.
        follow: What is recorded.
        on_step: Called after every step, on every rank.
        on_timeline: Called on every rank with the start and end of each action of the last step.
    """

    groups: AxisGroups[Communicator]
    follow: Follow = field(default_factory=Follow)
    on_step: Callable[[StepReport], None] | None = None
    on_timeline: Callable[[Timeline], None] | None = None


def run_steps(
    run: TrainingState, settings: TrainSettings, hooks: StepHooks, saver: Saver | None, watch: Watch
) -> list[StepReport]:
    """Run the remaining steps of `run`, and save as `saver` specifies; every rank must call this.

    Returns:
        A report for each step that this call ran.

    Raises:
        DivergedError: The loss or the gradient's norm is not finite; on every rank, before the step changes a weight.
        CheckpointError: A checkpoint or a record cannot be written.
        PlanError: The profile has steps that this call does not run.
    """
    reports = []
    follow = watch.follow
    if follow.profile is not None:
        follow.profile.check(run.step, settings.steps)
    reporters = follow.reporters if watch.groups.rank == 0 else ()
    with (
        saver if saver is not None else nullcontext(),
        recording(reporters, run.step, asdict(settings)),
        _Trace(hooks, watch) as trace,
    ):
        for step in range(run.step, settings.steps):
            on_timeline = trace.before(step + 1, watch.on_timeline if step == settings.steps - 1 else None)
            with doing(f"training step {step + 1} of {settings.steps}"):
                report = _step(step, run.step, settings, hooks, saver, watch, on_timeline)
            trace.after(step + 1)
            reports.append(report)
            for reporter in reporters:
                reporter.step(report)
            if watch.on_step is not None:
                watch.on_step(report)
            if saver is not None:
                saver.after(step + 1)
        if saver is not None:
            saver.finish(settings.steps)
    return reports


class _Trace(ExitStack):
    """The trace of the steps of a profile."""

    def __init__(self, hooks: StepHooks, watch: Watch) -> None:
        super().__init__()
        self.profile, self.rank, self.traced = watch.follow.profile, watch.groups.rank, hooks.traced
        self.keep: Callable[[int, Timeline], None] | None = None

    def before(self, step: int, on_timeline: Callable[[Timeline], None] | None) -> Callable[[Timeline], None] | None:
        """Begin the trace if `step` is its first. Returns the function that receives the times of the step's actions."""
        if self.profile is not None and step == self.profile.first:
            self.keep = self.enter_context(self.traced(self.profile.file(self.rank)))
        if (keep := self.keep) is None:
            return on_timeline

        def both(timeline: Timeline) -> None:
            keep(step, timeline)
            if on_timeline is not None:
                on_timeline(timeline)

        return both

    def after(self, step: int) -> None:
        """Write the trace if `step` was its last."""
        if self.profile is not None and step == self.profile.last:
            self.keep = None
            self.close()


def _step(
    step: int,
    first: int,
    settings: TrainSettings,
    hooks: StepHooks,
    saver: Saver | None,
    watch: Watch,
    on_timeline: Callable[[Timeline], None] | None,
) -> StepReport:
    start_s = time.perf_counter()
    loss, tokens = hooks.backward(step, on_timeline)
    norm = hooks.clip()
    if not math.isfinite(loss) or not math.isfinite(norm):
        if saver is not None:
            saver.wait()
        faults = gathered_faults(watch.groups.axes, hooks.fault())
        raise diverged(step, loss, norm, settings, watch.groups.dp.size, faults)
    rate = hooks.update(step)
    seconds = time.perf_counter() - start_s
    eval_loss = _evaluated(step + 1, settings, hooks)
    memory_bytes = hooks.meter.memory(step, first, settings.steps - 1)
    mfu = hooks.meter.mfu(tokens, seconds)
    return StepReport(step + 1, loss, rate, norm, tokens, seconds, eval_loss, memory_bytes, mfu)


def _evaluated(step: int, settings: TrainSettings, hooks: StepHooks) -> float | None:
    """The loss of the evaluation set, if it is due after step `step`, counted from 1."""
    is_due = step == settings.steps or (settings.eval_every is not None and step % settings.eval_every == 0)
    if hooks.evaluate is None or not is_due:
        return None
    with doing(f"evaluation after step {step} of {settings.steps}"):
        return hooks.evaluate()


def mean_loss(batches: Iterable[Any], summed: Callable[[int, Any], tuple[float, float]]) -> float:
    """The mean loss over all labels of an evaluation set; every rank must call it.

    Args:
        batches: This replica's part of each batch.
        summed: Returns the loss of a complete batch, summed over its labels, and their number or weight; called with the
            batch's number.

    Raises:
        ModelError: No id of the data is trained on.
    """
    losses, counts = 0.0, 0.0
    for number, batch in enumerate(batches):
        loss, count = summed(number, batch)
        losses += loss
        counts += count
    if not counts:
        raise ModelError("no token of the evaluation set is trained on. Give other evaluation data.")
    return losses / counts
