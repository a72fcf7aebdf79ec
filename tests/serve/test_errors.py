"""Wrong requests: OpenAI's error form, a 4xx status, and a server that continues."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.served import Served

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"temperature": "hot"}, "temperature", "valid number, but is 'hot'"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0, but is -1"),
        ({"temperature": True}, "temperature", "but is True"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2000}, "messages", "context has 1024 tokens, but the prompt has 20 and 2000 new ones"),
        ({"min_tokens": 3}, "min_tokens", "must be at most the largest number of tokens, 2; got 3"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages.0.role", "but is 'king'"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages", "does not take these messages: no functions"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "needs an image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages.0.content", "got 'file'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content", "'text' needs a text"),
        ({"stop": [""]}, "stop", "at least one character"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "ids 0 to 256; got 257"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "valid integer"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice",
            "names 'g', which is not among tools",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}},
            "response_format.json_schema.schema", "cannot be used as a grammar",
        ),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "set by the server"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(served: Served, change: dict[str, Any], param: str, text: str) -> None:
    status, body = served.call("/v1/chat/completions", {**CHAT, **change})
    assert (status, body["error"]["type"], body["error"]["param"]) == (400, "invalid_request_error", param)
    assert text in body["error"]["message"]


def test_errors_as_the_client_raises_them(served: Served) -> None:
    client = served.client()
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.chat.completions.create(model="other", messages=CHAT["messages"])  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="has no tokens"):
        client.completions.create(model="tiny", prompt=[[]])
    with pytest.raises(openai.BadRequestError, match="prompt: must have at least one token"):
        client.completions.create(model="tiny", prompt="")
    with pytest.raises(openai.BadRequestError, match="ids 0 to 256; got 900"):
        client.completions.create(model="tiny", prompt=[900])


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_a_chat_takes_the_text_parts_of_responses(served: Served, kind: str) -> None:
    messages = [{"role": "user", "content": [{"type": kind, "text": "H"}, {"type": kind, "text": "i"}]}]
    assert (
        served.call("/tokenize", {"messages": messages})[1]
        == served.call("/tokenize", {"messages": CHAT["messages"]})[1]
    )


def test_paths_and_methods(served: Served) -> None:
    assert served.call("/v1/nothing")[0] == 404
    status, body = served.call("/v1/chat/completions")
    assert (status, body["error"]["message"]) == (405, "GET /v1/chat/completions: Method Not Allowed.")


def test_what_is_null_or_unknown_is_ignored(served: Served) -> None:
    fields = dict.fromkeys(
        ("temperature", "top_p", "n", "stop", "seed", "tools", "tool_choice", "logit_bias", "response_format", "stream")
    )
    status, body = served.call("/v1/chat/completions", {**CHAT, **fields, "user": "me", "nonsense": [1]})
    assert status == 200
    assert body["choices"][0]["message"]["content"] == served.alone(served.chat_ids("Hi"), max_new_tokens=2).text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "logit_bias", "seed", "stop", "n", "stream", "logprobs",
    "top_logprobs", "tools", "tool_choice", "response_format", "chat_template_kwargs", "stream_options", "model", "echo",
    "input", "instructions", "max_output_tokens", "text", "previous_response_id", "store", "metadata", "include",
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"]),
    st.sampled_from(FIELDS),
    JSON,
)
def test_any_value_of_any_field_is_answered(served: Served, path: str, field: str, value: Any) -> None:
    body = {**CHAT, "prompt": "Hi", "input": "Hi", "max_output_tokens": 2, field: value}
    if path == "/v1/responses" and field != "prompt":
        body.pop("prompt")
    if path == "/tokenize":
        body.pop("prompt" if field != "prompt" else "messages")
    status, answer = served.call(path, body)
    assert status in (200, 400, 404), answer
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_any_bytes_are_answered(served: Served, data: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/responses"):
        status, answer = served.call(path, data)
        assert status == 400
        assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "data",
    [
        b'{"messages":' + b"[" * 100_000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"temperature": NaN, ' + json.dumps(CHAT).encode()[1:], b"[]", b"\xff\xfe", b'{"a":' * 5000,
    ],
)  # fmt: skip
def test_malformed_bodies(served: Served, data: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/responses"):
        assert served.call(path, data)[0] == 400


ITEMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(
                ["message", "function_call", "function_call_output", "reasoning", "item_reference", None, 3]
            ),
            "role": st.sampled_from(["user", "assistant", "system", "king", None]),
            "content": JSON | st.lists(st.fixed_dictionaries({"type": st.text(), "text": st.text(max_size=3)}), max_size=2),
            "name": st.text(max_size=3), "call_id": st.text(max_size=3), "arguments": st.text(max_size=3), "output": JSON,
        },
    ),
    max_size=4,
)  # fmt: skip


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ITEMS, st.booleans())
def test_any_items_are_answered(served: Served, items: Any, stream: bool) -> None:
    status, answer = served.call("/v1/responses", {"input": items, "max_output_tokens": 2, "stream": stream})
    assert status in (200, 400), answer
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
