"""The launcher: starts the ranks of a run as processes on this machine, and always ends all of them together.

It does not import torch or MLX, and prints nothing. Rank 0 inherits the stdout and stderr of the launcher. Of the other ranks
it keeps the end of stderr, to report that of the rank that fails first.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FrameType, MappingProxyType
from typing import Any, Protocol

from partita.errors import DistributedError
from partita.ranks import rank_process
from partita.ranks.backends import local_torch_backend
from partita.ranks.failure import Failure
from partita.ranks.liveness import LOST, STARTING, Lines, Peer, Uptime, beat_s, lost_after_s, silence
from partita.ranks.rendezvous import Environments, Helper, rendezvous
from partita.ranks.waiting import cores

GRACE_S = 3.0
"""Seconds that a rank has to end after SIGTERM before it is killed."""

ECHO_S = 1.0
"""Seconds to wait for the cause of a failure after ranks have only reported that another rank is gone."""

KEPT_BYTES = 64 << 10
"""Bytes kept from the end of the stderr of every rank but rank 0."""

_POLL_S = 0.2

_HELPER_LOST = b"PMIx Event Notification"
"""Printed by Open MPI in a rank that it ends because a process of mpiexec has ended."""

_OUTPUT_OF_MPI = ("OPAL_OUTPUT_STDERR_FD", "PMIX_OUTPUT_STDERR_FD")
"""The variables with the descriptor that Open MPI prints its errors to."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: The exit code of the run.
        output: The stdout of rank 0, if it was captured.
        failure: Why the run failed; None if it did not, or if rank 0 has reported the failure itself.
        rank: The rank that failed; None if the failure names it, or if all ranks raised the same error or were interrupted.
        stderr: The end of that rank's stderr.
    """

    code: int
    output: bytes = b""
    failure: Failure | None = None
    rank: int | None = None
    stderr: str = ""


class Beside(Protocol):
    """What runs in the launcher's process beside the ranks, and may let it start them again."""

    def begin(self) -> Mapping[str, str]:
        """Prepare for ranks that are about to start; the variables to add to the environment of each."""

    def drain(self) -> bool:
        """Ask the ranks to end by themselves, on SIGTERM. False if they were asked before; then the signal ends them."""

    @property
    def is_over(self) -> bool:
        """Whether the ranks have nothing more to do, so that ending them is a success."""

    def lose(self, why: str) -> None:
        """Take note of the first rank that has failed, before the others are ended."""

    def restarts(self, outcome: Outcome) -> bool:
        """Whether the ranks are started again after this outcome."""


def start(
    arguments: Sequence[str],
    ranks: int,
    *,
    capture: bool = False,
    program: Sequence[str] = ("-m", "partita"),
    backend: str | None = None,
    instead: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
    settings: Mapping[str, str] = MappingProxyType({}),
    beside: Beside | None = None,
) -> Outcome:
    """Run `python *program *arguments` on that many ranks of this machine and wait for all of them.

    If a rank fails, is killed, or sends nothing for `PARTITA_LOST_AFTER` seconds, the launcher ends the others, as it does on
    SIGINT, SIGTERM and SIGHUP. No process is ever left behind: a rank whose launcher is killed ends itself.

    Args:
        arguments: The arguments of the command.
        ranks: Number of ranks.
        capture: Whether rank 0's stdout is returned instead of shown.
        program: The arguments of python that name the program.
        backend: The ranks' backend, `gloo`, `mpi` or `ring` (see `rendezvous`); by default the best one for torch.
        instead: The backend to use if that one fails, which is reported.
        tell: Callback for each line to print to the user.
        settings: Variables to add to the environment of each rank.
        beside: What runs in this process beside the ranks.

    Raises:
        DistributedError: mpiexec fails and no other backend was given, or `PARTITA_LOST_AFTER` is not a number.
    """
    limit_s = lost_after_s()
    backend = backend or (local_torch_backend() if ranks > 1 else "gloo")

    def run_once(received: Sequence[int]) -> Outcome:
        with _connected(backend, ranks, instead, tell) as environments:
            processes = _Ranks([sys.executable, *program, *arguments], capture, limit_s)
            try:
                more = {**settings, **(beside.begin() if beside is not None else {})}
                processes.start(Environments(({**one, **more} for one in environments), environments.helpers))
                processes.wait(received, beside)
            finally:
                processes.end()
        return processes.outcome()

    with _signals_as_exceptions(beside.drain if beside is not None else lambda: False) as received:
        try:
            outcome = run_once(received)
            while beside is not None and beside.restarts(outcome):
                outcome = Outcome(0) if beside.is_over else run_once(received)
        except _Signalled as signalled:
            return Outcome(128 + signalled.number, failure=Failure(Failure.INTERRUPTED, "interrupted"))
    return outcome


