"""Many clients at once, of whom some cancel, disconnect, read slowly or send too much: all others get their answers."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from partita.serving import ServeSettings
from tests.support.served import Served, serving

CLIENTS = 16
TOO_LARGE = json.dumps({"prompt": "x" * (20 << 20)}).encode()


def ask(served: Served, body: dict[str, Any]) -> socket.socket:
    """A connection on which a streamed completion was asked for."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=300)
    data = json.dumps({**body, "stream": True}).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    return connection


def one_request(served: Served, number: int, expected: dict[int, str]) -> str:
    """One request of a kind that its number decides; the kind."""
    rng = random.Random(number)
    prompt = rng.randrange(8)
    body = {"prompt": f"P{prompt}", "max_tokens": 4, "ignore_eos": True, "temperature": 1.0, "seed": 3}
    kind = rng.choices(["whole", "stream", "leaves", "slow", "refused"], [10, 6, 3, 1, 1])[0]
    if number % 500 == 99:
        kind = "large"
    if kind == "whole":
        status, answer = served.call("/v1/completions", body)
        assert (status, answer["choices"][0]["text"]) == (200, expected[prompt])
    elif kind == "refused":
        assert served.call("/v1/completions", {**body, "temperature": -1})[0] == 400
    elif kind == "large":
        status, answer = served.call("/v1/completions", TOO_LARGE)
        assert (status, answer["error"]["code"]) == (413, "too_large")
    elif kind == "leaves":
        with contextlib.closing(ask(served, {**body, "max_tokens": 500})) as connection:
            if rng.random() < 0.5:
                connection.recv(64)
    else:
        with contextlib.closing(ask(served, body)) as connection:
            received = b""
            while b"[DONE]" not in received:
                received += connection.recv(64 if kind == "slow" else 65536)
                time.sleep(0.02 if kind == "slow" else 0)
        lines = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
        assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == expected[prompt]
    return kind


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def bombard(served: Served, count: int) -> tuple[set[str], list[tuple[int, int]]]:
    """The kinds of `count` requests of 16 clients, and after each quarter of them the numbers of objects and bytes."""
    expected = {
        prompt: served.alone(list(f"P{prompt}".encode()), max_new_tokens=4, ignore_eos=True, temperature=1.0, seed=3).text
        for prompt in range(8)
    }  # fmt: skip
    kinds, seen = set(), []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for quarter in range(4):
            numbers = range(quarter * count // 4, (quarter + 1) * count // 4)
            kinds |= set(pool.map(lambda number: one_request(served, number, expected), numbers))
            deadline = time.monotonic() + 60
            while served.inbox.stats().running or served.inbox.stats().queued:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            gc.collect()
            seen.append((len(gc.get_objects()), resident_bytes()))
    stats = served.inbox.stats()
    assert (stats.blocks_used, served.call("/health")[0]) == (0, 200)
    return kinds, seen


def test_16_clients_at_once(served: Served) -> None:
    assert bombard(served, 120)[0] == {"whole", "stream", "leaves", "slow", "refused", "large"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_3000_requests(folder: Path) -> None:
    with serving(folder, ServeSettings(cache_bytes=1 << 20)) as served:
        _, seen = bombard(served, 3000)
    objects, resident = zip(*seen, strict=True)
    assert objects[-1] < 1.02 * objects[0]
    assert resident[-1] < resident[0] + (24 << 20)
