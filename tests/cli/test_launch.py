"""The launcher with real processes: what one rank does to the others, and what is left when the launcher ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from partita.cli import launch
from partita.cli.terminal.console import _console
from partita.cli.terminal.failure import explain
from partita.errors import DistributedError
from partita.ranks import launcher
from partita.ranks.liveness import LOST
from tests.cli.launcher import PROGRAM
from tests.support.ranks import ROOT
from tests.support.signals import take_signals

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(30)]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PIDS", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(ROOT)
    _console.cache_clear()


def start(program: str, ranks: int = 2, *arguments: str) -> int:
    debug = "--debug" in arguments
    return launch.show_outcome(launch.start([program, *arguments], ranks, program=PROGRAM), debug=debug)


def test_ranks_find_the_environment_of_torchrun_and_only_the_first_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("say_environment", 3) == 0
    said = capfd.readouterr()
    cores = len(os.sched_getaffinity(0))
    assert said.out == f"0 3 0 127.0.0.1 {max(1, cores // 3)} False\n"
    assert said.err == "to stderr\n"


def test_threads_that_the_user_chose_are_kept(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert start("say_environment", 1) == 0
    assert capfd.readouterr().out.split()[4] == "7"


def test_a_failing_rank_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("one_fails", 3) == 1  # the others sleep for longer than a test may take
    said = capfd.readouterr()
    assert said.err.splitlines()[0] == "error: rank 1: ValueError: this rank has had enough"
    assert "Traceback" not in said.err


def test_debug_shows_the_traceback_of_the_failing_rank(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("one_fails", 2, "--debug") == 1
    said = capfd.readouterr().err
    assert said.count("Traceback") == 1
    assert "in one_fails" in said


def test_a_rank_that_ignores_the_request_to_end_is_killed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "GRACE_S", 0.3)
    assert start("one_fails_while_another_will_not_end") == 1
    assert "rank 1: ValueError" in capfd.readouterr().err
    assert gone_by(pids(tmp_path, 1), 0.0)


def test_what_every_rank_refuses_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("all_refuse", 3) == 2
    assert capfd.readouterr().err == "error: the model is not [one]\n"


def test_a_run_that_diverges_is_said_without_a_hint_at_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("all_diverge") == 1
    said = capfd.readouterr().err
    assert said.splitlines()[-1].endswith("the loss is not finite")
    assert "--debug" not in said


def test_what_the_first_rank_refuses_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("first_refuses") == 2
    assert capfd.readouterr().err == "error: only rank 0 minds\n"


def test_a_killed_rank_is_named_with_its_last_words(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("one_is_killed") == LOST
    said = capfd.readouterr().err
    assert "last words" in said
    assert f"rank 1 (host {socket.gethostname()}, stage 0) was lost while starting: it was ended by SIGKILL" in said


def test_a_rank_out_of_memory_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("one_runs_out_of_memory") == 2
    said = capfd.readouterr().err
    assert said.startswith(
        "error: out of memory on rank 1. Split the model over more ranks (--tp, --pp), or use smaller batches"
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "allocate", [lambda: __import__("torch").empty(1 << 58), lambda: __import__("numpy").empty(1 << 58)]
)
def test_what_frameworks_say_of_memory_is_known(allocate: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    failure = explain(caught.value)
    assert failure is not None
    assert failure.code == 2
    assert "out of memory (" in failure.message


def test_a_silent_exit_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("one_exits_silently") == 1
    assert "rank 1: it ended with exit code 7" in capfd.readouterr().err


def test_of_much_stderr_the_end_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("one_talks_too_much") == 1
    said = capfd.readouterr().err
    assert "line 39999 of very many" in said
    assert "rank 1: ValueError: out of words" in said
    assert len(said) < launcher.KEPT_BYTES + 1000


def test_the_cause_is_shown_and_not_its_echo(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("echo_comes_first") == 1
    said = capfd.readouterr().err
    assert "rank 1: ValueError: the cause" in said
    assert "Connection closed" not in said


def test_a_verdict_of_the_first_rank_is_the_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert start("verdict") == 1
    said = capfd.readouterr()
    assert (said.out, said.err) == ("it differs\n", "")


def test_output_can_be_captured_whole(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = launch.start(["captured"], 2, capture=True, program=PROGRAM)
    assert outcome.code == 0
    assert outcome.output == b"x" * 300_000 + b"\n"
    assert capfd.readouterr().out == ""


# --- a launcher that is ended itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_nothing_is_left_when_the_launcher_is_ended(tmp_path: Path, number: int, code: int) -> None:
    process = spawn("wait_with_child", 2)
    left = pids(tmp_path, 2)
    assert len(left) == 4
    process.send_signal(number)
    err = end(process)
    assert process.returncode == code
    assert b"Traceback" not in err
    if number != signal.SIGKILL:
        assert err == b"interrupted\n"
        assert gone_by(left, 0.0)
    assert gone_by(left, 30.0)


def test_a_stopped_rank_does_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    process = spawn("wait_stopped", 2)
    left = pids(tmp_path, 2)
    process.kill()
    end(process)
    assert gone_by(left, 30.0)


def test_a_second_interrupt_does_not_wait_for_the_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_S", "1000")
    process = spawn("wait_stopped", 2)
    left = pids(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    end(process)
    assert process.returncode == 130
    assert gone_by(left, 0.0)


def spawn(program: str, ranks: int) -> subprocess.Popen[bytes]:
    return started([sys.executable, "-m", "tests.cli.launcher", program, str(ranks)])


def started(command: list[str]) -> subprocess.Popen[bytes]:
    """A process that takes signals, also where the tests run in the background, whose processes ignore an interrupt."""
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=take_signals)


def end(process: subprocess.Popen[bytes]) -> bytes:
    """Wait for a launcher's end; what it wrote to stderr."""
    try:
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def pids(folder: Path, ranks: int) -> list[int]:
    """The processes that `ranks` ranks have noted, once all of them have."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        notes = [file.read_text().split() for file in folder.glob("rank*")]
        if len(notes) == ranks and all(notes):
            return [int(pid) for note in notes for pid in note]
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")


def gone_by(left: list[int], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while any(map(is_running, left)):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_without_open_mpi_ranks_talk_otherwise_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for backend, failing in (("gloo", False), ("mpi", True)):
        with monkeypatch.context() as patch:
            if failing:
                patch.setattr("partita.ranks.rendezvous.open_mpi", lambda: None)
            outcome = launch.start(["say_environment"], 2, program=PROGRAM, backend=backend, instead="gloo")
        assert outcome.code == 0
        assert capfd.readouterr().err.count("over gloo") == 1


def test_what_was_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partita.ranks.rendezvous.open_mpi", lambda: None)
    with pytest.raises(DistributedError, match="needs Open MPI"):
        launch.start(["say_environment"], 2, program=PROGRAM, backend="mpi")
