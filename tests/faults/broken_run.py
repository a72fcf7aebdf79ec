"""A run of real ranks that a test breaks: started, broken in the middle of its work, and looked at when it has ended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cli.test_launch import gone_by, is_running
from tests.support.ranks import ROOT

LOST_AFTER_S = 3.0
START_S = 40.0
END_S = 20.0
"""From the fault to the end of the launcher: the silence, the launcher's own grace, and a machine that is busy."""

MODULE = ["-m", "tests.faults.programs"]


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: Its launcher's exit code.
        said: What it wrote, by whatever process.
        seconds: From the fault to the end.
    """

    code: int
    said: str
    seconds: float


def partita_ranks(backend: str, ranks: int) -> list[str]:
    return [sys.executable, "-m", "tests.faults.launcher", backend, str(ranks)]


def torchrun(ranks: int, *options: str) -> list[str]:
    return [*python("torch.distributed.run"), "--nproc-per-node", str(ranks), *options, *MODULE]


def python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def break_run(
    command: Sequence[str],
    ranks: int,
    folder: Path,
    fault: str | Callable[[int], None],
    who: int = 0,
    env: Mapping[str, str] | None = None,
) -> Ended:
    """Start `command`, wait until its ranks work in `folder`, do `fault` (KILL, STOP or raise) to rank `who`, and wait.

    A function `fault` is called with the number of the launcher's process instead.

    No process is left when this returns, or it raises AssertionError.
    """
    surroundings = {
        **os.environ, "PARTITA_LOST_AFTER": f"{LOST_AFTER_S:g}", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **(env or {}),
    }  # fmt: skip
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=surroundings, stdout=said, stderr=said, start_new_session=True
        )
    working: list[int] = []
    try:
        until_s = time.monotonic() + START_S
        while len(working) < ranks:
            is_well = process.poll() is None and time.monotonic() < until_s
            assert is_well, (folder / "said").read_text()
            time.sleep(0.05)
            working = [int(file.read_text()) for file in folder.glob("rank*")]
        time.sleep(random.Random(str(folder)).uniform(0.5, 1.0))
        start_s = time.monotonic()
        if callable(fault):
            fault(process.pid)
        elif fault == "raise":
            (folder / "raise").touch()
        else:
            os.kill(int((folder / f"rank{who}").read_text()), signal.Signals[f"SIG{fault}"])
        code = process.wait(END_S)
        seconds = time.monotonic() - start_s
        text = (folder / "said").read_text(errors="replace")
        assert gone_by(working, 5.0), f"left: {[pid for pid in working if is_running(pid)]}\n{text}"
        return Ended(code, text, seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the run has not ended\n{(folder / 'said').read_text()}") from None
    finally:
        for pid in [*working, process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
