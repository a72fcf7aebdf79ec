"""A rank that is killed or stopped in the middle of a stream, with and without restarts; and what is left after it."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest

from tests.support.serve_command import PARTITA, Server, started, wait_until_gone
from tests.support.served import save_model

LOST = 75
SLOW = pytest.mark.slow
MLX = ("engine mlx --tp", "engine mlx --pp", "engine mlx --dp") if find_spec("mlx") else ()
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("lost") / "tiny")


def lose(server: Server, model: Path, rank: int, number: int) -> None:
    """Send a signal to a rank while it computes a stream, which ends with its name, as does an answer that is not streamed."""
    stream = server.stream(max_tokens=900)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(
            server.client().completions.create, model="tiny", prompt="Hi", max_tokens=900, extra_body={"ignore_eos": True}
        )  # fmt: skip
        for _ in range(20):
            next(stream)
        server.signal_rank(model, rank, number)
        with pytest.raises(openai.APIError, match=f"rank {rank}"):
            for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError, match=f"rank {rank}") as refused:
            whole.result()
        assert refused.value.status_code == 503


@SLOW
@pytest.mark.parametrize(
    ("axis", "rank", "number"),
    [
        ("tp", 1, signal.SIGKILL), ("tp", 0, signal.SIGSTOP), ("pp", 0, signal.SIGKILL), ("pp", 1, signal.SIGSTOP),
        ("dp", 1, signal.SIGKILL),
        *((axis, 1, signal.SIGKILL) for axis in MLX),
    ],
)  # fmt: skip
def test_a_lost_rank_is_replaced_and_requests_that_wait_survive(
    model: Path, axis: str, rank: int, number: signal.Signals
) -> None:
    settings = ("--max-sequences", "2", "--restarts", "2", "--lost-after", "12", "--max-tokens", "30")
    with started(model, *f"--{axis}".split(), "2", *settings) as server:
        expected = "".join(server.stream(max_tokens=30, seed=5))
        lose(server, model, rank, number)
        assert server.status() == 503
        with pytest.raises(openai.InternalServerError, match=f"rank {rank}"):
            server.client().completions.create(model="tiny", prompt="Hi")
        server.wait_for(200)
        assert "".join(server.stream(max_tokens=30, seed=5)) == expected
        if axis.endswith("dp"):  # two replicas run four requests at once
            assert server.end(signal.SIGTERM)[0] == 0
            return
        # Two requests run, and one waits, which survives the loss.
        running = [server.stream(max_tokens=900) for _ in range(2)]
        for stream in running:
            next(stream)
        waiting: list[str] = []
        thread = threading.Thread(target=lambda: waiting.extend(server.stream(max_tokens=30, seed=5)))
        thread.start()
        while "partita_queued_requests 1.0" not in server.get("/metrics"):
            time.sleep(0.05)
        server.signal_rank(model, rank, signal.SIGKILL)
        for stream in running:
            with pytest.raises(openai.APIError, match=f"rank {rank}"):
                list(stream)
        server.process.send_signal(signal.SIGTERM)  # during the restart
        thread.join()
        assert "".join(waiting) == expected
        code, err = server.ended()
        assert code == 0, err
        assert "restart 1 of 2" in err
        assert "restart 2 of 2" in err


@SLOW
@pytest.mark.parametrize(
    ("axis", "rank", "number"),
    [
        ("tp", 0, signal.SIGKILL), ("tp", 1, signal.SIGSTOP), ("pp", 1, signal.SIGKILL), ("pp", 0, signal.SIGSTOP),
        *((axis, 1, signal.SIGKILL) for axis in MLX),
    ],
)  # fmt: skip
def test_without_restarts_the_server_ends(model: Path, axis: str, rank: int, number: signal.Signals) -> None:
    with started(model, *f"--{axis}".split(), "2", "--lost-after", "12") as server:
        lose(server, model, rank, number)
        code, err = server.ended()
        assert code == LOST
        assert f"rank {rank}" in err


@SLOW
def test_sigterm_during_a_restart_without_requests_ends_it_at_once(model: Path) -> None:
    with started(model, "--pp", "2", "--restarts", "1") as server:
        server.signal_rank(model, 1, signal.SIGKILL)
        server.wait_for(503)
        assert server.end(signal.SIGTERM)[0] == 0


@SLOW
def test_one_rank_is_restarted_too(model: Path) -> None:
    with started(model, "--restarts", "1") as server:
        lose(server, model, 0, signal.SIGKILL)
        server.wait_for(200)
        assert len(list(server.stream(max_tokens=3))) == 3
        lose(server, model, 0, signal.SIGKILL)
        assert server.ended()[0] == LOST


def test_restarts_belong_to_our_launcher(model: Path) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PATH": ""}
    ended = subprocess.run(
        [*PARTITA, "serve", str(model), "--restarts", "1"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --restarts is for ranks that `partita serve` starts itself")
    wait_until_gone(model)
