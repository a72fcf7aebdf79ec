"""Checkpoints during a run: each rank copies its state between two steps, and writes it while training continues.

At each following step the ranks exchange the state of the write, so that all raise an error of one at the same step.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from partita.checkpoint.header import TensorInfo
from partita.checkpoint.index import Checkpoint
from partita.checkpoint.run_folder import RunFolder
from partita.checkpoint.run_lock import RunLock
from partita.checkpoint.write import FilePlan
from partita.core.optimizers import ALL_MOMENTS
from partita.errors import CheckpointError, ModelError
from partita.generation import Tokenizer
from partita.ranks.agreement import agreed_state, first_text
from partita.ranks.groups import AxisGroups, Communicator
from partita.training.background import POLL_S, BackgroundWrite, Job, Part
from partita.training.base import Base
from partita.training.data.samples import TrainingData
from partita.training.settings import TrainSettings
from partita.training.state import STATE_NAME, TrainingState


@dataclass(frozen=True)
class Saves:
    """Settings for the checkpoints of a run.

    Attributes:
        folder: The run's folder, a `Path` or a string; each checkpoint has a folder of its own in it (see `RunFolder`).
        every: Steps between checkpoints; the last step is always saved. None: only the last.
        keep: Number of newest checkpoints to keep; None for all.
        tokenizer: Tokenizer to save with each.
        max_shard_bytes: Largest size of one file.
        notes: JSON data to keep in the training state.
        base: The model of the adapters, a folder or a hub id, if adapters are trained; only the adapters are then saved.
    """

    folder: Path
    every: int | None = None
    keep: int | None = None
    tokenizer: Tokenizer | None = None
    max_shard_bytes: int = 5_000_000_000
    notes: Mapping[str, Any] = field(default_factory=dict)
    base: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, os.PathLike)):
            raise CheckpointError(f"folder must be a path, but is {self.folder!r:.100}.")
        object.__setattr__(self, "folder", Path(self.folder))
        for name in ("every", "keep"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise CheckpointError(f"{name} must be a whole number of at least 1, or None, but is {value!r}.")


@dataclass(frozen=True)
class SaveReport:
    """A complete checkpoint.

    Attributes:
        step: The step after which it was saved.
        folder: The checkpoint's folder.
        held_s: Seconds for which training was paused for it on this rank.
        seconds: Seconds from the copy until it was in place.
        bytes_written: Bytes that this rank wrote.
    """

    step: int
    folder: Path
    held_s: float
    seconds: float
    bytes_written: int


class RankShard(Protocol):
    """The state that a rank of an engine writes, and its files."""

    @property
    def files(self) -> Mapping[str, tuple[FilePlan, ...]]:
        """The files of weights and of the optimizer's state, the same on every rank, by the prefix of their names."""

    @property
    def beside(self) -> Mapping[str, bytes]:
        """Small files that belong to the model, on the first rank."""

    def copy(self) -> list[Part]:
        """Copies of the current values that this rank writes; every rank must call it. Files may differ from then on."""

    def counts(self, step: int) -> dict[str, int]:
        """AdamW's step counts of this rank's parameters, by name on disk, if they differ from `step`."""


def state_of(settings: TrainSettings, data: TrainingData, saves: Saves | None) -> TrainingState:
    """The state of a new run on `data`, with the notes for its checkpoints.

    Raises:
        PartitaError: The base of its adapters does not exist.
    """
    if saves is None:
        return TrainingState(0, settings, data.tokens, data.digest, {})
    base = Base.of(saves.base) if saves.base is not None else None
    return TrainingState(0, settings, data.tokens, data.digest, dict(saves.notes), base)


