"""The only rank was killed, or all at once, and the server did not end its requests: they waited for ever."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from partita.ranks.launcher import LOST, Outcome, start


class Beside:
    """A server that records what it is told, and starts the ranks again once."""

    is_over = False

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self) -> Mapping[str, str]:
        self.told.append("begin")
        return {}

    def drain(self) -> bool:
        return False

    def lose(self, why: str) -> None:
        self.told.append(why.partition(" was lost")[0])

    def restarts(self, outcome: Outcome) -> bool:
        assert outcome.code == LOST
        return self.told.count("begin") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_server_learns_of_ranks_that_end_at_once(ranks: int) -> None:
    beside = Beside()
    kill_yourself = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    outcome = start([], ranks, program=("-c", kill_yourself), backend="gloo", beside=beside)
    assert outcome.code == LOST
    lost = [told for told in beside.told if told != "begin"]
    assert len(lost) == 2
    assert all(told.startswith("rank ") for told in lost)
    assert beside.told[::2] == ["begin", "begin"]