@contextlib.contextmanager
def _connected(backend: str, ranks: int, instead: str | None, tell: Callable[[str], None]) -> Iterator[Environments]:
    """The environments of ranks that connect by `backend`, or by `instead` if that fails."""
    with contextlib.ExitStack() as stack:
        if backend == instead and ranks > 1:
            tell(
                f"Open MPI is not installed, so the ranks communicate over {instead}, where small messages take many times "
                "longer: pip install 'partita[mpi]'"
            )
        try:
            environments = stack.enter_context(rendezvous(backend, ranks))
        except DistributedError as error:
            if instead is None or backend == instead:
                raise
            tell(f"The ranks communicate over {instead}: {error}")
            environments = stack.enter_context(rendezvous(instead, ranks))
        yield environments


def rank_environment(variables: dict[str, str], ranks: int) -> dict[str, str]:
    """The complete environment of a rank that connects to the others by the variables `variables`."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores() // ranks)),
        "GLOO_SOCKET_IFNAME": loopback,
        **os.environ,
        **variables,
    }
    if sys.path and sys.path[0] not in ("", os.getcwd()):
        environment["PYTHONSAFEPATH"] = "1"  # so that a json.py in the user's folder is not imported
    return environment


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    line: socket.socket
    peer: Peer
    lines: Lines = field(default_factory=Lines)
    lost: Failure | None = None
    lost_s: float | None = None
    stderr: bytearray = field(default_factory=bytearray)
    messages: Any = None
    ended_s: float | None = None
    sent: set[int] = field(default_factory=set)

    @property
    def failure(self) -> Failure | None:
        """The failure that the rank reported, or that its silence implies."""
        report = self.peer.failure
        if not report:
            return self.lost
        return Failure(report["code"], report["message"], report["echo"], report.get("is_complete", False))

    @property
    def failed_s(self) -> float | None:
        """The time at which the rank failed, None if it has not failed."""
        if self.peer.failure:
            return float(self.peer.failure["time_s"])
        return self.lost_s if self.lost_s is not None else self.ended_s if self.process.returncode else None

    @property
    def was_signalled(self) -> bool:
        """Whether the rank ended because of a signal from this launcher."""
        return self.failure is None and -(self.process.returncode or 0) in self.sent

    @property
    def is_echo(self) -> bool:
        """Whether the rank failed because another rank was gone."""
        return self.failure is not None and self.failure.echo

    @property
    def lacks_helper(self) -> bool:
        """Whether Open MPI has ended the rank because a process of mpiexec was gone."""
        return self.failure is None and _HELPER_LOST in self.stderr

    def send(self, number: int) -> None:
        """Send a signal to the rank and the processes that it started, unless it has ended."""
        if self.process.poll() is None:
            self.sent.add(number)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)


class _Ranks:
    """The ranks of one run."""

    def __init__(self, command: list[str], capture: bool, limit_s: float) -> None:
        self.command, self.capture, self.limit_s = command, capture, limit_s
        self.clock = Uptime(limit_s)
        self.ranks: list[_Rank] = []
        self.output = bytearray()
        self.lost_helper: Helper | None = None
        self.selector = selectors.DefaultSelector()

    def start(self, environments: Environments) -> None:
        for number, variables in enumerate(environments):
            self._start_rank(number, rank_environment(variables, len(environments)), bool(environments.helpers))
        for helper in environments.helpers:
            self._listen(helper.stream, partial(self._receive_of_helper, helper))

    def _start_rank(self, number: int, environment: dict[str, str], is_of_mpi: bool) -> None:
        """Start a rank. Rank 0 writes to the terminal, but what Open MPI prints in it is kept like another rank's stderr."""
        stdout = subprocess.DEVNULL if number else subprocess.PIPE if self.capture else None
        local, remote = socket.socketpair()
        messages, end = os.pipe() if number == 0 and is_of_mpi else (None, None)
        if end is not None:
            environment |= dict.fromkeys(_OUTPUT_OF_MPI, str(end))
        with remote:
            process = subprocess.Popen(
                self.command,
                env={**environment, rank_process.LINE: str(remote.fileno())},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE if number else None,
                pass_fds=[remote.fileno(), *(() if end is None else (end,))],
                start_new_session=True,
            )
        rank = _Rank(number, process, local, Peer(number, socket.gethostname(), heard_s=self.clock.now_s()))
        self.ranks.append(rank)
        self._listen(local, partial(self._receive_report, rank))
        if process.stdout is not None:
            self._listen(process.stdout, self.output.extend)
        if process.stderr is not None:
            self._listen(process.stderr, partial(_keep_end, rank.stderr))
        if messages is not None and end is not None:
            os.close(end)
            rank.messages = os.fdopen(messages, "rb", buffering=0)
            self._listen(rank.messages, partial(_keep_end, rank.stderr))

    def _listen(self, stream: Any, take: Callable[[bytes], None]) -> None:
        os.set_blocking(stream.fileno(), False)
        self.selector.register(stream, selectors.EVENT_READ, take)

    def _receive_report(self, rank: _Rank, data: bytes) -> None:
        for message in rank.lines.take(data):
            rank.peer.take(message, self.clock.now_s())

    def _receive_of_helper(self, helper: Helper, data: bytes) -> None:
        if not data and self.lost_helper is None:
            self.lost_helper = helper

    def wait(self, received: Sequence[int], beside: Beside | None = None) -> None:
        """Wait until every rank has ended, or one has failed and the cause has had time to arrive, or `beside` is over.

        Raises what the handler of the first signal in `received` raised, which is lost if it was raised in a destructor.
        """
        while self._alive():
            if received:
                raise _Signalled(received[0])
            if beside is not None and beside.is_over:
                return
            self._receive(min(_POLL_S, beat_s(self.limit_s)))
            self._find_silent()
            failed = self._failed()
            if failed or self.lost_helper is not None:
                # A rank that starts would only print that Open MPI cannot be initialized.
                is_starting = not failed and any(rank.peer.doing == STARTING for rank in self.ranks)
                if all(rank.is_echo or rank.lacks_helper for rank in failed) and not is_starting:
                    self._receive_until(lambda: self._cause_is_known() or not self._alive(), ECHO_S)
                break
        # All ranks may have ended at once: the only one was killed.
        if beside is not None and (self._failed() or self.lost_helper is not None):
            beside.lose(self._why())

    def _failed(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.failed_s is not None]

    def _why(self) -> str:
        """What is known of the first failure while other ranks run."""
        if self.lost_helper is not None and self._first_failed() is None:
            return _lost_helper(self.lost_helper, self.ranks[0].peer.doing)
        outcome = self.outcome()
        text = "a rank has failed" if outcome.failure is None else outcome.failure.message
        return text if outcome.rank is None else f"rank {outcome.rank} failed: {text}"

    def _find_silent(self) -> None:
        """Mark ranks as lost that have sent nothing for too long, and all that are silent with them."""
        now_s = self.clock.now_s()
        silent_s = {rank.number: rank.peer.silent_s(now_s) for rank in self.ranks if rank.ended_s is None}
        if max(silent_s.values(), default=0.0) > self.limit_s:
            for rank in self.ranks:
                if silent_s.get(rank.number, 0.0) > self.limit_s / 2:
                    rank.lost = Failure(LOST, rank.peer.lost(silence(self.limit_s)))
                    rank.lost_s = time.monotonic()

    def _cause_is_known(self) -> bool:
        return any(rank.failed_s is not None and not rank.is_echo and not rank.lacks_helper for rank in self.ranks)

    def end(self) -> None:
        """End all ranks. No rank is left when this returns or is interrupted."""
        try:
            for number, grace_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 60.0)):
                if self._alive():
                    for rank in self.ranks:
                        rank.send(number)
                    self._receive_until(lambda: not self._alive(), grace_s)
            while self._receive(0):
                pass
        finally:
            for rank in self.ranks:
                rank.send(signal.SIGKILL)
            for rank in self.ranks:
                rank.process.wait()
                rank.line.close()
                for stream in (rank.process.stdout, rank.process.stderr, rank.messages):
                    if stream is not None:
                        stream.close()
            self.selector.close()

    def outcome(self) -> Outcome:
        """How the run ended, once all ranks have ended."""
        first, output = self._first_failed(), bytes(self.output)
        is_without_cause = first is None or first.is_echo or first.lacks_helper
        if self.lost_helper is not None and is_without_cause and any(rank.process.returncode for rank in self.ranks):
            doing = next((rank.peer.doing for rank in self.ranks), STARTING)
            return Outcome(LOST, output, Failure(LOST, _lost_helper(self.lost_helper, doing)))
        return Outcome(0, output) if first is None else _outcome_of(first, output)

    def _first_failed(self) -> _Rank | None:
        """The rank that failed first for a reason of its own: not because another was gone, nor by a signal of the launcher."""
        failed = [rank for rank in self.ranks if rank.failed_s is not None and not rank.was_signalled]
        return min(failed, key=lambda rank: (rank.is_echo or rank.lacks_helper, rank.failed_s), default=None)

    def _alive(self) -> bool:
        for rank in self.ranks:
            if rank.ended_s is None and rank.process.poll() is not None:
                rank.ended_s = time.monotonic()
        return any(rank.ended_s is None for rank in self.ranks)

    def _receive_until(self, done: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not done() and time.monotonic() < deadline:
            self._receive(min(_POLL_S, limit_s))

    def _receive(self, timeout_s: float) -> bool:
        """Read messages of the ranks, waiting at most `timeout_s` for them. Returns whether any arrived."""
        has_received = False
        for key, _ in self.selector.select(timeout_s):
            data = b""
            with contextlib.suppress(ConnectionError):
                data = os.read(key.fd, 1 << 16)
            if not data:
                self.selector.unregister(key.fileobj)
            has_received |= bool(data)
            key.data(data)
        return has_received


def _keep_end(kept: bytearray, data: bytes) -> None:
    kept += data
    del kept[:-KEPT_BYTES]


def _outcome_of(rank: _Rank, output: bytes) -> Outcome:
    """The outcome of a run in which `rank` failed first."""
    failure, code = rank.failure, rank.process.returncode
    stderr = rank.stderr.decode(errors="replace")
    if failure is None:
        if rank.number == 0 and code > 0 and not stderr:
            return Outcome(code, output)  # rank 0 has reported the failure itself: a verdict, or a usage error
        why = f"it {_how_it_ended(code)}"
        failure = Failure(LOST, rank.peer.lost(why)) if code < 0 else Failure(Failure.FAILED, why)
    is_named = failure.code in (LOST, Failure.MISUSED)
    return Outcome(failure.code, output, failure, None if is_named else rank.number, stderr)


def _lost_helper(helper: Helper, doing: str) -> str:
    return (
        f"{helper.name} was lost while {doing}: the process has ended (is the machine out of memory?), and ranks that "
        "communicate over Open MPI cannot continue without it. Start the command again."
    )


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}" + (" (is the machine out of memory?)" if -code == signal.SIGKILL else "")


class _Signalled(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _signals_as_exceptions(drain: Callable[[], bool]) -> Iterator[Sequence[int]]:
    """A context in which a signal raises `_Signalled`, unless it is a SIGTERM that `drain` accepts.

    Yields the numbers of the signals that have arrived and were not accepted.
    """
    received: list[int] = []

    def raise_it(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGTERM or not drain():
            received.append(number)
            raise _Signalled(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, raise_it)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
