"""Two replicas behind one front end, the second at the other end of a socket: distribution, cancellation, loss and the end."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from partita.errors import ModelError, PlanError
from partita.generation import Sampling
from partita.serving import ServeRequest, ServeSettings, ServingLoop
from partita.serving.channel import Channel, RemoteReplica, serve_remote
from partita.serving.front import Front
from partita.torch import byte_tokenizer
from partita.torch.serving import serving_loop
from tests.support.serving import Heard, alone, random_requests, split_model, unsplit_model

GREEDY = {"use_generation_config": False, "ignore_eos": True}


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@dataclass
class Two:
    """A front end with two replicas, and their loops."""

    front: Front
    loops: tuple[ServingLoop, ServingLoop]

    def ask(self, number: int, prompt: tuple[int, ...], new: int) -> Heard:
        heard = Heard()
        self.front.submit(ServeRequest(number, prompt, Sampling(new, **GREEDY)), heard)
        return heard


@contextlib.contextmanager
def two(cache_bytes: int = 1 << 24) -> Iterator[Two]:
    unsplit = unsplit_model("qwen2", {}, torch.float64)
    settings = ServeSettings(block_tokens=4, cache_bytes=cache_bytes, max_sequences=2)
    first, second = (serving_loop(split_model(unsplit, {}), settings, tokenizer=byte_tokenizer()) for _ in range(2))
    near, far = socket.socketpair()
    threads = [
        threading.Thread(target=first.run),
        threading.Thread(target=serve_remote, args=(second, Channel(far), {"context": 7})),
    ]
    for thread in threads:
        thread.start()
    front, remote = Front(), RemoteReplica(Channel(near))
    assert remote.facts["context"] == 7
    remote.start(front.begun)
    front.open([first.inbox, remote])
    try:
        yield Two(front, (first, second))
    finally:
        for loop in (first, second):
            loop.inbox.shutdown(drain=False)
        for thread in threads:
            thread.join()
        near.close()


@pytest.mark.slow
def test_requests_go_where_less_is_to_do_and_to_their_prefix() -> None:
    with two() as both:
        front = both.front
        # One of each two goes to each replica.
        heard = [both.ask(i, (i, 1, 2), 97) for i in range(4)]
        wait_for(lambda: (front.stats().running, front.stats().blocks_used) == (4, 4 * 25))
        assert [loop.inbox.stats().running for loop in both.loops] == [2, 2]
        for one in heard:
            one.ended.wait(60)
        # A prompt that one of them has computed goes there, whichever it is.
        for start in range(50, 54):
            prompt = tuple(range(start, start + 13))
            before = [loop.inbox.stats().finished for loop in both.loops]
            for number in (100, 101):
                assert both.ask(number, prompt, 2).ended.wait(60)
            after = [loop.inbox.stats().finished for loop in both.loops]
            assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0, 2]
        assert front.stats().cached_tokens == 4 * 12


def test_answers_are_those_of_each_alone() -> None:
    with two() as both:
        heard, requests = {}, random_requests(8, 5)
        for request in requests:
            heard[request.id] = Heard()
            both.front.submit(request, heard[request.id])
        both.front.shutdown()
        with pytest.raises(ModelError, match="no request is accepted any more: the server is shutting down"):
            both.ask(99, (1,), 1)
        model = split_model(unsplit_model("qwen2", {}, torch.float64), {})
        for request in requests:
            one = heard[request.id]
            assert one.ended.wait(60)
            assert (one.tokens, one.text, one.finished.reason) == alone(model, request)
        assert both.front.stats().finished == 8


def test_refusals_and_cancellation() -> None:
    with two(200_000) as both:
        for number in range(2):
            with pytest.raises(PlanError, match="a prompt of 15 tokens with 9 new ones needs 6 cache blocks"):
                both.ask(number, tuple(range(15)), 9)
        heard = [both.ask(i, (i, 1), 15) for i in range(6)]
        both.front.cancel(4)
        both.front.cancel(5)
        for one in heard:
            assert one.ended.wait(60)
        assert {heard[i].finished.reason for i in range(4)} == {"length"}
        assert heard[4].finished.reason == heard[5].finished.reason == "cancelled"


def test_what_waits_survives_a_loss_and_what_has_begun_does_not() -> None:
    with two() as both:
        front = both.front
        heard = [both.ask(i, (i, 1, 2), 297 if i < 4 else 2) for i in range(6)]
        for one in heard[:4]:
            wait_for(lambda one=one: len(one.tokens) > 0)
        front.begun([0, 1, 2, 3])
        front.lose("rank 1 was lost")
        assert front.closed == "rank 1 was lost"
        assert [one.ended.is_set() for one in heard] == [True] * 4 + [False] * 2
        assert {(one.finished.reason, one.finished.error) for one in heard[:4]} == {("lost", "rank 1 was lost")}
        with pytest.raises(ModelError, match="no request is accepted any more: rank 1 was lost"):
            both.ask(99, (1,), 1)
        assert front.stats().queued == 2
        front.cancel(5)
        assert heard[5].finished.reason == "cancelled"
    with two() as again:
        front.open([again.loops[0].inbox])
        assert heard[4].ended.wait(60)
        assert (heard[4].finished.reason, len(heard[4].tokens), front.closed) == ("length", 2, "")
        front.lose("rank 0 was lost")
        front.shutdown()
        assert front.is_over
