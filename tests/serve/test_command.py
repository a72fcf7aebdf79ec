"""`partita serve` and `partita chat` as users start them: real ranks, real signals, and no process that stays."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from partita.torch import add_lora, load, save_adapters
from partita.torch.collectives.groups import single_groups
from tests.serve.test_embeddings_route import BERT
from tests.support.serve_command import HI, PARTITA, started, wait_until_gone
from tests.support.served import save_model, serving

MLX = ("--engine mlx", *(f"--engine mlx --{axis} 2" for axis in ("tp", "pp", "dp"))) if find_spec("mlx") else ()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("commands") / "tiny")


@pytest.fixture(scope="module")
def alone(model: Path) -> str:
    with serving(model) as served:
        return served.alone(served.chat_ids("Hi"), max_new_tokens=40, temperature=1.0, seed=6).text


@pytest.mark.parametrize(
    "split",
    ["--tp 2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("--pp 2", "--dp 2", "--cp 2", *MLX))],
)  # fmt: skip
def test_sigterm_drains_and_exits_with_0(model: Path, alone: str, split: str) -> None:
    with started(model, *split.split(), "--served-model-name", "mine") as server:
        assert [one.id for one in server.client().models.list()] == ["mine"]
        stream = server.client().chat.completions.create(
            model="mine", messages=HI, max_tokens=40, temperature=1.0, seed=6, stream=True  # type: ignore[arg-type]
        )  # fmt: skip
        chunks = [next(iter(stream))]
        server.process.send_signal(signal.SIGTERM)
        chunks += stream
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone
        assert chunks[-1].choices[0].finish_reason is not None
        assert server.ended() == (0, "")


@pytest.mark.slow
def test_an_encoder_is_served(tmp_path: Path) -> None:
    encoder = save_model(tmp_path / "encoder", None, BERT)
    with started(encoder, "--tp", "2") as server:
        assert len(server.client().embeddings.create(model="encoder", input=["Hi"]).data[0].embedding) == 24
        assert server.end(signal.SIGTERM) == (0, "")


@pytest.mark.slow
def test_sigterm_under_torchrun_drains(model: Path) -> None:
    """Of torchrun, which signals all ranks, and of the first rank alone, after which torchrun exits with 0."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "partita"]
    for is_first in (False, True):
        with started(model, "--tp", "2", program=torchrun) as server:
            expected = "".join(server.stream(max_tokens=60, temperature=0))
            stream = server.stream(max_tokens=60, temperature=0)
            texts = [next(stream)]
            os.kill(server.pid if is_first else server.process.pid, signal.SIGTERM)
            assert "".join(texts + list(stream)) == expected
            assert server.ended()[0] == (0 if is_first else 1)


@pytest.mark.slow
def test_adapters_are_served(tmp_path: Path) -> None:
    model = save_model(tmp_path / "tiny")
    with started(model, "--tp", "2", "--adapters", f"a={_adapters(model, tmp_path)}") as server:
        answers = [
            server.client().completions.create(model=name, prompt="Hi", max_tokens=20).choices[0].text
            for name in ("tiny", "a", "tiny")
        ]
        assert answers[0] == answers[2] != answers[1]
        assert server.end(signal.SIGTERM) == (0, "")


def _adapters(model: Path, folder: Path) -> Path:
    """Adapters of a model that change what it writes."""
    split = load(model, groups=single_groups())
    add_lora(split, 2, seed=0)
    with torch.no_grad():
        for name, parameter in split.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    save_adapters(split, folder / "adapters")
    return folder / "adapters"


def test_ctrl_c_and_what_is_warned_of(model: Path) -> None:
    with started(model, "--host", "0.0.0.0") as server:
        port = server.url.rpartition(":")[2]
        second = subprocess.run(
            [*PARTITA, "serve", str(model), "--port", port], capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 2
        assert second.stderr.startswith(
            f"error: --host 127.0.0.1 --port {port} cannot be used: Address already in use."
        )
        code, err = server.end(signal.SIGINT)
        assert code == 130
        assert err.startswith("note: --host 0.0.0.0 lets other machines in, and without --api-key")
        assert err.endswith("\ninterrupted\n")


@pytest.mark.parametrize("engine", ["torch", *([pytest.param("mlx", marks=pytest.mark.slow)] if MLX else [])])
def test_a_chat_through_a_pipe(model: Path, tmp_path: Path, alone: str, engine: str) -> None:
    file = tmp_path / "chat.json"
    lines = ["Hi", f"/save {file}", "/what", '"""', "two", "lines", '"""', "/clear", "on \\", "two", f"/save {file}.2"]
    ended = subprocess.run(
        [*PARTITA, "chat", str(model), "--engine", engine, "--max-tokens", "40", "--temperature", "1", "--seed", "6"],
        input="\n".join(lines), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"{alone}\n")
    assert "/what is no command" in ended.stderr
    assert json.loads(file.read_text())["messages"] == [*HI, {"role": "assistant", "content": alone}]
    assert json.loads(Path(f"{file}.2").read_text())["messages"][0]["content"] == "on \ntwo"
    wait_until_gone(model)


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_and_not_the_chat(model: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*PARTITA, "chat", str(model), "--max-tokens", "900"], stdin=terminal, stdout=terminal,
        stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    shown = ""

    def wait_for(text: str, limit_s: float = 60) -> None:
        nonlocal shown
        deadline = time.monotonic() + limit_s
        while text not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([controller], [], [], 0.1)[0]:
                shown += os.read(controller, 4096).decode(errors="replace")

    try:
        wait_for("> ")
        os.write(controller, b"Hi\n")
        deadline = time.monotonic() + 60
        wait_for("Hi\r\n")
        while len(shown.partition("Hi\r\n")[2]) < 40:
            assert time.monotonic() < deadline, shown
            shown += os.read(controller, 4096).decode(errors="replace")
        os.write(controller, b"\x03")
        shown = ""
        wait_for("> ")
        os.write(controller, f"/save {tmp_path / 'chat.json'}\n".encode())
        wait_for("saved 2 messages")
        answer = json.loads((tmp_path / "chat.json").read_text())["messages"][1]["content"]
        assert 0 < len(answer) < 900
        os.write(controller, b"\x04")
        while process.poll() is None:
            with contextlib.suppress(OSError):
                os.read(controller, 4096)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    wait_until_gone(model)
