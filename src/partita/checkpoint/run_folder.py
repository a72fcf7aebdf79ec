"""A run's folder: one folder per checkpoint, named by its step, and a link to the newest.

runs/mine/
  latest -> step-000200     a link, written when its checkpoint is complete
  config.json               the model's, for readers that only need the config
  step-000100/      model.safetensors, config.json, ..., optimizer.safetensors, training_state.json, manifest.json
  step-000200/
  adapters/                 of a finished run with adapters
  .lock                     names the run that writes here, see `run_lock`
  .step-000300.9f3c01ab.partial/    being written by the run with that identifier; not a checkpoint until it is renamed
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from partita.checkpoint.durable import appear, failing_as, sync, write_whole
from partita.checkpoint.header import reason
from partita.checkpoint.manifest import MANIFEST_NAME, check_sizes, read_manifest
from partita.checkpoint.run_lock import check_held
from partita.errors import CheckpointError

LATEST_NAME = "latest"
ADAPTERS_NAME = "adapters"
_CONFIG_NAME = "config.json"

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems without links; there the last checkpoint is the newest."""

_STEP = re.compile(r"step-([0-9]{6,})")
_LEFT_OVER = re.compile(r"\.step-[0-9]{6,}(\.[0-9a-f]+)?\.(partial|old)")


@dataclass(frozen=True)
class RunFolder:
    """The checkpoints of one run.

    Attributes:
        path: The folder.
        run: The identifier of the run that writes and holds the folder's lock; readers have none.
    """

    path: Path
    run: str = ""

    def step_folder(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.path / f"step-{step:06d}"

    def partial(self, step: int) -> Path:
        """The folder in which that checkpoint is written."""
        return self._hidden(step, "partial")

    def _hidden(self, step: int, what: str) -> Path:
        return self.path / ".".join(["", f"step-{step:06d}", *([self.run] if self.run else []), what])

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order; incomplete checkpoints count too."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be listed: {reason(error)}") from error
        return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))

    def newest(self) -> Path:
        """The checkpoint that `latest` points to, or the last one if there is no link.

        Raises:
            CheckpointError: There is none, or files of it are missing or truncated.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.path}: holds no checkpoint (step-000100 or the like)")
        link = self.path / LATEST_NAME
        named = _STEP.fullmatch(os.readlink(link)) if link.is_symlink() else None
        folder = self.step_folder(int(named[1]) if named and int(named[1]) in steps else steps[-1])
        try:
            check_sizes(folder, read_manifest(folder))
        except CheckpointError as error:
            older = [self.step_folder(step) for step in steps if step < int(folder.name.removeprefix("step-"))]
            raise CheckpointError(
                f"{error}. {f'Name an older one: {older[-1]}' if older else 'There is no older one'}"
            ) from error
        return folder

    def begin(self) -> None:
        """Create the folder, and finish or remove the remains of interrupted saves.

        Raises:
            CheckpointError: A file operation fails, or another run holds the lock.
        """
        self.check_held()
        with failing_as(self.path, "cannot be created"):
            self.path.mkdir(parents=True, exist_ok=True)
            for name in os.listdir(self.path):
                if _LEFT_OVER.fullmatch(name):
                    shutil.rmtree(self.path / name)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no permission to write", str(self.path))
            self._fix_latest()

    def publish(self, step: int, keep: int | None) -> Path:
        """Move the written checkpoint into place, point `latest` to it, and remove all but the newest `keep`.

        Raises:
            CheckpointError: A file operation fails, or another run holds the lock. All older checkpoints then still exist.
        """
        self.check_held()
        place, old = self.step_folder(step), self._hidden(step, "old")
        with failing_as(place, "cannot be replaced"):
            if place.exists():
                os.rename(place, old)
        appear(self.partial(step), place)
        self._point_to(place)
        with failing_as(self.path, "old checkpoints cannot be removed"):
            if old.exists():
                shutil.rmtree(old)
            earlier = [one for one in self.steps() if one <= step]
            for one in earlier[:-keep] if keep is not None else []:
                self._remove(one)
            sync(self.path)
        return place

    def check_held(self) -> None:
        """Raise CheckpointError if the run that writes has lost the folder's lock."""
        if self.run:
            check_held(self.path, self.run)

    def _point_to(self, place: Path) -> None:
        config = place / _CONFIG_NAME
        with failing_as(self.path, "cannot be written"):
            if config.exists():
                write_whole(self.path / _CONFIG_NAME, config.read_bytes())
            new = self.path / f".{LATEST_NAME}.new"
            new.unlink(missing_ok=True)
            try:
                os.symlink(place.name, new)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return
            os.replace(new, self.path / LATEST_NAME)
            sync(self.path)

    def _fix_latest(self) -> None:
        """Point `latest` to a checkpoint that was finished after it, if the run was killed before it moved the link.

        A later step that is older than the link belongs to an earlier attempt, and is ignored.
        """
        link = self.path / LATEST_NAME
        pointed_ns = link.lstat().st_mtime_ns if link.is_symlink() else 0
        finished_ns = {step: self._finished_ns(step) for step in self.steps()}
        last = max(finished_ns, key=lambda step: finished_ns[step], default=None)
        if last is not None and finished_ns[last] > pointed_ns:
            self._point_to(self.step_folder(last))

    def _finished_ns(self, step: int) -> int:
        """The time at which a checkpoint was finished, in nanoseconds; 0 if it is incomplete."""
        folder = self.step_folder(step)
        try:
            check_sizes(folder, read_manifest(folder))
            return (folder / MANIFEST_NAME).stat().st_mtime_ns
        except CheckpointError:
            return 0

    def _remove(self, step: int) -> None:
        """Remove a checkpoint; it is renamed first, so that no reader sees a part of it."""
        old = self._hidden(step, "old")
        os.rename(self.step_folder(step), old)
        shutil.rmtree(old)


def is_run_folder(path: Path) -> bool:
    """Whether a folder holds the checkpoints of a run, rather than one model."""
    return path.is_dir() and bool(RunFolder(path).steps()) and not any(path.glob("*.safetensors"))
