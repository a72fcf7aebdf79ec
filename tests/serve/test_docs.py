"""The examples of docs/serving.md work as pasted, against a server at the address that they name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.served import Served

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def block(kind: str, has: str, served: Served) -> str:
    (found,) = [code for code in re.findall(rf"^```{kind}\n(.*?)^```", TEXT, re.M | re.S) if has in code]
    return str(found).replace("http://127.0.0.1:8080", served.url)


def test_curl(served: Served) -> None:
    ended = subprocess.run(["bash", "-c", block("sh", "curl", served)], capture_output=True, text=True, check=True)
    content = json.loads(ended.stdout)["choices"][0]["message"]["content"]
    assert content == served.alone(served.chat_ids("What is a fugue?"), max_new_tokens=40).text


def test_the_client(served: Served) -> None:
    code = block("python", "openai", served)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert ended.stdout.decode() == served.alone(served.chat_ids("What is a fugue?"), max_new_tokens=40).text


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/plan", "/v1/models"])
def test_the_paths(served: Served, path: str) -> None:
    assert f"`GET {path}`" in TEXT
    assert served.call(path)[0] == 200
