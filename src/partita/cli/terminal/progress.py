"""Progress on stderr: a live bar on a terminal, occasional lines elsewhere. Only the first rank prints it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from partita.cli.terminal.console import err, size
from partita.ranks import environment

if TYPE_CHECKING:
    from partita.serving.answer_all import Progress as AnswerProgress
    from partita.training import StepReport
    from partita.training.saving import SaveReport

LINE_EVERY_S = 5.0
"""Seconds between two lines where stderr is not a terminal."""

AVERAGED = 20
"""The number of last steps over which tokens per second and MFU are averaged."""


@contextlib.contextmanager
def loading(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show how many bytes of a model are loaded; the engine calls the function that this yields."""
    if not environment.is_first() or not err().is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes or None)

        yield show


@contextlib.contextmanager
def preparing() -> Iterator[Callable[[int, int], None] | None]:
    """Show how many bytes of the data are encoded. Nothing is shown for data that was encoded before."""
    if not environment.is_first() or not err().is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task("encoding", total=None, visible=False)
        yield lambda done_bytes, total_bytes: bar.update(
            task, completed=done_bytes, total=total_bytes or None, visible=True
        )


@contextlib.contextmanager
def answering() -> Iterator[Callable[[AnswerProgress], None]]:
    """Show how many prompts of a file are answered, the tokens per second, the errors, and the time left."""
    start_s = time.monotonic()

    def numbers(one: AnswerProgress) -> str:
        errors = f", {one.errors} with an error" if one.errors else ""
        return f"{one.tokens / max(1e-3, time.monotonic() - start_s):,.1f} tokens/s{errors}"

    if err().is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=err()) as bar:
            task = bar.add_task("", total=None, numbers="")
            yield lambda one: bar.update(task, completed=one.done, total=one.total, numbers=numbers(one))
        return
    last_s = start_s

    def show(one: AnswerProgress) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= LINE_EVERY_S:
            last_s = time.monotonic()
            err().print(f"{one.done:,}/{one.total:,} prompts  {numbers(one)}", soft_wrap=True)

    yield show


@contextlib.contextmanager
def training(steps: int, done: int = 0) -> Iterator[Callable[[StepReport], None] | None]:
    """Show the steps of a training run: loss, learning rate, gradient norm, speed, memory and the time left.

    In a resumed run, the first `done` steps were completed before.
    """
    if not environment.is_first():
        yield None
    elif err().is_terminal:
        with _training_bar(steps, done) as show:
            yield show
    else:
        yield _TrainingLines(steps, done)


@contextlib.contextmanager
def _training_bar(steps: int, done: int) -> Iterator[Callable[[StepReport], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    numbers = TextColumn("{task.fields[numbers]}")
    columns = (BarColumn(bar_width=12), MofNCompleteColumn(), numbers, TimeRemainingColumn(compact=True))
    with Progress(*columns, console=err()) as bar:
        task = bar.add_task("", total=steps, completed=done, numbers="")
        recent = Recent()

        def show(report: StepReport) -> None:
            bar.update(task, completed=report.step, numbers=recent.describe(report))
            if report.eval_loss is not None:
                bar.console.print(f"step {report.step}: evaluation loss {report.eval_loss:.4f}", soft_wrap=True)

        yield show


class _TrainingLines:
    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.done = steps, done
        self.start_s = self.last_s = time.monotonic()
        self.recent = Recent()

    def __call__(self, report: StepReport) -> None:
        now_s = time.monotonic()
        numbers = self.recent.describe(report)
        is_told = report.step in (self.done + 1, self.steps) or report.eval_loss is not None
        if is_told or now_s - self.last_s >= LINE_EVERY_S:
            self.last_s = now_s
            left_s = (now_s - self.start_s) / (report.step - self.done) * (self.steps - report.step)
            err().print(f"step {report.step}/{self.steps}  {numbers}  {left_s:.0f} s left", soft_wrap=True)


class Recent:
    """The last steps, over which speeds are averaged. The first step, which prepares much, counts only until the second."""

    def __init__(self) -> None:
        self._steps: deque[StepReport] = deque(maxlen=AVERAGED)
        self._count = 0

    def describe(self, report: StepReport) -> str:
        """The numbers of a step in one line, its speed averaged over the last steps."""
        self._count += 1
        if self._count == 2:
            self._steps.clear()
        self._steps.append(report)
        seconds = sum(one.seconds for one in self._steps)
        parts = [f"loss {report.loss:.4f}"]
        if report.eval_loss is not None:
            parts.append(f"evaluation {report.eval_loss:.4f}")
        parts += [f"lr {report.learning_rate:.1e}", f"grad {report.grad_norm:.2f}"]
        parts.append(f"{sum(one.tokens for one in self._steps) / seconds:,.0f} tokens/s")
        if report.mfu is not None:
            parts.append(f"MFU {sum((one.mfu or 0.0) * one.seconds for one in self._steps) / seconds:.1%}")
        if report.memory_bytes is not None:
            parts.append(size(report.memory_bytes))
        return " ".join(parts)


def saved(report: SaveReport) -> None:
    """Report a checkpoint that was written in the background while training continued."""
    if environment.is_first():
        err().print(
            f"step {report.step} saved to {report.folder} in {report.seconds:.1f} s, of which training was paused for "
            f"{report.held_s:.2f} s",
            soft_wrap=True,
        )


@contextlib.contextmanager
def saving(folder: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show how many bytes of a model have been written."""
    if not environment.is_first() or not err().is_terminal:
        yield None
        return
    with err().status(f"saving to {folder}") as status:
        yield lambda done_bytes, total_bytes: status.update(
            f"saving to {folder}: {size(done_bytes)} of {size(total_bytes)}"
        )
