"""Ranks that look after each other, as processes without any framework: killed, stopped, failing, done."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from partita.ranks.liveness import LOST
from tests.support.ranks import ROOT

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(240)]

HOST = socket.gethostname()
LIMIT_S = 2.0
LONG_S = 20.0


class Run:
    """Ranks that have joined."""

    def __init__(self, ranks: int, limit_s: float) -> None:
        env = {**os.environ, "PARTITA_LOST_AFTER": str(limit_s), "PYTHONPATH": str(ROOT)}
        self.processes: list[Any] = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks.program", str(rank), str(ranks)], env=env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        self.exchange()
        self.offer = self.exchange()[0]
        assert self.hear() == ["joined"] * ranks

    def hear(self) -> list[Any]:
        return [json.loads(process.stdout.readline()) for process in self.processes]

    def exchange(self) -> list[Any]:
        told = self.hear()
        for process in self.processes:
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()
        return told

    def order(self, rank: int, order: str) -> None:
        self.processes[rank].stdin.write(order + "\n")
        self.processes[rank].stdin.flush()

    def sleep(self) -> None:
        for rank in range(len(self.processes)):
            self.order(rank, "sleep")
        assert set(self.hear()) == {"asleep"}
        time.sleep(2.2)  # until that was told

    def ends(self) -> list[tuple[int, str]]:
        """Exit code and standard error of each rank, once all have ended."""
        return [(process.wait(20), process.stderr.read()) for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError):
                    stream.close()


@contextlib.contextmanager
def joined(ranks: int, limit_s: float = LONG_S) -> Iterator[Run]:
    run = Run(ranks, limit_s)
    try:
        yield run
    finally:
        run.close()


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_killed_rank_ends_the_others_at_once(lost: int) -> None:
    with joined(4) as run:
        run.sleep()
        run.processes[lost].kill()
        for rank, (code, said) in enumerate(run.ends()):
            if rank == lost:
                assert (code, said) == (-signal.SIGKILL, "")
            else:
                where = f"rank {lost} (host {HOST}, stage {lost // 2})"
                why = "training step 7, in an all-reduce: its process has ended"
                assert (code, said) == (LOST, f"error: rank {rank}: {where} was lost while {why}\n")


@pytest.mark.parametrize("lost", [0, 2])
def test_a_stopped_rank_ends_the_others_and_is_ended(lost: int) -> None:
    with joined(3, LIMIT_S) as run:
        run.sleep()
        run.processes[lost].send_signal(signal.SIGSTOP)
        for rank, (code, said) in enumerate(run.ends()):
            if rank == lost:
                assert (code, said) == (-signal.SIGKILL, "")
            else:
                assert code == LOST
                assert f"rank {lost} (host {HOST}, stage {lost // 2}) was lost while training step 7" in said
                assert "no message from it for 2 s, so it is stopped, disconnected or stuck" in said
                assert said.count("\n") == 1


def test_who_is_stopped_for_a_moment_is_not_lost() -> None:
    limit_s = 4 * LIMIT_S  # a busy machine adds to each stop
    with joined(3, limit_s) as run:
        for rank in (0, 1):
            run.processes[rank].send_signal(signal.SIGSTOP)
            time.sleep(0.4 * limit_s)
            run.processes[rank].send_signal(signal.SIGCONT)
        time.sleep(1.5 * limit_s)
        for rank in range(3):
            run.order(rank, "end")
        assert run.ends() == [(0, "")] * 3


@pytest.mark.parametrize("failing", [0, 1])
def test_of_an_exception_only_its_own_rank_speaks(failing: int) -> None:
    with joined(3) as run:
        run.order(failing, "raise")
        for rank, (code, said) in enumerate(run.ends()):
            assert code == 1
            assert ("ValueError: this rank has had enough" in said) == (rank == failing)
            assert bool(said) == (rank == failing)


def test_a_rank_whose_connections_break_says_why() -> None:
    with joined(3) as run:
        run.order(1, "broken")
        time.sleep(0.3)
        run.order(2, "fail")
        ends = run.ends()
        assert [code for code, _ in ends] == [2, 2, 2]
        assert "Connection closed" in ends[1][1]  # Python shows it before anyone can wait
        assert ends[0][1] == ""


def test_a_crash_is_a_loss() -> None:
    with joined(3) as run:
        run.order(2, "crash")
        assert [code for code, _ in run.ends()] == [LOST, LOST, 3]


@pytest.mark.parametrize("first", [0, 2])
def test_who_has_said_farewell_is_not_missed(first: int) -> None:
    with joined(3, LIMIT_S) as run:
        run.order(first, "end")
        assert run.processes[first].wait(10) == 0
        time.sleep(1.5 * LIMIT_S)
        for rank in range(3):
            if rank != first:
                run.order(rank, "end")
        assert run.ends() == [(0, "")] * 3


def test_strangers_are_not_heard() -> None:
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(joined(2))
        addresses, port, token, host = run.offer
        assert (addresses, host) == (["127.0.0.1"], HOST)
        assert len(token) == 32
        for words in (
            b"", b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1, "token": "", "failure": {"code": 1, "message": "x"}}\n' * 3,
            b'{"token": 1}\n', b"[]\n", b"\xff\x00" * 70_000, b'{"rank": 0, "is_done": true}\n',
        ):  # fmt: skip
            stranger = stack.enter_context(socket.create_connection((addresses[0], port), 5))
            with contextlib.suppress(OSError):
                stranger.sendall(words)
        time.sleep(1.0)
        for rank in range(2):
            run.order(rank, "end")
        assert run.ends() == [(0, "")] * 2


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_the_hub_of_one_machine_listens_on_the_loopback() -> None:
    with joined(2) as run:
        listening = [
            line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"
        ]
        assert f"0100007F:{run.offer[1]:04X}" in listening
        for rank in range(2):
            run.order(rank, "end")
        assert run.ends() == [(0, "")] * 2


def test_none_is_watched_where_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from partita.ranks import liveness

    asked: list[Any] = []

    def gather(value: Any) -> list[Any]:
        asked.append(value)
        return [value, value]

    monkeypatch.setenv("PARTITA_LOST_AFTER", "0")
    liveness.join(0, 2, gather)
    assert len(asked) == 1
    assert not liveness.has_joined()
    liveness.join(0, 1, gather)
    assert len(asked) == 1


_SPAWNED = """
import sys, time
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank, fails):
    import os

    from partita.torch import init_parallelism

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
    init_parallelism(2, lost_after_s=20)
    if rank == fails:
        raise ValueError("this rank has had enough")
    time.sleep(1.5 * rank)
    print(f"rank {rank} is done", flush=True)


if __name__ == "__main__":
    mp.spawn(work, (int(sys.argv[2]),), 2)
"""


@pytest.mark.parametrize("fails", [-1, 1])
def test_processes_of_multiprocessing_say_farewell(fails: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SPAWNED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(script), str(port), str(fails)]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if fails < 0:
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout == "rank 0 is done\nrank 1 is done\n"
    else:
        assert ended.returncode == 1
        assert "ValueError: this rank has had enough" in ended.stderr
        assert "was lost" not in ended.stderr
