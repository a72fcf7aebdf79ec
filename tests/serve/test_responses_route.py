"""`/v1/responses` through the official client: each answer is that of `generate`, and of the same chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from partita.serving.front import Front
from partita.serving.http.openai.bodies import Message
from partita.serving.http.openai.response_bodies import Item, messages_of
from partita.serving.http.openai.response_store import ResponseStore, Stored
from tests.support.served import Served, serving

SAMPLED = {"temperature": 1.0, "max_output_tokens": 30, "extra_body": {"seed": 5}}
WEATHER = {
    "type": "function", "name": "weather", "strict": True, "description": "The weather of a city.",
    "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"],
        "additionalProperties": False,
    },
}  # fmt: skip


def ask(served: Served, **settings: Any) -> Any:
    """The response, or all events of a stream."""
    with served.client() as client:
        answer = client.responses.create(**{"model": "tiny", "input": "Hi", **settings})
        return list(answer) if settings.get("stream") else answer


def ids_of(served: Served, *messages: tuple[str, str]) -> list[int]:
    return served.tokenizer.encode_messages([{"role": role, "content": text} for role, text in messages])


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_that_of_the_request_alone(served: Served, stream: bool) -> None:
    prompt = ids_of(served, ("system", "Be brief"), ("user", "Hi"))
    expected = served.alone(prompt, max_new_tokens=30, temperature=1.0, seed=5)
    answer = ask(served, instructions="Be brief", **SAMPLED, stream=stream)
    events = answer if stream else []
    final = events[-1].response if stream else answer
    is_cut = expected.finish_reason == "length"
    assert final.output_text == expected.text
    assert final.status == ("incomplete" if is_cut else "completed")
    assert final.incomplete_details == (None if not is_cut else openai.types.responses.response.IncompleteDetails(
        reason="max_output_tokens"
    ))  # fmt: skip
    assert (final.usage.input_tokens, final.usage.output_tokens) == (len(prompt), len(expected.tokens))
    assert final.usage.total_tokens == len(prompt) + len(expected.tokens)
    assert (final.instructions, final.temperature, final.max_output_tokens) == ("Be brief", 1.0, 30)
    if stream:
        kinds = [event.type.removeprefix("response.") for event in events]
        deltas = kinds.count("output_text.delta")
        assert kinds == [
            "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
            "output_text.done", "content_part.done", "output_item.done", "incomplete" if is_cut else "completed",
        ]  # fmt: skip
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected.text
        assert events[-2].item.content[0].text == expected.text


def test_the_clients_own_stream(served: Served) -> None:
    expected = served.alone(served.chat_ids("Hi"), max_new_tokens=30, temperature=1.0, seed=5).text
    with served.client() as client, client.responses.stream(model="tiny", input="Hi", **SAMPLED) as stream:  # type: ignore[arg-type]
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
    assert snapshots[-1] == expected


def part(text: str, kind: str = "input_text") -> dict[str, str]:
    return {"type": kind, "text": text}


def test_items_are_the_messages_of_a_chat(served: Served) -> None:
    items: Any = [
        {"role": "developer", "content": "Rules"},
        {"type": "message", "role": "user", "content": [part("Wea"), part("ther?")]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Ulm"}'},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
        {"role": "assistant", "content": [part("Rain.", "output_text")]},
        {"role": "user", "content": "And now?"},
    ]
    call: Any = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    messages: Any = [
        {"role": "developer", "content": "Rules"}, {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "rain"}, {"role": "assistant", "content": "Rain."},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    with served.client() as client:
        chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=1.0, seed=5)
    answer = ask(served, **{**SAMPLED, "input": items, "max_output_tokens": 20})
    assert answer.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens


def test_a_response_continues_an_earlier_one(served: Served) -> None:
    first = ask(served, input="Hi", max_output_tokens=6, instructions="Not kept")
    with served.client() as client:
        assert client.responses.retrieve(first.id).output_text == first.output_text
    expected = served.alone(
        ids_of(served, ("user", "Hi"), ("assistant", first.output_text), ("user", "More")), max_new_tokens=9
    )
    for _ in range(2):
        second = ask(served, input="More", previous_response_id=first.id, max_output_tokens=9, store=False)
        assert second.output_text == expected.text
        assert second.previous_response_id == first.id
    assert served.call(f"/v1/responses/{second.id}")[0] == 404
    with served.client() as client:
        client.responses.delete(first.id)
    status, body = served.call("/v1/responses", {"input": "Hi", "previous_response_id": first.id})
    error = body["error"]
    assert (status, error["code"], error["param"]) == (400, "previous_response_not_found", "previous_response_id")
    assert error["message"].startswith(f"no response '{first.id}' is kept.")
    assert served.call(f"/v1/responses/{first.id}")[0] == 404


def test_the_oldest_responses_are_forgotten() -> None:
    messages = [Message(role="user", content="x" * 700)]
    store = ResponseStore(kept_bytes=3000)
    for name in "abcd":
        store.add(Stored({"id": name}, messages))
    assert [name for name in "abcd" if store.find(name)] == ["b", "c", "d"]
    store.remove("c")
    store.add(Stored({"id": "e"}, messages))
    assert [name for name in "abcde" if store.find(name)] == ["b", "d", "e"]
    store.add(Stored({"id": "f"}, messages * 9))
    assert not any(store.find(name) for name in "abcdef")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_demanded_call(served: Served, choice: Any, stream: bool) -> None:
    answer = ask(served, tools=[WEATHER], tool_choice=choice, stream=stream, **{**SAMPLED, "max_output_tokens": 90})
    events = answer if stream else []
    final = events[-1].response if stream else answer
    (call,) = final.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Ulm", "Bonn")
    if stream:
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(deltas) == call.arguments
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    after = ask(served, input=[output], previous_response_id=final.id, max_output_tokens=4)
    city = json.loads(call.arguments)["city"]
    prompt = list(f"<user>Hi\n<assistant>(weather {city})\n<tool>rain\n<assistant>".encode())
    assert after.output_text == served.alone(prompt, max_new_tokens=4).text


class Answer(BaseModel):
    size: int


def test_a_format_is_kept(served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    answer = ask(served, text=form, **SAMPLED)
    assert json.loads(answer.output_text)["a"] in (1, 2)
    assert answer.text.format.schema_ == schema
    bias = {"extra_body": {"logit_bias": {str(i): -100 for i in b"0123456789-"} | {"49": 20, "125": 30}}}
    with served.client() as client:
        options: Any = {**SAMPLED, **bias}
        parsed = client.responses.parse(model="tiny", input="Hi", text_format=Answer, **options).output_parsed
    assert isinstance(parsed, Answer)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_an_item_of_its_own(served: Served, stream: bool) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": True}, "logit_bias": {"256": -100}}
    expected = served.alone(served.chat_ids("Hi", enable_thinking=True), max_new_tokens=12, logit_bias={256: -100.0})
    answer = ask(served, max_output_tokens=12, extra_body=extra, stream=stream)
    events = answer if stream else []
    final = events[-1].response if stream else answer
    (item,) = final.output
    assert (item.type, item.status, item.content[0].text) == ("reasoning", "incomplete", expected.text)
    assert final.usage.output_tokens_details.reasoning_tokens == 12
    assert final.output_text == ""
    if stream:
        deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(deltas) == expected.text


def test_reasoning_and_calls_are_parts_of_one_message() -> None:
    items: list[dict[str, Any]] = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g"},
    ]
    (message,) = messages_of([Item.model_validate(item) for item in items])
    assert (message.reasoning_content, message.content) == ("hm", "I look.")
    assert [call.function.name for call in message.tool_calls or ()] == ["f", "g"]
    assert messages_of([Item.model_validate(items[3])], [message])[0].tool_calls != message.tool_calls


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"input": []}, "input", "at least one item"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "got 'item_reference'"),
        ({"input": [{"role": "user"}]}, "input.0.content", "needs a role and a content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content", "needs an image_url"),
        ({"input": [{"role": "king", "content": ""}]}, "input.0.role", "but is 'king'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0", "needs a name and a call_id"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 2000}, "input", "context has 1024 tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function'"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "schema is missing"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strange"}}}},
            "text.format.schema", "cannot be used as a grammar",
        ),
        ({"background": True}, "background", "answers while the client waits"),
        ({"conversation": "c"}, "conversation", "Use previous_response_id"),
        ({"include": ["message.output_text.logprobs"]}, "include", "no log probabilities"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(served: Served, change: dict[str, Any], param: str, text: str) -> None:
    status, body = served.call("/v1/responses", {"input": "Hi", "max_output_tokens": 2, **change})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error"), body
    assert text in body["error"]["message"]
    assert body["error"]["param"] == param


def test_a_lost_rank_ends_a_stream_with_a_failed_response(folder: Path) -> None:
    last = None
    with serving(folder) as lone, lone.client() as client:
        front = Front()
        lone.service.inbox = front
        front.open([lone.inbox])
        for last in client.responses.create(
            model="tiny", input="Hi", stream=True, max_output_tokens=900, extra_body={"ignore_eos": True}
        ):
            if last.type == "response.created":
                front.begun([1])
                front.lose("rank 1 was lost while working: it was killed.")
    assert last is not None
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.message == "rank 1 was lost while working: it was killed."
