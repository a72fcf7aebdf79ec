"""Another model is loaded while the ranks stay: requests end first, and a model that fails leaves the old one served."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.serve.test_embeddings_route import BERT
from tests.support.serve_command import Server, processes_of, started
from tests.support.served import TINY, save_model, serving

SETTINGS: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 6}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library") / "models"
    save_model(folder / "deep", config={**TINY, "num_hidden_layers": 4, "hidden_size": 48})
    save_model(folder / "encoder", None, BERT)
    shutil.copytree(folder / "deep", folder / "half")
    weights = folder / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(folder / "deep", folder / "torn")
    (folder / "torn" / "tokenizer.json").write_text("{")
    (folder / "no model").mkdir()
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("first") / "tiny")


def alone(folder: Path) -> str:
    with serving(folder) as served:
        return served.alone(list(b"Hi"), max_new_tokens=40, temperature=1.0, seed=6, ignore_eos=True).text


def load(server: Server, name: str, key: str = "") -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{server.url}/models/load", json.dumps({"model": name}).encode(), {"authorization": f"Bearer {key}"}
    )
    with contextlib.ExitStack() as stack:
        try:
            answer: Any = stack.enter_context(urllib.request.urlopen(request, timeout=120))
        except urllib.error.HTTPError as error:
            answer = stack.enter_context(error)
        return answer.status, json.loads(answer.read())


def ask(server: Server, model: str) -> str:
    return "".join(_stream(server, model))


def _stream(server: Server, model: str) -> Iterator[str]:
    chunks = server.client().completions.create(
        model=model, prompt="Hi", stream=True, extra_body={"ignore_eos": True}, **SETTINGS
    )
    return (chunk.choices[0].text for chunk in chunks)


SPLITS = ["--tp 1", "--tp 2", "--pp 2", "--dp 2", *(["--engine mlx --tp 2"] if find_spec("mlx") else [])]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("split", SPLITS)
def test_a_model_is_loaded_while_the_ranks_stay(tiny: Path, models: Path, split: str) -> None:
    expected = {folder.name: alone(folder) for folder in (tiny, models / "deep")}
    with started(tiny, *split.split(), "--models", str(models)) as server, ThreadPoolExecutor(1) as pool:
        ranks = processes_of(tiny)
        stream = _stream(server, "tiny")
        text = next(stream)
        loading = pool.submit(load, server, "deep")
        assert text + "".join(stream) == expected["tiny"]
        assert loading.result() == (200, {"success": True, "model": "deep"})
        assert [one.id for one in server.client().models.list()] == ["deep"]
        assert ask(server, "deep") == expected["deep"]
        for name, status, message in (
            ("half", 400, "half"),
            ("torn", 400, "torn cannot be loaded, and deep is served as before"),
            ("encoder", 400, "encoder cannot be loaded, and deep is served as before"),
            ("../tiny", 404, "among those that can be loaded: 'deep', 'encoder', 'half', 'tiny', 'torn'"),
            ("no model", 404, "there is no model"),
            (str(models / "deep"), 404, "there is no model"),
        ):  # fmt: skip
            found, body = load(server, name)
            assert (found, message in body["error"]["message"]) == (status, True), body
            assert server.status() == 200
        assert ask(server, "deep") == expected["deep"]
        shown = json.loads(server.get("/models"))["data"]
        assert [one["id"] for one in shown if one["status"]["value"] == "loaded"] == ["deep"]
        assert load(server, "tiny")[0] == 200
        assert ask(server, "tiny") == expected["tiny"]
        assert processes_of(tiny) == ranks
        code, err = server.end(signal.SIGTERM)
        assert (code, "Traceback" in err) == (0, False), err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_that_are_started_again_have_the_loaded_model(tiny: Path, models: Path) -> None:
    with started(tiny, "--tp", "2", "--restarts", "1", "--models", str(models)) as server:
        assert load(server, "deep")[0] == 200
        before = ask(server, "deep")
        server.signal_rank(tiny, 1, signal.SIGKILL)
        server.wait_for(503)
        server.wait_for(200)
        assert ask(server, "deep") == before
        assert server.end(signal.SIGTERM)[0] == 0


def test_models_need_the_key_and_the_option(folder: Path) -> None:
    with serving(folder, api_key="secret") as served:
        assert served.call("/models/load", {"model": "deep"})[0] == 401
        status, body = served.call("/models/load", {"model": "deep"}, {"authorization": "Bearer secret"})
        assert (status, "started without --models" in body["error"]["message"]) == (404, True)