def files_beside(write: Callable[[Path], None]) -> dict[str, bytes]:
    """The files that `write` writes into a folder, by their paths in it."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        write(folder)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def check_base(saves: Saves, *, adapted: bool) -> None:
    """Raise `ModelError` unless `base` is given for a run that saves adapters, and only for such a run."""
    if adapted and saves.base is None:
        raise ModelError(
            "only the adapters of a model with LoRA adapters are saved, and resuming needs their model. Name it on disk, with "
            "Saves(base=...), or merge_lora(model) first."
        )
    if not adapted and saves.base is not None:
        raise ModelError(
            f"base={str(saves.base)!r} is for runs that train adapters, but the model has none. Leave it out."
        )


class Saver:
    """Saves the checkpoints of a run; every rank has one and calls its methods at the same steps.

    A context manager: leaving it ends a running save, finished or not, and unlocks the run's folder.
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
        """Create the run's folder and lock it.

        Args:
            saves: The settings.
            share: The state that this rank writes.
            state: The state of the run.
            groups: This rank's groups.
            on_save: Callback for each complete checkpoint, on every rank.

        Raises:
            CheckpointError: It cannot be created, holds another run, or another run holds its lock; on every rank.
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
        """Call this after step `step`, counted from 1: check the running save, and begin the next if it is due.

        Raises:
            CheckpointError: A save failed on some rank; on every rank.
        """
        self._settle()
        if self.saves.every is not None and step % self.saves.every == 0:
            self._begin(step)

    def finish(self, step: int) -> None:
        """Wait until the checkpoint of the last step, `step`, is complete. Raises as `after` does."""
        if step != self.last_step:
            self._begin(step)
        self.wait()

    def wait(self) -> None:
        """Wait until no save is running. Raises as `after` does."""
        self._settle(wait=True)

    def close(self) -> None:
        """End a running save, finished or not, without other ranks, and unlock the folder."""
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
                f"{self.saves.folder}: already holds a run (its last checkpoint is of step {steps[-1]}). Resume it, or save "
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
        parts = self.share.copy()
        small = {**self.share.beside, STATE_NAME: state.to_json().encode()}
        job = Job(self.run, step, self.saves.keep, self.rank, self.ranks, self.share.files, parts, small)
        self.last_step = step
        self._write = BackgroundWrite(job, time.perf_counter() - start_s)

    def _counts(self, step: int) -> dict[str, int]:
        """AdamW's step counts of tensors on all ranks, if they differ from `step`."""
        counts = self.share.counts(step)
        for comm in self.axes:
            counts = {name: count for theirs in comm.all_gather_object(counts) for name, count in theirs.items()}
        return counts

    def _settle(self, *, wait: bool = False) -> None:
        """Exchange the state of the running save among all ranks; `wait` for its end pauses training."""
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

    def _failure(self, step: int, reason: str) -> str:
        before = [one for one in self.run.steps() if one != step]
        there = (
            f"{self.run.step_folder(before[-1]).name}, from before, is unchanged" if before else "there was none before"
        )
        return f"the checkpoint of step {step} could not be written: {reason.rstrip('.')}; {there}."


def _report(write: BackgroundWrite) -> SaveReport:
    job = write.job
    return SaveReport(job.step, job.run.step_folder(job.step), write.held_s, write.seconds, job.bytes_written)


MASTER = "master"
"""The float32 copy that is stepped of a parameter of a narrower dtype, as it is called on disk before its name."""

HAS_MASTER = (
    "{}: has {}, so {} was trained there in a narrower dtype than {}, or with another master_dtype. Load it in its own dtype, "
    "and keep the run's master_dtype."
)
OTHER_DTYPE = "{}: {} is {}, but {} was loaded as {}. Load it in its own dtype."


def moments_in(checkpoint: Checkpoint, kind: str) -> dict[str, TensorInfo]:
    """The tensors of one of `ALL_MOMENTS` in a checkpoint, by their parameters' names."""
    head = f"{kind}."
    return {name.removeprefix(head): info for name, info in checkpoint.tensors.items() if name.startswith(head)}


def trained_in(checkpoint: Checkpoint) -> set[str]:
    """The names of the parameters that have moments in a checkpoint."""
    return {name for kind in ALL_MOMENTS for name in moments_in(checkpoint, kind)}
