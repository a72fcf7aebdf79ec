"""A run's lock on its folder: at most one run writes there, on whichever hosts its ranks are.

The first rank holds the lock for the life of the run, in two ways:

    flock on OUT/.lock      released by the kernel when the process ends, however it ends
    beats in OUT/.lock      a record that names the run and changes every `BEAT_S`, for file systems whose locks other hosts
                            do not see, or that have none

A record that a killed process has left is detected: on its own machine by the free flock, elsewhere by `STALE_S` without
a beat.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from partita.checkpoint.durable import failing_as
from partita.checkpoint.header import reason
from partita.errors import CheckpointError

LOCK_NAME = ".lock"

BEAT_S = 2.0
"""Seconds after which a holder changes its record."""

STALE_S = 20.0
"""Seconds without a beat after which a holder on another machine counts as dead."""

LINGER_S = 3.0
"""Seconds that a holder may take to end, such as the ranks of a launcher that was just killed."""

RESTART_S = 30.0
"""The same if the holder is this run before its launcher restarted it."""

CONFIRM_S = 1.0
"""On a file system without locks, the seconds to wait for a record that another run writes at the same time."""

_POLL_S = 0.05
_READS = 5
_RECORD_BYTES = 1024
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """The record in a lock file of the run that holds the lock.

    Attributes:
        run: The run's identifier, which is part of the names of its unfinished files. A resumed run has a new one.
        name: The name of the run from torchrun, which its restarts keep.
        host: The name of the first rank's host.
        pid: The first rank's process number.
        machine: An identifier that two processes share if they share a kernel and process numbers.
        since: The start of the run, in UTC.
        beat: The number of changes of the record.
    """

    run: str
    name: str | None
    host: str
    pid: int
    machine: str
    since: str
    beat: int = 0

    def __str__(self) -> str:
        return f"run {self.run} (host {self.host}, process {self.pid}, since {self.since})"


class RunLock:
    """The lock of a run that this process holds; as a context manager it is released at the end.

    As with `threading.RLock`, the thread that holds a folder's lock may take it again.

    Attributes:
        run: The identifier of the run.
    """

    def __init__(self, folder: Path, name: str | None = None, *, file: Path | None = None) -> None:
        """Create the folder of a run, and lock it.

        Args:
            folder: The folder, created if it does not exist.
            name: The name of the run from torchrun: a restart waits `RESTART_S` for its former processes to end.
            file: The lock file, whose folder is created instead; by default in `folder`.

        Raises:
            CheckpointError: Another run holds the lock, or the folder cannot be created or written to.
        """
        self.path, self.file = folder, (file or folder / LOCK_NAME).absolute()
        self.folder, self.thread = self.file.parent, threading.get_ident()
        self.outer = _HELD.get(self._place())
        if self.outer is not None and self.outer.thread == self.thread:
            self.run: str = self.outer.run
            return
        self.outer = None
        with failing_as(folder, "cannot be created"):
            self.is_new = not self.folder.exists()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no permission to write", str(self.folder))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.run = secrets.token_hex(4)
        self.holder = Holder(self.run, name, socket.gethostname(), os.getpid(), _machine(), now)
        with failing_as(self.file, "cannot be locked"):
            self.fd = self._take()
        _HELD[self._place()] = self
        self.released = threading.Event()
        self.thread_of_beats = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self.thread_of_beats.start()

    def release(self) -> None:
        """Release the folder; remove the record, and the folder if this lock created it and it is empty."""
        if self.outer is not None or self.released.is_set():
            return
        self.released.set()
        self.thread_of_beats.join()
        del _HELD[self._place()]
        with contextlib.suppress(OSError, CheckpointError):
            if _names(self.file, self.run):
                self.file.unlink()
            if self.is_new:
                self.folder.rmdir()
        os.close(self.fd)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.release()

    def _place(self) -> Path:
        return self.folder.resolve() / self.file.name

    def _take(self) -> int:
        """Open the file with this run's record and, if the file system has locks, the kernel's lock."""
        start_s = time.monotonic()
        while True:
            self.folder.mkdir(
                parents=True, exist_ok=True
            )  # a holder that created it removes it on release if it is empty
            fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                is_free = _flock(fd)
                there = _read(self.file)
                if is_free is False:
                    self._linger(there, start_s)
                elif not _is_at(fd, self.file):
                    pass  # its holder removed it on release, before the lock was taken
                elif there is None or (is_free and there.machine == self.holder.machine) or self._is_dead(there):
                    _write(fd, self.holder)
                    if is_free is None:
                        time.sleep(CONFIRM_S)
                    if not _names(self.file, self.run):
                        self._refuse(_read(self.file))
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _linger(self, there: Holder | None, start_s: float) -> None:
        """Wait a moment for a holder that is about to end; raise CheckpointError if its time is over."""
        is_restart = there is not None and there.name is not None and there.name == self.holder.name
        if time.monotonic() - start_s > (RESTART_S if is_restart else LINGER_S):
            self._refuse(there)
        time.sleep(_POLL_S)

    def _is_dead(self, there: Holder) -> bool:
        """Whether the holder, on another machine or without locks, has stopped beating; False if it has released."""
        start_s = time.monotonic()
        while time.monotonic() - start_s < STALE_S:
            time.sleep(_POLL_S)
            now = _read(self.file)
            if now is None:
                return False
            if now != there:
                self._refuse(now)
        return True

    def _refuse(self, holder: Holder | None) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: is in use by {holder or 'another run'}. Wait for that run to end, end it, or save elsewhere."
        )

    def _beat(self) -> None:
        while not self.released.wait(BEAT_S):
            with contextlib.suppress(OSError, CheckpointError):
                if not _names(self.file, self.run):
                    return
                self.holder = replace(self.holder, beat=self.holder.beat + 1)
                _write(self.fd, self.holder)


_HELD: dict[Path, RunLock] = {}
"""The locks that this process holds, by file."""


def is_held(folder: Path, run: str) -> bool:
    """Whether the run `run` holds the lock of `folder`; any rank may ask."""
    return _names(folder / LOCK_NAME, run)


def check_held(folder: Path, run: str) -> None:
    """Raise CheckpointError unless the run `run` holds the lock of `folder`."""
    if not is_held(folder, run):
        now = _read(folder / LOCK_NAME)
        raise CheckpointError(
            f"{folder}: run {run} no longer holds {LOCK_NAME}: {f'{now} took it' if now else 'the file was removed'}, so "
            "this run cannot write any more. Resume it when no other run uses the folder."
        )


def _names(file: Path, run: str) -> bool:
    there = _read(file)
    return there is not None and there.run == run


def _machine() -> str:
    """An identifier shared by processes that see each other's locks and process numbers."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):
        names += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(names)


def _flock(fd: int) -> bool | None:
    """Whether the kernel's lock could be taken, None if the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(fd: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(file))
    except FileNotFoundError:
        return False


def _read(file: Path) -> Holder | None:
    """The record in a lock file, None if there is none.

    The file is opened for each read, since network file systems check for changes when a file is opened.
    """
    for _ in range(_READS):  # the holder may be writing it
        try:
            text = file.read_bytes().strip(b"\0 ")
            return Holder(**json.loads(text)) if text else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {reason(error)}") from error
        except (ValueError, TypeError):
            time.sleep(_POLL_S)
    raise CheckpointError(f"{file}: is not a lock of a run. Remove it if no run uses the folder.")


def _write(fd: int, holder: Holder) -> None:
    os.pwrite(fd, json.dumps(asdict(holder)).encode().ljust(_RECORD_BYTES), 0)
    os.fsync(fd)
