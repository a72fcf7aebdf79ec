"""Images in messages: each answer is what `generate` gives for the chat alone, whatever else is being served."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from partita.generation import Sampling
from partita.serving import ServeSettings
from partita.serving.images import MOST_PIXELS, ImageProcessor
from partita.torch import generate
from tests.support.image_chat import PLACE, about, as_transformers, data_url, save_llava
from tests.support.serve_command import started
from tests.support.served import Served, serving


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("images") / "llava")


@pytest.fixture(scope="module")
def seeing(llava: Path) -> Iterator[Served]:
    with serving(llava, processor=ImageProcessor(llava), no_images="") as one:
        yield one


def ask(served: Any, messages: Any, **settings: Any) -> Any:
    client = served.client()
    settings = {"model": client.models.list().data[0].id, "max_tokens": 12, "temperature": 1, "seed": 4, **settings}
    return client.chat.completions.create(messages=messages, **settings)


def expected(served: Served, folder: Path, messages: list[dict[str, Any]]) -> tuple[str, int]:
    ids, inputs = as_transformers(folder, messages)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=4)
    (alone,) = generate(served.model, [ids], sampling, inputs=[inputs], tokenizer=served.tokenizer)
    return alone.text, len(ids)


def test_answers_with_images_and_without_share_steps_and_nothing_else(seeing: Served, llava: Path) -> None:
    assert seeing.inbox.stats().steps == 0
    chats = [about(data_url(1)), about(data_url(2)), about(data_url(1), data_url(3)), about(data_url(1))]
    words = [{"role": "user", "content": "What is it? " * 4}]
    first = ask(seeing, words).choices[0].message.content
    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda chat: ask(seeing, chat), [*chats, words, words])]
    texts = [answer.choices[0].message.content for answer in answers]
    assert len(set(texts[:3])) == 3
    for chat, answer in zip(chats, answers, strict=False):
        text, count = expected(seeing, llava, chat)
        assert answer.choices[0].message.content == text
        assert (answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (count, 0)
    assert texts[4:] == [first, first]
    assert answers[4].usage.prompt_tokens_details.cached_tokens > 0
    assert seeing.inbox.stats().blocks_used == 0


@pytest.mark.slow
def test_exact_rows_with_two_images(llava: Path) -> None:
    settings = ServeSettings(max_sequences=2, cache_bytes=16 << 20, exact_rows=True)
    with serving(llava, settings, processor=ImageProcessor(llava), no_images="") as served:
        chat = about(data_url(1), data_url(3))
        assert ask(served, chat).choices[0].message.content == expected(served, llava, chat)[0]


def test_streams_responses_and_counts_tokens(seeing: Served, llava: Path) -> None:
    chat = about(data_url(4))
    text, count = expected(seeing, llava, chat)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(seeing, chat, stream=True)) == text
    parts: Any = [{"type": "input_image", "image_url": data_url(4)}, {"type": "input_text", "text": "What is it?"}]
    response = seeing.client().responses.create(
        model="tiny", instructions="Be brief.", input=[{"role": "user", "content": parts}], max_output_tokens=12, temperature=1,
        extra_body={"seed": 4},
    )  # fmt: skip
    assert response.output_text == text
    assert seeing.call("/tokenize", {"messages": chat})[1]["count"] == count


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/a.png", "fetches nothing from other hosts"),
        ("file:///etc/passwd", "fetches nothing from other hosts"),
        ("/etc/passwd", "fetches nothing from other hosts"),
        ("data:image/png,abc", "must be in base64"),
        ("data:image/png;base64,%%%", "the image cannot be read"),
        ("data:image/png;base64," + base64.b64encode(b"no image").decode(), "the image cannot be read"),
        (data_url(1)[:200], "the image cannot be read"),
    ],
)
def test_wrong_images_are_refused(seeing: Served, url: str, message: str) -> None:
    status, body = seeing.call("/v1/chat/completions", {"messages": about(url)})
    assert (status, body["error"]["type"], body["error"]["param"]) == (400, "invalid_request_error", "messages")
    assert message in body["error"]["message"]


def test_a_picture_of_too_many_pixels_is_refused(seeing: Served) -> None:
    from PIL import Image

    side = 1 + int(MOST_PIXELS**0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "convert", None)  # nothing is decoded
        status, body = seeing.call("/v1/chat/completions", {"messages": about(_blank(side))})
    assert (status, f"this one has {side} x {side}" in body["error"]["message"]) == (400, True)


def _blank(side: int) -> str:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_placeholder_without_an_image_is_refused(seeing: Served) -> None:
    status, body = seeing.call("/v1/chat/completions", {"messages": about(data_url(1), text=f"{PLACE}?")})
    assert (status, "does not take these messages" in body["error"]["message"]) == (400, True)


def test_models_of_text_refuse_images(served: Served) -> None:
    status, body = served.call("/v1/chat/completions", {"messages": about(data_url(1))})
    assert (status, body["error"]["param"]) == (400, "messages")
    assert body["error"]["message"] == "there is an image among the messages, but this model takes text only."


@pytest.mark.slow
@pytest.mark.parametrize("split", ["--tp 2", "--pp 2", "--dp 2"])
def test_images_over_ranks(seeing: Served, llava: Path, split: str) -> None:
    chats = [about(data_url(seed)) for seed in (1, 2)]
    with started(llava, *split.split()) as server:
        for chat in chats:
            assert ask(server, chat).choices[0].message.content == expected(seeing, llava, chat)[0]
        assert server.end(signal.SIGTERM) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mlx"), reason="MLX is not installed")
def test_mlx_says_why_it_takes_no_images(llava: Path) -> None:
    with started(llava, "--engine", "mlx") as server:
        with pytest.raises(Exception, match="--engine mlx serves text only; serve the model with --engine torch"):
            ask(server, about(data_url(1)))
        assert server.end(signal.SIGTERM)[0] == 0
