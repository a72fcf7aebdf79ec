"""Tools, response formats and reasoning, over the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.served import Served

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
}
HI = [{"role": "user", "content": "Hi"}]


def ask(served: Served, **settings: Any) -> Any:
    return served.client().chat.completions.create(**{"model": "tiny", "messages": HI, "max_tokens": 90, **settings})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "clock"}), ({"type": "function", "function": {"name": "weather"}}, {"weather"})],
)
def test_a_demanded_call(served: Served, choice: Any, names: set[str], stream: bool) -> None:
    answer = ask(served, tools=[WEATHER, CLOCK], tool_choice=choice, stream=stream, temperature=1.0, seed=2)
    if stream:
        deltas = [chunk.choices[0] for chunk in answer]
        assert not any(one.delta.content for one in deltas)
        (call,) = [call for one in deltas for call in one.delta.tool_calls or ()]
        reason = deltas[-1].finish_reason
    else:
        ((call,), reason) = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        assert answer.choices[0].message.content is None
    assert reason == "tool_calls"
    assert call.function.name in names
    arguments = json.loads(call.function.arguments)
    assert arguments.get("city") in (["Ulm", "Bonn"] if call.function.name == "weather" else [None])
    assert call.id.startswith("call_")


def test_calls_and_their_results_reach_the_template(served: Served) -> None:
    function = {"name": "weather", "arguments": '{"city": "Ulm"}'}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "rain"}]},
    ]
    _, found = served.call("/tokenize", {"messages": messages, "tools": [WEATHER]})
    assert bytes(found["tokens"]) == b"[weather]<user>Hi\n<assistant>(weather Ulm)\n<tool>rain\n<assistant>"


@pytest.mark.parametrize(
    ("form", "check"),
    [
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": WEATHER["function"]["parameters"]}},  # type: ignore[index]
            lambda data: data in ({"city": "Ulm"}, {"city": "Bonn"}),
        ),
        ({"type": "json_schema", "json_schema": {"schema": {"enum": [1, 2]}}}, lambda data: data in (1, 2)),
        ({"type": "json_object"}, lambda data: isinstance(data, dict)),
    ],
)
def test_a_response_format_is_kept(served: Served, form: Any, check: Any) -> None:
    # Without a closing brace the random model writes a JSON object for ever.
    bias = {str(i): -100 for i in range(256) if i not in b'{}"'} if form["type"] == "json_object" else {}
    answer = ask(served, response_format=form, temperature=1.0, seed=1, logit_bias=bias)
    assert answer.choices[0].finish_reason == "stop"
    assert check(json.loads(answer.choices[0].message.content))


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_separated(served: Served, stream: bool) -> None:
    answer = ask(served, max_tokens=12, extra_body={"chat_template_kwargs": {"enable_thinking": True}}, stream=stream)
    prompt = served.chat_ids("Hi", enable_thinking=True)
    assert bytes(prompt).endswith(b"<think>")
    expected = served.alone(prompt, max_new_tokens=12).text
    if stream:
        deltas = [chunk.choices[0].delta for chunk in answer]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == expected
        assert not any(delta.content for delta in deltas)
    else:
        assert answer.choices[0].message.reasoning_content == expected
        assert answer.choices[0].message.content == ""
