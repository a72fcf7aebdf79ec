"""Open MPI under the communicator: what gloo's tests ask of one, sums of narrow floats, models and pipelines over it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist

from partita.ranks.backends import open_mpi
from partita.ranks.liveness import LOST
from partita.ranks.rendezvous import rendezvous
from partita.torch.collectives.groups import make_groups
from partita.torch.collectives.mpi import MpiCommunicator
from tests.support.models import CONFIGS
from tests.support.ranks import ROOT, ranks
from tests.torch import test_comm, test_models

pytestmark = pytest.mark.skipif(open_mpi() is None, reason="Open MPI is not installed")


def _as_with_gloo(name: str) -> None:
    before, test_comm.Communicator = test_comm.Communicator, MpiCommunicator  # type: ignore[misc]
    try:
        getattr(test_comm, name)()
    finally:
        test_comm.Communicator = before  # type: ignore[misc]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "name",
    [
        "gather_uneven",
        "scatter_uneven",
        "exchange_rows",
        "gather_splits",
        "reduce_and_broadcast",
        "ring",
        "large_messages",
        "sub_group",
    ],
)
def test_does_what_gloo_does(name: str, size: int) -> None:
    if name != "sub_group" or size > 2:
        ranks(size, "mpi").run(_as_with_gloo, name)


def _sums(dtype: str) -> tuple[list[float], bool]:
    comm = MpiCommunicator()
    values = torch.linspace(-3, 3, 1001).to(getattr(torch, dtype)) * (comm.rank + 1)
    expected = sum((torch.linspace(-3, 3, 1001).to(getattr(torch, dtype)) * (r + 1)).float() for r in range(comm.size))
    total = comm.all_reduce_(values.clone())
    strided = comm.all_reduce_(torch.stack([values, values], 1)[:, 0])
    return total.tolist(), torch.equal(total, expected.to(values.dtype)) and torch.equal(strided, total)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_are_summed_in_float32(dtype: str) -> None:
    for total, right in ranks(3, "mpi").run(_sums, dtype):
        assert right
        assert total == ranks(3, "mpi").run(_sums, dtype)[0][0]


def _bits(count: int) -> bytes:
    comm = MpiCommunicator()
    values = torch.randn(count, generator=torch.Generator().manual_seed(comm.rank))
    return comm.all_reduce_(values).numpy().tobytes()


@pytest.mark.parametrize("count", [7, 1024, 100_003])
def test_every_rank_and_every_run_has_the_same_bits(count: int) -> None:
    first = ranks(3, "mpi").run(_bits, count)
    assert len(set(first)) == 1
    assert ranks(3, "mpi").run(_bits, count) == first


def _kinds() -> list[str]:
    from partita.core.mesh import Mesh

    groups = make_groups(Mesh(pp=2, tp=2))
    return [type(comm).__name__ for comm in (groups.tp, groups.pp)]


def test_groups_of_a_mesh_talk_through_it() -> None:
    assert ranks(4, "mpi").run(_kinds) == [["MpiCommunicator"] * 2] * 4


@pytest.mark.parametrize("name", ["llama-7-heads-1-kv", "qwen3-moe"])
def test_models_are_equal_over_it(name: str) -> None:
    differences = ranks(2, "mpi").run(test_models._differences, CONFIGS[name], 2)[0]
    assert [d for d in differences if not d[2] <= 1e-12] == []


_WAITS = """
import os, sys, torch
from partita.torch.collectives.groups import init_process_group, make_groups
from partita.core.mesh import Mesh
init_process_group(lost_after_s=float(sys.argv[1]))
comm = make_groups(Mesh(tp=2)).tp
print("met", flush=True)
for _ in range(10**9):
    comm.all_reduce_(torch.ones(4))
"""


@pytest.mark.fresh
def test_a_stopped_rank_ends_the_others() -> None:
    with rendezvous("mpi", 2) as environments:
        processes: list[Any] = [
            subprocess.Popen(
                [sys.executable, "-c", _WAITS, "2"], env={**os.environ, **met, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for met in environments
        ]  # fmt: skip
        try:
            for process in processes:
                assert process.stdout.readline() == "met\n"
            time.sleep(0.5)
            processes[1].send_signal(signal.SIGSTOP)
            assert processes[0].wait(60) == LOST
            said = processes[0].stderr.read()
            assert f"rank 0: rank 1 (host {socket.gethostname()}, stage 0) was lost while" in said
            assert "in an all-reduce: no message from it for 2 s" in said
            assert processes[1].wait(10) == -signal.SIGKILL  # nobody else would end it
        finally:
            for process in processes:
                process.kill()
                process.wait()
                process.stdout.close()
                process.stderr.close()


def _world() -> str:
    return dist.get_backend()


def test_what_is_not_on_the_cpu_still_has_torch_distributed() -> None:
    assert ranks(2, "mpi").run(_world) == ["gloo", "gloo"]


def _waits(call: str) -> float:
    """CPU seconds of a call that waits for rank 0, which comes 2 s later."""
    comm = MpiCommunicator()
    x = torch.ones(4096)
    last = comm.size - 1
    calls: dict[str, Callable[[], object]] = {
        "all_reduce_": lambda: comm.all_reduce_(x),
        "all_gather": lambda: comm.all_gather(x),
        "reduce_scatter": lambda: comm.reduce_scatter(x),
        "broadcast_": lambda: comm.broadcast_(x),
        "barrier": comm.barrier,
        "recv_": lambda: comm.send(x, last) if comm.rank == 0 else comm.recv_(x, 0),
        "send": lambda: comm.recv_(x, last) if comm.rank == 0 else comm.send(x, 0),
        "start_recv_": lambda: (comm.start_send(x, last) if comm.rank == 0 else comm.start_recv_(x, 0)).wait(),
    }
    calls[call]()
    before_s = time.process_time()
    if comm.rank == 0:
        time.sleep(2)
    calls[call]()
    return time.process_time() - before_s


@pytest.mark.parametrize(
    "call",
    ["all_reduce_", "all_gather", "reduce_scatter", "broadcast_", "barrier", "recv_", "send", "start_recv_"],
)
def test_a_rank_sleeps_while_it_waits(call: str) -> None:
    assert max(ranks(2, "mpi").run(_waits, call)) < 0.5  # spinning costs up to 2 s
