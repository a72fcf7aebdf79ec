"""The lock of a run's folder: one holder at a time, and a dead one is no hindrance, whatever the file system's locks can do.

Another machine is played by another text for this one; locks that other hosts do not see, by a flock that always succeeds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from partita.checkpoint import run_lock
from partita.checkpoint.run_folder import RunFolder
from partita.checkpoint.run_lock import LOCK_NAME, RunLock, check_held, is_held
from partita.errors import CheckpointError

HOLD = """
import sys, time
from pathlib import Path
from partita.checkpoint.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print(lock.run, flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LINGER_S": 0.1, "RESTART_S": 0.4, "STALE_S": 0.3, "BEAT_S": 0.05, "CONFIRM_S": 0.1}.items():
        monkeypatch.setattr(run_lock, name, seconds)


def in_another_thread(work: Any) -> Any:
    """What `work` returns or raises in a thread of its own, which is another run to the lock."""
    ended: list[Any] = []

    def do() -> None:
        try:
            ended.append(work())
        except CheckpointError as error:
            ended.append(error)

    thread = threading.Thread(target=do)
    thread.start()
    thread.join(30)
    return ended[0]


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / LOCK_NAME).read_text()))


def test_the_second_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        refused = in_another_thread(lambda: RunLock(tmp_path))
        there = record(tmp_path)
        assert str(refused) == (
            f"{tmp_path}: is in use by run {lock.run} (host {os.uname().nodename}, process {os.getpid()}, since "
            f"{there['since']}). Wait for that run to end, end it, or save elsewhere."
        )
        assert is_held(tmp_path, lock.run)
    assert os.listdir(tmp_path) == []
    with RunLock(tmp_path) as other:
        assert other.run != lock.run


def test_the_thread_that_holds_it_may_take_it_again(tmp_path: Path) -> None:
    with RunLock(tmp_path) as outer:
        with RunLock(tmp_path / ".." / tmp_path.name) as inner:
            assert inner.run == outer.run
        assert is_held(tmp_path, outer.run)


def test_a_folder_that_the_lock_made_goes_with_it_unless_something_is_there(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a" / "one"):
        assert os.listdir(tmp_path / "a" / "one") == [LOCK_NAME]
    assert os.listdir(tmp_path / "a") == []
    with RunLock(tmp_path / "two"):
        (tmp_path / "two" / "file").write_text("")
    assert os.listdir(tmp_path / "two") == ["file"]


@pytest.mark.fresh
def test_a_killed_holder_is_no_hindrance_and_a_stopped_one_is(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        run = process.stdout.readline().strip()
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(CheckpointError, match=rf"is in use by run {run} \(host .*, process {process.pid}, since "):
            RunLock(tmp_path)
        process.kill()
    assert record(tmp_path)["run"] == run
    with RunLock(tmp_path) as lock:
        check_held(tmp_path, lock.run)


def leave_record(folder: Path, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """What a run that was killed on `machine` leaves."""
    with RunLock(folder), monkeypatch.context():
        text = json.dumps({**record(folder), "machine": machine})
    (folder / LOCK_NAME).write_text(text)


def test_a_dead_holder_of_another_machine_is_known_by_its_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_record(tmp_path, monkeypatch, "elsewhere")
    dead = record(tmp_path)["run"]
    with RunLock(tmp_path) as lock:
        assert lock.run != dead
        assert record(tmp_path)["run"] == lock.run


NO_SHARED_LOCKS: dict[str, Any] = {"of one host": None, "none": OSError(errno.ENOSYS, "Function not implemented")}


@pytest.mark.parametrize("locks", NO_SHARED_LOCKS)
def test_without_shared_locks_a_live_holder_is_known_by_its_beats(
    locks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, operation: int) -> None:
        if NO_SHARED_LOCKS[locks] is not None:
            raise NO_SHARED_LOCKS[locks]

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path) as lock:
        monkeypatch.setattr(run_lock, "_machine", lambda: "elsewhere")
        assert f"is in use by run {lock.run} (" in str(in_another_thread(lambda: RunLock(tmp_path)))
        assert is_held(tmp_path, lock.run)
    with RunLock(tmp_path) as other:
        assert is_held(tmp_path, other.run)


def test_who_has_lost_the_lock_writes_no_more(tmp_path: Path) -> None:
    """A holder that was cut off for long finds another in its place: it neither takes it back nor publishes."""
    with RunLock(tmp_path) as lock:
        run = RunFolder(tmp_path, lock.run)
        run.begin()
        run.partial(3).mkdir()
        taken = json.dumps({**record(tmp_path), "run": "0123abcd", "host": "far"})
        (tmp_path / LOCK_NAME).write_text(taken)
        lock.thread_of_beats.join(5)
        for act in (run.begin, lambda: run.publish(3, None)):
            with pytest.raises(
                CheckpointError, match=rf"run {lock.run} no longer holds \.lock: run 0123abcd \(host far, "
            ):
                act()
        assert run.steps() == []
    assert (tmp_path / LOCK_NAME).read_text() == taken
    (tmp_path / LOCK_NAME).unlink()
    with pytest.raises(CheckpointError, match="the file was removed, so this run cannot write any more"):
        run.publish(3, None)


def test_a_restarted_run_waits_longer_for_its_former_processes(tmp_path: Path) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with RunLock(tmp_path, "mine"):
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    with pytest.raises(CheckpointError, match="is in use by run"):
        RunLock(tmp_path, "other")
    threading.Timer(0.2, release.set).start()
    with RunLock(tmp_path, "mine") as lock:
        assert is_held(tmp_path, lock.run)
    thread.join(30)


def test_what_is_no_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("[1]")
    with pytest.raises(
        CheckpointError, match=r"\.lock: is not a lock of a run\. Remove it if no run uses the folder\."
    ):
        RunLock(tmp_path)


def test_only_what_the_own_run_left_open_is_its_to_go_on_with(tmp_path: Path) -> None:
    """Names of unfinished folders say whose they are; once no run is alive, all of them are removed."""
    with RunLock(tmp_path) as lock:
        run = RunFolder(tmp_path, lock.run)
        assert run.partial(7).name == f".step-000007.{lock.run}.partial"
        for name in (".step-000004.partial", ".step-000005.0123abcd.partial", ".step-000002.0123abcd.old", ".mine"):
            (tmp_path / name).mkdir()
        run.begin()
    assert os.listdir(tmp_path) == [".mine"]
