"""Ctrl-C was lost where Python ignores exceptions, such as in a destructor, or while a call into C did not return."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from partita.ranks import rendezvous
from partita.ranks.backends import open_mpi
from tests.support.ranks import ROOT
from tests.support.signals import take_signals

LIMIT_S = 2.0
"""In place of `interrupt.LIMIT_S`, so that the test need not wait for it."""

# `work` takes the place of a command's work. It says "ready" where it is interrupted, and then lasts a minute.
PROGRAM = """
import ctypes, hashlib, os, sys, time
import partita.cli.layout
from partita.__main__ import main
from partita.cli.terminal import interrupt

def ready():
    os.write(1, b"ready")

def last():
    time.sleep(60)

{work}

interrupt.LIMIT_S = {limit_s}
partita.cli.layout.Layout = work
sys.argv = ["partita", "layout", "EtL", "--pp", "1"]
main()
"""
A_WAIT = """
def work(*_):
    ready()
    last()
"""
A_DESTRUCTOR = """
class Held:
    def __del__(self):
        ready()
        last()

def work(*_):
    held = Held()
    del held
    last()
"""
A_CALLBACK_OF_C = """
@ctypes.CFUNCTYPE(None)
def callback():
    ready()
    last()

def work(*_):
    callback()
    last()
"""
A_LIBRARY_THAT_CATCHES_ALL = """
def work(*_):
    try:
        ready()
        last()
    except BaseException:
        last()
"""
A_CALL_INTO_C = """
def work(*_):
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""


LAUNCHER = """
import os, sys, time
from partita.cli import launch
from partita.cli.terminal import interrupt
from partita.ranks import launcher

class Held:
    def __del__(self):
        os.write(1, b"ready")
        time.sleep({limit_s})

original = launcher._Ranks._find_silent

def find_silent(self):
    original(self)
    launcher._Ranks._find_silent = original
    Held()

launcher._Ranks._find_silent = find_silent
outcome = launch.start(["import time; time.sleep(60)"], 1, program=["-c"])
sys.exit(launch.show_outcome(outcome))
"""


def interrupted(program: str) -> tuple[float, int, bytes]:
    """The seconds from SIGINT to the end of the command, its exit code, and what it wrote to stderr."""
    command = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=take_signals,
    )  # fmt: skip
    assert command.stdout is not None
    try:
        assert command.stdout.read(5) == b"ready"
        time.sleep(0.2)
        start_s = time.monotonic()
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=40)
        return time.monotonic() - start_s, command.returncode, errors
    finally:
        command.kill()


@pytest.mark.fresh
@pytest.mark.parametrize(
    ("work", "waits"),
    [
        pytest.param(A_WAIT, False, id="a-wait"),
        pytest.param(A_DESTRUCTOR, False, id="a-destructor"),
        pytest.param(A_CALLBACK_OF_C, False, id="a-callback-of-C"),
        pytest.param(A_LIBRARY_THAT_CATCHES_ALL, True, id="a-library-that-catches-all"),
        pytest.param(A_CALL_INTO_C, True, id="a-call-into-C"),
    ],
)
def test_the_command_ends(work: str, waits: bool) -> None:
    seconds, code, errors = interrupted(PROGRAM.format(work=work, limit_s=LIMIT_S))
    assert (code, errors) == (130, b"interrupted\n")
    assert (seconds >= LIMIT_S) is waits


@pytest.mark.fresh
def test_the_launcher_ends_its_ranks() -> None:
    seconds, code, errors = interrupted(LAUNCHER.format(limit_s=LIMIT_S))
    assert code == 130
    assert errors.endswith(b"\ninterrupted\n")
    assert seconds < 20


@pytest.mark.skipif(open_mpi() is None, reason="Open MPI is not installed")
def test_nobody_waits_for_processes_of_mpiexec_that_have_yet_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of their listener they waited for the launcher, and the launcher for them, 5 s."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rendezvous, "_next", interrupt)
    monkeypatch.setattr(rendezvous, "_END_S", 60.0)
    start_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt), rendezvous.rendezvous("mpi", 2):
        pass
    assert time.monotonic() - start_s < 30
