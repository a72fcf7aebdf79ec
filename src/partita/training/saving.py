"""Checkpoints of a run under way: what a rank holds is copied between two steps, and written while training goes on.

At each step that follows the ranks ask each other how the writing stands, so that what fails on one is raised on all at once.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from partita.checkpoint.header import TensorInfo
from partita.checkpoint.index import Checkpoint
from partita.checkpoint.run_folder import RunFolder
from partita.checkpoint.run_lock import RunLock
from partita.checkpoint.write import FilePlan
from partita.errors import CheckpointError, ModelError
from partita.generation import Tokenizer
from partita.ranks.agreement import agreed_state, first_text
from partita.ranks.groups import AxisGroups, Communicator
from partita.training.background import POLL_S, BackgroundWrite, Job, Part
from partita.training.base import Base
from partita.training.settings import TrainSettings
from partita.training.state import STATE_NAME, TrainingState

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Saves:
    """Where and how often a run keeps checkpoints.

    Attributes:
        folder: The run's folder; each checkpoint has a folder of its own in it (see `RunFolder`).
        every: Steps from one to the next; the last step is kept in any case. None: the last alone.
        keep: How many of the newest stay; None for all.
        tokenizer: Saved with each.
        max_shard_bytes: Largest size of one file.
        notes: Kept in the training state, as JSON can say it.
        base: Of adapters the model that they are put on, a folder or a hub id: of such a run only the adapters are kept.
    """

    folder: Path
    every: int | None = None
    keep: int | None = None
    tokenizer: Tokenizer | None = None
    max_shard_bytes: int = 5_000_000_000
    notes: Mapping[str, Any] = field(default_factory=dict)
    base: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise CheckpointError(f"{name} must be a whole number of at least 1, or None, but is {value!r}.")


@dataclass(frozen=True)
class SaveReport:
    """A checkpoint that is whole.

    Attributes:
        step: Steps that it is behind.
        folder: Where it is.
        held_s: Seconds for which training stood still for it on this rank.
        seconds: From the copy until it was in place.
        bytes_written: By this rank.
    """

    step: int
    folder: Path
    held_s: float
    seconds: float
    bytes_written: int


class RankShard(Protocol):
    """What a rank of an engine has to write, and where."""

    @property
    def files(self) -> Mapping[str, tuple[FilePlan, ...]]:
        """The files of weights and of the optimizer's state, the same on every rank, by how their names begin."""

    @property
    def beside(self) -> Mapping[str, bytes]:
        """Small files that belong to the model, on the first rank."""

    def copy(self) -> list[Part]:
        """The present values of all that this rank writes."""

    def counts(self, step: int) -> dict[str, int]:
        """AdamW's steps of what this rank trains, by the names on disk, where they are not `step`."""


def state_of(settings: TrainSettings, text: np.ndarray[Any, Any], saves: Saves | None) -> TrainingState:
    """The state of a run that has not begun, with what its checkpoints are to say.

    Raises:
        PartitaError: The base of its adapters is not there.
    """
    if saves is None:
        return TrainingState.of(settings, text)
    return TrainingState.of(settings, text, saves.notes, Base.of(saves.base) if saves.base is not None else None)


