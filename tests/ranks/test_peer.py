"""What is known of a rank, and when it is lost: without processes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import DistributedError, PeerFailed
from partita.ranks.liveness import (
    ME,
    Activity,
    Lines,
    Peer,
    Uptime,
    beat_s,
    doing,
    is_echo,
    line_of,
    lost_after_s,
    waits_in,
)


def test_an_activity_tells_the_call_that_it_waits_in() -> None:
    me = Activity()
    assert str(me) == "starting"
    me.task = "training step 3"
    with me.over("a send"):
        assert str(me) == "training step 3, in a send"
    me.aside = "writing the checkpoint of step 2"
    assert str(me) == "training step 3 and writing the checkpoint of step 2"


def test_what_is_done_inside_is_forgotten_outside() -> None:
    before = ME.task

    @waits_in("a barrier")
    def wait(n: int) -> str:
        return f"{ME}{n}"

    with doing("loading"):
        with doing("reading"):
            assert wait(1) == "reading, in a barrier1"
        assert str(ME) == "loading"
    assert ME.task == before


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text()), max_size=5), st.data())
def test_messages_arrive_however_they_are_cut(messages: list[dict[str, int | str]], data: st.DataObject) -> None:
    whole = b"".join(map(line_of, messages))
    lines, heard = Lines(), []
    while whole:
        count = data.draw(st.integers(1, len(whole)))
        heard += list(lines.take(whole[:count]))
        whole = whole[count:]
    assert heard == messages


def test_what_is_no_message_is_passed_over() -> None:
    lines = Lines()
    assert list(lines.take(b'\xff\n[]\n7\n{"a": 1}\n{"b":')) == [{"a": 1}]
    assert list(lines.take(b" 2}\n")) == [{"b": 2}]
    assert list(lines.take(b"x" * 1_000_000)) == []
    assert list(lines.take(b'\n{"c": 3}\n')) == [{"c": 3}]


def test_a_peer_is_what_it_has_told() -> None:
    peer = Peer(3, heard_s=1.0)
    assert str(peer) == "rank 3 (stage 0)"
    assert peer.silent_s(9.0) == 2.0  # while it starts, four seconds count as one
    peer.take({"host": "box", "stage": 1, "doing": "loading the model", "rank": 9, "other": 1}, 9.0)
    assert peer.silent_s(12.0) == 3.0
    assert peer.lost("why") == "rank 3 (host box, stage 1) was lost while loading the model: why"


def test_a_clock_stands_still_while_nobody_looks() -> None:
    times = iter([100.0, 101.0, 102.5, 110.0, 111.0])
    clock = Uptime(4.0, lambda: next(times))
    assert [clock.now_s() for _ in range(4)] == [1.0, 2.5, 2.5, 3.5]


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 30.0), ("5", 5.0), (" 0.5 ", 0.5), ("0", math.inf), ("inf", math.inf)]
)
def test_the_limit(text: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_LOST_AFTER", text)
    assert lost_after_s() == seconds
    assert 0 < beat_s(seconds) <= 1.0


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "30s"])
def test_a_limit_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_LOST_AFTER", text)
    with pytest.raises(DistributedError, match="PARTITA_LOST_AFTER must be a number of seconds, or 0 to wait forever"):
        lost_after_s()


def test_a_process_of_another_machine_is_not_killed() -> None:
    import subprocess
    import sys

    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        Peer(1, pids="there", pid=child.pid).kill_if_stopped("here")
        Peer(1, pids="here", pid=0).kill_if_stopped("here")
        assert child.poll() is None
        Peer(1, pids="here", pid=child.pid).kill_if_stopped("here")
        assert child.wait(10) == -9


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("[ring] connection to a peer was lost"), True),
        (PeerFailed(3, "ValueError: the cause"), True),
        (DistributedError("rank 3 failed, and its connection was closed"), False),
        (ValueError("the peer group has 3 ranks"), False),
    ],
)
def test_what_only_echoes_a_loss_is_known(error: Exception, is_one: bool) -> None:
    assert is_echo(error) == is_one
