"""Ctrl-C ends the command, whatever its main thread does.

Python raises KeyboardInterrupt between two instructions of the main thread. The exception is lost where Python ignores all
(`__del__`, callbacks of weak references and of C libraries), where a library catches everything, and it is not raised while a
call into C does not return. So there are two more stages:

    SIGINT -> KeyboardInterrupt in the main thread -> `fail`
           -> lost in a destructor or callback: sys.unraisablehook -> the thread raises it again at once
           -> anything else: the thread ends the process after LIMIT_S
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import threading
import time
from typing import Any

from partita.ranks.failure import Failure

LIMIT_S = 10.0
"""Seconds after SIGINT in which the command may end by itself: a run stops its checkpoint, a launcher ends its ranks."""

AGAIN_S = 0.02
"""Seconds until a lost KeyboardInterrupt is raised again, by when its destructor or callback has usually returned."""

_LOST = b"\0"
"""Written into the pipe when a KeyboardInterrupt was lost; no signal has the number 0."""

_was_said = threading.Event()


def install() -> None:
    """Begin to watch for SIGINT, unless the process ignores it, as one in the background of a script does."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_stop_in_child)
    threading.Thread(target=_watch, args=(receiver,), name="interrupt", daemon=True).start()
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            os.write(sender, _LOST)
        else:
            before(unraisable)

    sys.unraisablehook = hook


def _stop_in_child() -> None:
    with contextlib.suppress(ValueError):  # forked by another thread, whose child handles no signals
        signal.set_wakeup_fd(-1)


def _watch(receiver: int) -> None:
    end_s: float | None = None
    main = threading.main_thread().ident
    assert main is not None
    selector = selectors.DefaultSelector()
    selector.register(receiver, selectors.EVENT_READ)
    while True:
        left_s = None if end_s is None else end_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            say()
            os._exit(Failure.INTERRUPTED)
        if not selector.select(left_s):
            continue
        received = os.read(receiver, 64)
        if signal.SIGINT in received and end_s is None:
            end_s = time.monotonic() + LIMIT_S
        if _LOST in received:
            time.sleep(AGAIN_S)
            signal.pthread_kill(main, signal.SIGINT)  # not interrupt_main, which wakes no system call


def was_said() -> None:
    """Note that the user has been told of the interruption."""
    _was_said.set()


def say() -> None:
    """Tell the user of the interruption, unless that has been done."""
    if not _was_said.is_set():
        _was_said.set()
        os.write(2, b"interrupted\n")
