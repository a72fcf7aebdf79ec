"""Waits inside Open MPI: with more ranks than cores its calls sleep, otherwise they yield."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from partita.ranks.backends import open_mpi
from partita.ranks.rendezvous import rendezvous
from partita.ranks.waiting import cores, open_mpi_waits

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(300)]

_SLEEPS = """
import resource, time
from mpi4py import MPI
world = MPI.COMM_WORLD
world.allreduce(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
if world.rank == 0:
    time.sleep(2)
world.allreduce(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before)
"""


@pytest.mark.skipif(open_mpi() is None, reason="Open MPI is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count a sleep as Linux does")
def test_waits_sleep_with_more_ranks_than_cores() -> None:
    """The kernel counts a sleep as a voluntary context switch, and a yield as an involuntary one."""
    assert sleeps_of_a_wait(open_mpi_waits(cores())) < 500
    assert sleeps_of_a_wait(open_mpi_waits(cores() + 1)) > 1000


def sleeps_of_a_wait(settings: dict[str, str]) -> int:
    """How often a rank sleeps in a call of Open MPI that waits 2 s."""
    with rendezvous("mpi", 2) as environments:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _SLEEPS],
                env={**os.environ, **met, **settings},
                stdout=subprocess.PIPE,
                text=True,
            )
            for met in environments
        ]
        return int([process.communicate(timeout=120)[0] for process in processes][1])


def test_the_launcher_sets_it() -> None:
    if open_mpi() is None:
        pytest.skip("Open MPI is not installed")
    with rendezvous("mpi", cores() + 1) as environments:
        assert all(environment.items() >= open_mpi_waits(cores() + 1).items() for environment in environments)
