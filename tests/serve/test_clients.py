"""Clients that misbehave: without a key, with too much, that leave, or that read slowly; and a rank that is lost."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from partita.serving import ServeSettings
from partita.serving.front import Front
from tests.support.served import Served, serving

LONG = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "temperature": 1.0}


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[Served]:
    with serving(folder, api_key="sésame", max_body_bytes=1 << 20) as one:
        yield one


def wait_for(is_so: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def send(served: Served, body: dict[str, Any]) -> socket.socket:
    """A connection on which a completion was asked for."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    return connection


def test_the_key(guarded: Served) -> None:
    assert guarded.call("/health") == (200, {"status": "ok"})
    assert guarded.call("/")[0] == 200
    for headers in (
        {},
        {"Authorization": "Bearer sesame"},
        {"Authorization": "Basic sésame".encode().decode("latin-1")},
    ):
        for path in ("/v1/models", "/metrics", "/plan", "/nothing"):
            status, body = guarded.call(path, headers=headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        guarded.client("wrong").models.list()
    right = "Bearer sésame".encode().decode("latin-1")
    assert guarded.call("/v1/models", headers={"Authorization": right})[0] == 200


def test_a_body_of_20_MB_is_answered(guarded: Served) -> None:
    headers = {"Authorization": "Bearer sésame".encode().decode("latin-1")}
    status, body = guarded.call("/v1/completions", json.dumps({"prompt": "x" * (20 << 20)}).encode(), headers)
    assert (status, body["error"]["code"]) == (413, "too_large")
    assert guarded.call("/health")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(served: Served, stream: bool) -> None:
    connection = send(served, {**LONG, "stream": stream})
    wait_for(lambda: served.inbox.stats().running == 1)
    if stream:
        assert b"200 OK" in connection.recv(1000)
    before = served.inbox.stats().tokens
    connection.close()
    wait_for(lambda: served.inbox.stats().running == 0)
    assert served.inbox.stats().tokens - before < 800


def test_a_slow_reader_does_not_delay_others(served: Served) -> None:
    slow = send(served, {**LONG, "stream": True, "n": 4, "logprobs": 20})
    try:
        wait_for(lambda: served.inbox.stats().running == 4)
        answer = served.client().completions.create(model="tiny", prompt="Hi", max_tokens=5)
        assert answer.choices[0].text == served.alone(list(b"Hi"), max_new_tokens=5).text
    finally:
        slow.close()
    wait_for(lambda: served.inbox.stats().running == 0)


def test_a_request_that_never_fits(folder: Path) -> None:
    with serving(folder, ServeSettings(cache_bytes=64 << 10)) as small:
        with pytest.raises(openai.BadRequestError, match="a prompt of 900 tokens with 16 new ones needs"):
            small.client().completions.create(model="tiny", prompt=[1] * 900)
        assert small.client().completions.create(model="tiny", prompt=[1], max_tokens=2).choices


def test_the_error_event_of_a_stream(folder: Path) -> None:
    with serving(folder) as lone:
        front = Front()
        lone.service.inbox = front
        front.open([lone.inbox])
        connection = send(lone, {**LONG, "stream": True})
        assert b"200 OK" in connection.recv(100)
        whole = send(lone, {**LONG})
        wait_for(lambda: lone.inbox.stats().running == 2)
        front.begun([1, 2])
        front.lose("rank 1 was lost while working: it was killed.")
        texts = []
        for one in (connection, whole):
            text = b""
            while b"[DONE]" not in text and b'"code":"unavailable"}}' not in text:
                text += one.recv(65536)
            texts.append(text)
            one.close()
        assert b'event: error\ndata: {"error":{"message":"rank 1 was lost while working' in texts[0]
        assert texts[1].startswith(b"HTTP/1.1 503")
        assert lone.call("/health")[0] == 503
        status, body = lone.call("/v1/completions", {"prompt": "Hi"})
        assert (status, "rank 1 was lost" in body["error"]["message"]) == (503, True)
        front.open([lone.inbox])
        assert lone.call("/health")[0] == 200
        assert lone.call("/v1/completions", {"prompt": "Hi", "max_tokens": 2})[0] == 200
