"""Runs over two hosts: they work as on one, and when the link is cut in the middle both ends say so and end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from partita.ranks.liveness import LOST
from tests.cli.test_launch import gone_by, pids
from tests.faults.broken_run import LOST_AFTER_S, MODULE, START_S
from tests.faults.two_hosts import Host, two_hosts, why_not
from tests.support.ranks import ROOT

pytestmark = [
    pytest.mark.fresh,
    pytest.mark.timeout(110),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

PORT = 29_517


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture(autouse=True)
def _link_is_up(hosts: tuple[Host, Host]) -> None:
    for host in hosts:
        subprocess.run(["ip", "-n", host.space, "link", "set", "link0", "up"], check=True)


def torchrun(node: int, hosts: tuple[Host, Host], *options: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
        "--master-addr", hosts[0].address, "--master-port", str(PORT), *options,
    ]  # fmt: skip


def start(host: Host, command: list[str], env: dict[str, str]) -> Any:
    surroundings = {
        **os.environ, **host.environment, "PARTITA_LOST_AFTER": f"{LOST_AFTER_S:g}", "PYTHONPATH": str(ROOT), **env,
    }  # fmt: skip
    return subprocess.Popen(
        host.command(command), cwd=ROOT, env=surroundings, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(processes: list[Any]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each, once all have ended."""
    ends = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=60)
            ends.append((process.returncode, out, err))
        return ends
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def ring(tmp_path: Path, hosts: tuple[Host, Host], node: int) -> dict[str, str]:
    """What mlx.launch gives each rank of a ring, which it starts by ssh."""
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps([[f"{host.address}:{PORT + 1}"] for host in hosts]))
    return {"MLX_HOSTFILE": str(file), "MLX_RANK": str(node)}


@pytest.mark.slow
def test_both_generate_what_one_does(hosts: tuple[Host, Host], model: Path) -> None:
    asks = ["-m", "partita", "generate", str(model), "Once upon", "--max-new-tokens", "12"]
    one = subprocess.run([sys.executable, *asks], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    ends = end([start(host, [*torchrun(node, hosts), *asks, "--tp", "2"], {}) for node, host in enumerate(hosts)])
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert [out for _, out, _ in ends] == [one.stdout, ""]


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_a_cut_link_is_told_at_both_ends(engine: str, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    processes = []
    for node, host in enumerate(hosts):
        work = [engine, "collective", str(tmp_path)]
        if engine == "torch":
            processes.append(start(host, [*torchrun(node, hosts), *MODULE, *work], {}))
        else:
            processes.append(start(host, [sys.executable, *MODULE, *work], ring(tmp_path, hosts, node)))
    try:
        working = pids_or_say(tmp_path, processes)
        time.sleep(0.5)
        hosts[1].cut()
    finally:
        ends = end(processes) if len(list(tmp_path.glob("rank*"))) == 2 else []
    for rank, (code, _, said) in enumerate(ends):
        other = f"rank {1 - rank} (host {hosts[1 - rank].name}, stage 0) was lost while working"
        assert code == (LOST if engine == "mlx" else 1), said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said
        assert errors[0].startswith(f"error: rank {rank}: {other}")
        assert errors[0].endswith(f"no message from it for {LOST_AFTER_S:g} s, so it is stopped, disconnected or stuck")
    assert gone_by(working, 5.0)


def pids_or_say(folder: Path, processes: list[Any]) -> list[int]:
    until_s = time.monotonic() + START_S
    while len(list(folder.glob("rank*"))) < 2 and time.monotonic() < until_s:
        if any(process.poll() is not None for process in processes):
            raise AssertionError(end(processes))
        time.sleep(0.05)
    return pids(folder, 2)
