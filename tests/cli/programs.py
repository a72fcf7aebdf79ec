"""Small programs for the launcher: `python -m tests.cli.programs` is one rank of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from partita.cli.terminal.console import OutputClosed, write
from partita.cli.terminal.failure import fail
from partita.errors import DivergedError, ModelError
from partita.ranks import environment, rank_process


def note_pids(*pids: int) -> None:
    with (Path(os.environ["PIDS"]) / f"rank{environment.number()}").open("w") as file:
        file.write(" ".join(map(str, pids)))


def say_environment() -> None:
    """Every rank speaks; only the first is heard."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
    print(*(os.environ[name] for name in names), "torch" in sys.modules, flush=True)
    print("to stderr", file=sys.stderr)


def one_fails() -> None:
    if environment.number() == 1:
        raise ValueError("this rank has had enough")
    time.sleep(600)


def one_fails_while_another_will_not_end() -> None:
    if environment.number() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note_pids(os.getpid())
        time.sleep(60)
    while not (Path(os.environ["PIDS"]) / "rank0").exists():
        time.sleep(0.01)
    raise ValueError("this rank has had enough")


def all_refuse() -> None:
    raise ModelError("the model is not [one]")


def all_diverge() -> None:
    raise DivergedError("the loss is not finite")


def first_refuses() -> None:
    if environment.number() == 0:
        raise ModelError("only rank 0 minds")
    time.sleep(60)


def one_is_killed() -> None:
    if environment.number() == 1:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def one_talks_too_much() -> None:
    if environment.number() == 1:
        for line in range(40_000):
            print(f"line {line} of very many", file=sys.stderr)
        raise ValueError("out of words")
    time.sleep(60)


def echo_comes_first() -> None:
    if environment.number() == 0:
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234")
    time.sleep(0.3)
    raise ValueError("the cause")


def one_runs_out_of_memory() -> None:
    if environment.number() == 1:
        bytearray(1 << 60)
    time.sleep(60)


def one_exits_silently() -> None:
    if environment.number() == 1:
        os._exit(7)
    time.sleep(60)


def verdict() -> None:
    """As `verify` ends when it found a difference: the first rank says so and the others are done."""
    print("it differs", flush=True)
    sys.exit(1 if environment.is_first() else 0)


def captured() -> None:
    print("x" * 300_000, flush=True)


def wait_with_child() -> None:
    child = subprocess.Popen(["sleep", "300"])
    note_pids(os.getpid(), child.pid)
    time.sleep(300)


def wait_stopped() -> None:
    """A rank that is stopped can run nothing of its own."""
    note_pids(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)


def first_writes_without_end() -> None:
    note_pids(os.getpid())
    files = [Path(os.environ["PIDS"]) / f"rank{number}" for number in range(2)]
    while environment.is_first():
        if all(file.exists() and file.stat().st_size for file in files):
            write("one line of many\n")
    time.sleep(60)


def main() -> None:
    rank_process.attach()
    try:
        globals()[sys.argv[1]]()
    except (Exception, OutputClosed) as error:
        sys.exit(fail(error, debug="--debug" in sys.argv))


if __name__ == "__main__":
    main()
