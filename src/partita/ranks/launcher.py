"""The launcher: starts the ranks of a run as processes of this machine, and ends all of them together whatever happens.

It waits without torch or MLX, as torchrun, mpirun or mlx.launch would, and prints nothing. The stdout and stderr of rank 0 are
the launcher's own. Of the other ranks it keeps the end of stderr, for the one that fails first.
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
from typing import Any

from partita.errors import DistributedError
from partita.ranks import rank_process
from partita.ranks.backends import local_torch_backend
from partita.ranks.failure import Failure
from partita.ranks.liveness import LOST, Lines, Peer, Uptime, beat_s, lost_after_s, silence
from partita.ranks.rendezvous import Environments, meeting

GRACE_S = 3.0
"""How long a rank that is told to end may take before it is killed."""

ECHO_S = 1.0
"""How long to wait for a failure's cause where only its echo is known."""

KEPT_BYTES = 64 << 10
"""How much of a silent rank's stderr is kept."""

_POLL_S = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: The exit code of the run.
        output: What rank 0 wrote to stdout, where it was captured.
        failure: Why the run failed; None where it did not, or where rank 0 has reported the failure itself.
        rank: The rank that failed; None where all ranks refused, were interrupted, or where the failure names the rank.
        stderr: The end of what that rank wrote to stderr.
    """

    code: int
    output: bytes = b""
    failure: Failure | None = None
    rank: int | None = None
    stderr: str = ""


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
) -> Outcome:
    """Run `python *program *arguments` as that many ranks of this machine and wait for all of them.

    A rank that fails ends the others; so does one that is killed, or that sends nothing for `PARTITA_LOST_AFTER` seconds.
    SIGINT, SIGTERM and SIGHUP end them too. No process is left in any case: a rank whose launcher is killed ends itself.

    Args:
        arguments: Of the command.
        ranks: How many.
        capture: Whether rank 0's stdout is returned instead of shown.
        program: What python runs.
        backend: How they communicate: `gloo`, `mpi` or `ring` (see `rendezvous`); by default the best one for torch.
        instead: The backend that is used if that one fails, which is reported.
        tell: Called with each line that the user should read.
        settings: What is added to the environment of each rank.

    Raises:
        DistributedError: mpiexec fails, and no other backend was given; or `PARTITA_LOST_AFTER` is no number.
    """
    limit_s = lost_after_s()
    with _signals_as_exceptions():
        try:
            with _met(
                backend or (local_torch_backend() if ranks > 1 else "gloo"), ranks, instead, tell
            ) as environments:
                crew = _Ranks([sys.executable, *program, *arguments], capture, limit_s)
                try:
                    crew.start([{**one, **settings} for one in environments])
                    crew.wait()
                finally:
                    crew.end()
        except _Signalled as signalled:
            return Outcome(128 + signalled.number, failure=Failure(Failure.INTERRUPTED, "interrupted"))
    first = crew.first_failed()
    return Outcome(0, bytes(crew.output)) if first is None else _outcome_of(first, bytes(crew.output))


@contextlib.contextmanager
def _met(backend: str, ranks: int, instead: str | None, tell: Callable[[str], None]) -> Iterator[Environments]:
    """The environments of ranks that meet by `backend`, or if that fails by another."""
    with contextlib.ExitStack() as stack:
        if backend == instead and ranks > 1:
            tell(
                f"Open MPI is not installed, so the ranks talk over {instead}, where small messages take many times longer: "
                "pip install 'partita[mpi]'"
            )
        try:
            environments = stack.enter_context(meeting(backend, ranks))
        except DistributedError as error:
            if instead is None or backend == instead:
                raise
            tell(f"The ranks talk over {instead}: {error}")
            environments = stack.enter_context(meeting(instead, ranks))
        yield environments


def surroundings(met: dict[str, str], ranks: int) -> dict[str, str]:
    """The whole environment of a rank that meets the others by `met`."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    loopback = "lo" if sys.platform == "linux" else "lo0"
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "GLOO_SOCKET_IFNAME": loopback,
        **os.environ,
        **met,
    }
    if sys.path and sys.path[0] not in ("", os.getcwd()):
        environment["PYTHONSAFEPATH"] = "1"  # a file json.py in the user's folder is no module of ours
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
    ended_s: float | None = None
    sent: set[int] = field(default_factory=set)

    @property
    def failure(self) -> Failure | None:
        """What it said was wrong with it, or what silence says."""
        report = self.peer.failure
        return Failure(report["code"], report["message"], report["echo"]) if report else self.lost

    @property
    def failed_s(self) -> float | None:
        """When it failed, None if it did not (yet)."""
        if self.peer.failure:
            return float(self.peer.failure["time_s"])
        return self.lost_s if self.lost_s is not None else self.ended_s if self.process.returncode else None

    @property
    def was_told_to_end(self) -> bool:
        """Whether it ended because it was sent a signal from here."""
        return self.failure is None and -(self.process.returncode or 0) in self.sent

    @property
    def is_echo(self) -> bool:
        """Whether it failed because another rank was gone."""
        return self.failure is not None and self.failure.echo

    def send(self, number: int) -> None:
        """Send a signal to it and to what it started, unless it has ended."""
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
        self.selector = selectors.DefaultSelector()

    def start(self, environments: Environments) -> None:
        for number, met in enumerate(environments):
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    self.command,
                    env={**surroundings(met, len(environments)), rank_process.LINE: str(theirs.fileno())},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE
                    if number == 0 and self.capture
                    else None
                    if number == 0
                    else subprocess.DEVNULL,
                    stderr=None if number == 0 else subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            member = _Rank(number, process, ours, Peer(number, socket.gethostname(), heard_s=self.clock.now_s()))
            self.ranks.append(member)
            self._listen(ours, partial(self._told, member))
            if process.stdout is not None:
                self._listen(process.stdout, self.output.extend)
            if process.stderr is not None:
                self._listen(process.stderr, partial(_keep_end, member.stderr))

    def _listen(self, stream: Any, take: Callable[[bytes], None]) -> None:
        os.set_blocking(stream.fileno(), False)
        self.selector.register(stream, selectors.EVENT_READ, take)

    def _told(self, member: _Rank, data: bytes) -> None:
        for told in member.lines.take(data):
            member.peer.take(told, self.clock.now_s())

    def wait(self) -> None:
        """Until every rank has ended, or one has failed and its cause has had time to be told."""
        while self._alive():
            self._hear(min(_POLL_S, beat_s(self.limit_s)))
            self._find_silent()
            failed = [member for member in self.ranks if member.failed_s is not None]
            if failed:
                if all(member.is_echo for member in failed):
                    self._hear_until(lambda: self._cause_is_known() or not self._alive(), ECHO_S)
                return

    def _find_silent(self) -> None:
        """Give up ranks that have told nothing for too long, all that are silent with the first."""
        now_s = self.clock.now_s()
        silent_s = {member.number: member.peer.silent_s(now_s) for member in self.ranks if member.ended_s is None}
        if max(silent_s.values(), default=0.0) > self.limit_s:
            for member in self.ranks:
                if silent_s.get(member.number, 0.0) > self.limit_s / 2:
                    member.lost = Failure(LOST, member.peer.lost(silence(self.limit_s)))
                    member.lost_s = time.monotonic()

    def _cause_is_known(self) -> bool:
        return any(member.failed_s is not None and not member.is_echo for member in self.ranks)

    def end(self) -> None:
        """No rank is left when this returns, nor when it is interrupted."""
        try:
            for number, grace_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 60.0)):
                if self._alive():
                    for member in self.ranks:
                        member.send(number)
                    self._hear_until(lambda: not self._alive(), grace_s)
            while self._hear(0):
                pass
        finally:
            for member in self.ranks:
                member.send(signal.SIGKILL)
            for member in self.ranks:
                member.process.wait()
                member.line.close()
                for stream in (member.process.stdout, member.process.stderr):
                    if stream is not None:
                        stream.close()
            self.selector.close()

    def first_failed(self) -> _Rank | None:
        """The rank that failed first by itself, rather than because another was gone or it was told to end."""
        failed = [member for member in self.ranks if member.failed_s is not None and not member.was_told_to_end]
        return min(failed, key=lambda member: (member.is_echo, member.failed_s), default=None)

    def _alive(self) -> bool:
        for member in self.ranks:
            if member.ended_s is None and member.process.poll() is not None:
                member.ended_s = time.monotonic()
        return any(member.ended_s is None for member in self.ranks)

    def _hear_until(self, done: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not done() and time.monotonic() < deadline:
            self._hear(min(_POLL_S, limit_s))

    def _hear(self, timeout_s: float) -> bool:
        """Read what the ranks have said since, waiting for it a while. Returns whether there was anything."""
        heard = False
        for key, _ in self.selector.select(timeout_s):
            data = b""
            with contextlib.suppress(ConnectionError):
                data = os.read(key.fd, 1 << 16)
            if not data:
                self.selector.unregister(key.fileobj)
            heard |= bool(data)
            key.data(data)
        return heard


def _keep_end(kept: bytearray, data: bytes) -> None:
    kept += data
    del kept[:-KEPT_BYTES]


def _outcome_of(member: _Rank, output: bytes) -> Outcome:
    """The outcome of a run in which `member` failed first."""
    failure, code = member.failure, member.process.returncode
    stderr = member.stderr.decode(errors="replace")
    if failure is None:
        if member.number == 0 and code > 0:
            return Outcome(code, output)  # it has reported that itself: a verdict, or a usage error
        why = f"it {_how_it_ended(code)}"
        failure = Failure(LOST, member.peer.lost(why)) if code < 0 else Failure(Failure.FAILED, why)
    is_named = failure.code in (LOST, Failure.MISUSED)
    return Outcome(failure.code, output, failure, None if is_named else member.number, stderr)


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
def _signals_as_exceptions() -> Iterator[None]:
    def raise_it(number: int, frame: FrameType | None) -> None:
        raise _Signalled(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, raise_it)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
