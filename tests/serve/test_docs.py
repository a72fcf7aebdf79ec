"""The examples of docs/serving.md work as pasted, against a server at the address that they name."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from partita.generation import Sampling
from partita.serving.images import ImageProcessor
from partita.torch import generate
from tests.serve.test_embeddings_route import BERT
from tests.support.image_chat import about, as_transformers, data_url, save_llava
from tests.support.served import Served, save_model, serving

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


ANSWERS = {
    "/v1/chat/completions": lambda body: body["choices"][0]["message"]["content"],
    "/v1/completions": lambda body: body["choices"][0]["text"],
    "/v1/responses": lambda body: body["output"][0]["content"][0]["text"],
    "/tokenize": lambda body: body["tokens"],
    "/v1/embeddings": lambda body: [one["embedding"] for one in body["data"]],
}
CALLS = {
    "/v1/chat/completions": "stream=True", "/v1/completions": "client.completions.create",
    "/v1/responses": "responses.create", "/v1/embeddings": "embeddings.create",
}  # fmt: skip


def block(kind: str, has: str, served: Served) -> str:
    (found,) = [code for code in re.findall(rf"^```{kind}\n(.*?)^```", TEXT, re.M | re.S) if has in code]
    return str(found).replace("http://127.0.0.1:8080", served.url)


def curl(path: str, served: Served) -> Any:
    code = block("sh", f":8080{path} ", served)
    ended = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return ANSWERS[path](json.loads(ended.stdout))


def client(path: str, served: Served) -> str:
    code = block("python", CALLS[path], served)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    return ended.stdout.decode()


def continued(served: Served, *texts: str, most: int = 40) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    return served.alone(served.tokenizer.encode_messages(messages), max_new_tokens=most).text


def test_chats(served: Served) -> None:
    expected = continued(served, "What is a fugue?")
    assert curl("/v1/chat/completions", served) == expected
    assert client("/v1/chat/completions", served) == expected


def test_completions(served: Served) -> None:
    expected = served.alone(list(b"A fugue is"), max_new_tokens=20).text
    assert curl("/v1/completions", served) == expected
    assert client("/v1/completions", served) == expected + "\n"
    assert curl("/tokenize", served) == list(b"A fugue is")


@pytest.mark.slow
def test_responses(served: Served) -> None:
    first = continued(served, "What is a fugue?")
    assert curl("/v1/responses", served) == first
    assert client("/v1/responses", served) == continued(served, "What is a fugue?", first, "And a partita?") + "\n"


@pytest.mark.slow
def test_images(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(base64.b64decode(data_url(1).partition(",")[2]))
    llava = save_llava(tmp_path / "llava")
    with serving(llava, processor=ImageProcessor(llava), no_images="") as served:
        code = block("python", "image_url", served)
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60, cwd=tmp_path)
        ids, inputs = as_transformers(llava, about(data_url(1))[1:])
        (alone,) = generate(served.model, [ids], Sampling(40), inputs=[inputs], tokenizer=served.tokenizer)
        assert ended.stdout.decode() == alone.text + "\n"


@pytest.mark.slow
def test_embeddings(tmp_path: Path) -> None:
    with serving(save_model(tmp_path / "bert", None, BERT)) as encoder:
        found = curl("/v1/embeddings", encoder)
        assert [len(vector) for vector in found] == [24, 24]
        assert client("/v1/embeddings", encoder) == "2 24\n"


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/plan", "/v1/models"])
def test_the_paths(served: Served, path: str) -> None:
    assert f"`GET {path}`" in TEXT
    assert served.call(path)[0] == 200


def test_every_post_is_in_the_table() -> None:
    for path in ANSWERS:
        assert f"`POST {path}" in TEXT or f"`{path}`" in TEXT
