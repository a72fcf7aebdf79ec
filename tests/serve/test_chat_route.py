"""The official client's chats: each answer is what `generate` writes for the request alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.served import Served

SAMPLED = {"temperature": 1.2, "seed": 5, "max_tokens": 40}


def ask(served: Served, text: str = "Hi", **settings: Any) -> Any:
    if "logit_bias" in settings:
        settings["logit_bias"] = {str(i): bias for i, bias in settings["logit_bias"].items()}
    extra = {name: settings.pop(name) for name in ("top_k", "min_p", "chat_template_kwargs") if name in settings}
    return served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}], extra_body=extra, **settings
    )


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({"max_tokens": 12}, {"max_new_tokens": 12}),
        (SAMPLED, {"max_new_tokens": 40, "temperature": 1.2, "seed": 5}),
        (
            {**SAMPLED, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "presence_penalty": 0.4, "logit_bias": {65: 3}},
            {
                "max_new_tokens": 40, "temperature": 1.2, "seed": 5, "top_p": 0.9, "top_k": 40, "min_p": 0.01,
                "presence_penalty": 0.4, "logit_bias": {65: 3.0},
            },
        ),
        ({"max_completion_tokens": 7}, {"max_new_tokens": 7}),
    ],
)  # fmt: skip
def test_an_answer_is_that_of_the_request_alone(
    served: Served, settings: dict[str, Any], sampling: dict[str, Any]
) -> None:
    prompt = served.chat_ids("Hi")
    expected = served.alone(prompt, **sampling)
    answer = ask(served, **settings)
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == {"eos": "stop"}.get(expected.finish_reason, expected.finish_reason)
    new = len(expected.tokens)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), new)
    assert answer.usage.total_tokens == len(prompt) + new

    chunks = list(ask(served, **settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected.text
    assert chunks[-1].choices == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(chunks[-1].usage, name) for name in counts] == [getattr(answer.usage, name) for name in counts]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [choice.finish_reason]
    assert "usage" not in next(iter(ask(served, **settings, stream=True))).model_fields_set


def test_the_answers_of_n_have_seeds_of_their_own(served: Served) -> None:
    prompt = served.chat_ids("Hi")
    alone = [served.alone(prompt, max_new_tokens=20, temperature=1.0, seed=9 + i) for i in range(3)]
    expected, new = [one.text for one in alone], sum(len(one.tokens) for one in alone)
    answer = ask(served, max_tokens=20, temperature=1.0, seed=9, n=3)
    assert [choice.message.content for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), new)
    texts = ["", "", ""]
    for chunk in ask(served, max_tokens=20, temperature=1.0, seed=9, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected


def test_unseeded_answers_differ(served: Served) -> None:
    texts = {ask(served, max_tokens=12, temperature=1.5).choices[0].message.content for _ in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_that_spans_tokens_is_removed_exactly(served: Served, stream: bool) -> None:
    whole = served.alone(served.chat_ids("Hi"), max_new_tokens=40, temperature=1.2, seed=5, logit_bias=ASCII)
    assert len(whole.text) > 30
    stop = whole.text[17:20]
    answer = ask(served, **SAMPLED, stop=["never", stop], stream=stream, logit_bias=ASCII)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == whole.text[: whole.text.index(stop)]
    assert reason == "stop"


ASCII = {i: -100.0 for i in range(257) if not 32 <= i < 127}
"""Biases with which every token is a printable character."""


def test_logprobs_are_those_of_the_model_and_their_bytes_are_the_text(served: Served) -> None:
    prompt = served.chat_ids("Hi")
    tokens = served.alone(prompt, max_new_tokens=40, temperature=1.2, seed=5).tokens
    with torch.no_grad():
        logits = served.model(input_ids=torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :].double()
    expected = torch.log_softmax(logits, -1).numpy()
    choice = ask(served, **SAMPLED, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    kept = [token for token in tokens if token != 256]
    assert [entry.bytes for entry in content] == [[token] for token in kept]
    assert bytes(b for entry in content for b in entry.bytes).decode(errors="replace") == choice.message.content
    np.testing.assert_allclose([e.logprob for e in content], [expected[i, t] for i, t in enumerate(kept)], atol=1e-9)
    for place, entry in enumerate(content):
        best = np.argsort(-expected[place], kind="stable")[:3]
        assert [top.bytes for top in entry.top_logprobs if top.bytes != list(b"<|endoftext|>")] == [
            [int(i)] for i in best if i != 256
        ]
    streamed = [
        entry
        for chunk in ask(served, **SAMPLED, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == content


def test_logprobs_leave_out_what_a_stop_text_removes(served: Served) -> None:
    whole = served.alone(served.chat_ids("Hi"), max_new_tokens=40, temperature=1.2, seed=5, logit_bias=ASCII).text
    for stream in (False, True):
        answer = ask(served, **SAMPLED, stop=whole[17:20], logprobs=True, stream=stream, logit_bias=ASCII)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        assert bytes(b for entry in entries for b in entry.bytes).decode() == whole[: whole.index(whole[17:20])]


def test_half_a_character_is_never_sent(served: Served) -> None:
    text = "é€😀ß"
    schema = {"type": "json_schema", "json_schema": {"name": "one", "schema": {"const": text}}}
    chunks = list(ask(served, max_tokens=60, response_format=schema, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == f'"{text}"'


def test_sixteen_clients_at_once(served: Served) -> None:
    asked = [(f"Message {i}", {"max_tokens": 8 + 3 * i, "temperature": 1.0, "seed": i}) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda one: ask(served, one[0], **one[1]), asked))
    for (text, settings), answer in zip(asked, answers, strict=True):
        expected = served.alone(
            served.chat_ids(text), max_new_tokens=settings["max_tokens"], temperature=1.0, seed=settings["seed"]
        )
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.completion_tokens == len(expected.tokens)
