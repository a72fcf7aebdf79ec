"""This process as one rank of a run: of ours, told by `PARTITA_LINE`, of torchrun's, or alone.

A rank that our launcher started holds one end of a line (a socket) to it. The rank writes its failure there. When the line
ends, the launcher is gone, killed perhaps, and the rank ends itself with all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from partita.errors import DistributedError

LINE = "PARTITA_LINE"
MAX_MESSAGE = 16_000
"""Characters of a failure that are sent to the launcher."""

_line: int | None = None


def attach() -> None:
    """Take up the line to the launcher, where this process is a rank that it started."""
    global _line
    text = os.environ.pop(LINE, None)
    if text is None:
        return
    _line = int(text)
    os.set_inheritable(_line, False)
    _wake_with_line()
    threading.Thread(target=_end_with_line, args=(_line,), daemon=True).start()


def _end_with_line(line: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(line, 64):
            pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _wake_with_line() -> None:
    """On Linux the kernel wakes a rank that is stopped when its launcher dies, so that it can see that its line has ended."""
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGCONT)


def world() -> int | None:
    """Ranks of the run that this process is one of, or None without a launcher.

    Raises:
        DistributedError: The launcher's environment is not whole.
    """
    if "RANK" not in os.environ:
        return None
    text = os.environ.get("WORLD_SIZE", "")
    if not text.isdigit() or not os.environ["RANK"].isdigit():
        raise DistributedError(
            f"RANK is set ({os.environ['RANK']!r}), so a launcher started this process, but WORLD_SIZE is {text!r}. "
            "Start it with torchrun, or unset RANK."
        )
    return int(text)


def number() -> int:
    """This process's rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the rank that speaks for the run."""
    return number() == 0


def name() -> str:
    """`rank 3` of several that a launcher started, once they have met; else nothing."""
    return f"rank {number()}" if _has_met_others() else ""


def speaks() -> bool:
    """Whether this rank shows its failure: before the ranks have met, the first of each machine speaks for all."""
    return _has_met_others() or os.environ.get("LOCAL_RANK", "0") == "0"


def _has_met_others() -> bool:
    dist: Any = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def report(failure: dict[str, Any]) -> bool:
    """Tell the launcher of a failure. Returns whether there is one to tell."""
    if _line is None:
        return False
    data = {**failure, "message": failure["message"][:MAX_MESSAGE], "time_s": time.monotonic()}
    with contextlib.suppress(OSError):
        rest = memoryview(json.dumps(data).encode() + b"\n")
        while rest:
            rest = rest[os.write(_line, rest) :]
    return True


def leave(code: int) -> None:
    """End a rank that failed at once: closing its groups could wait for ranks that are gone. Does nothing without ranks."""
    if _line is not None or _has_met_others():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def work_together(work: Callable[[], int]) -> int:
    """Meet the other ranks and do `work`. Its result, the exit code of the run, is returned on the first rank, and 0 on others.

    A non-zero code of another rank would look like that rank's own failure.
    """
    import torch.distributed as dist

    from partita.torch.groups import init_process_group

    init_process_group()
    code = work()
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()
    return code if is_first() else 0