def files_beside(write: Callable[[Path], None]) -> dict[str, bytes]:
    """The files that `write` writes into a folder, by their paths in it."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        write(folder)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def check_base(saves: Saves, *, adapted: bool) -> None:
    """Raise `ModelError` unless a run that keeps adapters, and only such a run, says what they belong to."""
    if adapted and saves.base is None:
        raise ModelError(
            "of a model with LoRA adapters only these are kept, which need their model to go on. Name it on disk, with "
            "Saves(base=...), or merge_lora(model) first."
        )
    if not adapted and saves.base is not None:
        raise ModelError(
            f"base={str(saves.base)!r} is for runs that train adapters, but the model has none. Leave it out."
        )


class Saver:
    """Keeps the checkpoints of a run; every rank has one and calls its methods at the same steps.

    A context manager: leaving it ends what is under way, finished or not, and unlocks the run's folder.
    """

    def __init__(
        self,
        saves: Saves,
        share: RankShard,
        state: TrainingState,
        groups: AxisGroups[Communicator],
        *,
        on_save: Callable[[SaveReport], None] | None = None,
    ) -> None:
        """Make the run's folder and lock it.

        Args:
            saves: Where and how often.
            share: What this rank writes.
            state: The run.
            groups: This rank's groups.
            on_save: Told, on every rank, of each checkpoint that is whole.

        Raises:
            CheckpointError: It cannot be made, holds another run, or another run holds its lock; on every rank.
        """
        self.saves, self.share, self.state, self.on_save = saves, share, state, on_save
        axes, rank = groups.axes, groups.rank
        self.axes, self.rank, self.ranks = axes, rank, groups.mesh.size
        self.last_step = state.step
        self._write: BackgroundWrite | None = None
        self._lock: RunLock | None = None
        try:
            said = None
            if rank == 0:
                try:
                    self._lock = RunLock(saves.folder, saves.notes.get("run_id"))
                    self._refuse_another()
                    RunFolder(saves.folder, self._lock.run).begin()
                except CheckpointError as error:
                    said = str(error)
            said = first_text(axes, said)
            if said is not None:
                raise CheckpointError(said)
            run = first_text(axes, self._lock.run if self._lock is not None else None)
        except BaseException:
            self.close()
            raise
        assert run is not None
        self.run = RunFolder(saves.folder, run)

    def after(self, step: int) -> None:
        """Called behind step `step`, counted from 1: hear of a save under way, and begin the next where it is due.

        Raises:
            CheckpointError: A save failed on some rank; on every rank.
        """
        self._settle()
        if self.saves.every is not None and step % self.saves.every == 0:
            self._begin(step)

    def finish(self, step: int) -> None:
        """Return when the checkpoint of the last step, `step`, is whole. Raises as `after` does."""
        if step != self.last_step:
            self._begin(step)
        self.wait()

    def wait(self) -> None:
        """Return when no save is under way. Raises as `after` does."""
        self._settle(wait=True)

    def close(self) -> None:
        """End what is under way, finished or not, without asking other ranks, and unlock the folder."""
        write, self._write = self._write, None
        if write is not None:
            write.stop()
            if self.rank == 0 and not write.is_done:
                shutil.rmtree(write.job.partial, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()

    def _refuse_another(self) -> None:
        steps = RunFolder(self.saves.folder).steps()
        if self.state.step == 0 and steps:
            raise CheckpointError(
                f"{self.saves.folder}: holds a run already (its last checkpoint is of step {steps[-1]}). Resume it, or save "
                "elsewhere."
            )

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _begin(self, step: int) -> None:
        start_s = time.perf_counter()
        self._settle(wait=True)
        state = self.state.at(step, self._counts(step))
        job = Job(
            self.run, step, self.saves.keep, self.rank, self.ranks, self.share.files, self.share.copy(),
            {**self.share.beside, STATE_NAME: state.to_json().encode()},
        )  # fmt: skip
        self.last_step = step
        self._write = BackgroundWrite(job, time.perf_counter() - start_s)

    def _counts(self, step: int) -> dict[str, int]:
        """AdamW's steps of tensors on all ranks, where they are not `step`."""
        counts = self.share.counts(step)
        for comm in self.axes:
            counts = {name: count for theirs in comm.all_gather_object(counts) for name, count in theirs.items()}
        return counts

    def _settle(self, *, wait: bool = False) -> None:
        """Hear how the save under way stands on all ranks; to `wait` for its end is to hold training up."""
        while (write := self._write) is not None:
            start_s = time.perf_counter()
            error, is_done = agreed_state(self.axes, write.error, write.is_done)
            if error is not None:
                self.close()
                raise CheckpointError(self._failure(write.job.step, error))
            if wait and not is_done:
                time.sleep(POLL_S)
            write.held_s += time.perf_counter() - start_s
            if is_done:
                self._write = None
                if self.on_save is not None:
                    self.on_save(_report(write))
            elif not wait:
                return

    def _failure(self, step: int, said: str) -> str:
        before = [one for one in self.run.steps() if one != step]
        there = (
            f"{self.run.step_folder(before[-1]).name}, from before, is untouched" if before else "there was none before"
        )
        return f"the checkpoint of step {step} could not be written: {said.rstrip('.')}; {there}."


def _report(write: BackgroundWrite) -> SaveReport:
    job = write.job
    return SaveReport(job.step, job.run.step_folder(job.step), write.held_s, write.seconds, job.bytes_written)


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's means of a parameter's gradients and of their squares, as they are called on disk before its name: torch's words."""

MASTER = "master"
"""The float32 copy that is stepped of a parameter of a narrower dtype, as it is called on disk before its name."""

HAS_MASTER = (
    "{}: has {}, so {} was trained there in a narrower dtype than {}, or with another master_dtype. Load it in its own dtype, "
    "and keep the run's master_dtype."
)
OTHER_DTYPE = "{}: {} is {}, but {} was loaded as {}. Load it in its own dtype."


def moments_in(checkpoint: Checkpoint, kind: str) -> dict[str, TensorInfo]:
    """The tensors of one of `MOMENTS` in a checkpoint, by their parameters' names."""
    head = f"{kind}."
    return {name.removeprefix(head): info for name, info in checkpoint.tensors.items() if name.startswith(head)}
